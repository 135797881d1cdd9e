"""One vocabulary of several: rows follow tokens, and what is written agrees with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import merger
from merger.methods import METHODS

WIDTH = 8
EMBEDDINGS, HEAD, LAYER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
WORDS = [f"w{i}" for i in range(10)]


def _tokenizer(words: Sequence[str], added: Sequence[str] = (), *, special: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    return tokenizer


def _model(
    folder: Path, tokenizer: Tokenizer | None, *, seed: int, rows: int | None = None, tied: bool = False,
    near: Path | None = None, **config: object,
) -> Path:  # fmt: skip
    """A model whose rows say which token of which model they are; near another one where a delta should be small."""
    size = tokenizer.get_vocab_size() if rows is None and tokenizer is not None else int(rows or 0)
    generator = torch.Generator().manual_seed(seed)
    tensors = {EMBEDDINGS: torch.randn(size, WIDTH, generator=generator), LAYER: torch.randn(6, WIDTH)}
    if not tied:
        tensors[HEAD] = torch.randn(size, WIDTH, generator=generator)
    if near is not None:
        tensors[LAYER] = load_file(near / "model.safetensors")[LAYER] + 0.01
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    document = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "vocab_size": size,
        "tie_word_embeddings": tied,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(document))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def _linear(*folders: Path, base: Path | None = None, **more: object) -> dict[str, Any]:
    return {
        "merge_method": "linear", "models": [{"model": str(f), "parameters": {"weight": 1.0}} for f in folders],
        **({"base_model": str(base)} if base is not None else {}), **more,
    }  # fmt: skip


def _arithmetic(base: Path, *folders: Path, **more: object) -> dict[str, Any]:
    models_ = [{"model": str(f), "parameters": {"weight": 1.0}} for f in folders]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": models_, **more}


def _rows(folder: Path, name: str = EMBEDDINGS) -> tuple[Tensor, dict[str, int]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return load_file(folder / "model.safetensors")[name], tokenizer.get_vocab(with_added_tokens=True)


def _merge(manifest: Mapping[str, Any], out: Path) -> tuple[Tensor, dict[str, int]]:
    merger.merge(manifest, out)
    return _rows(out)


def test_a_union_gives_each_token_its_row(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", _tokenizer(WORDS), seed=0)
    a = _model(tmp_path / "a", _tokenizer(WORDS, ["<a>", "<both>"]), seed=1, near=base)
    b = _model(tmp_path / "b", _tokenizer(WORDS, ["<both>", "<b>"]), seed=2, near=base)
    merged, tokens = _merge(_arithmetic(base, a, b, tokenizer_source="union"), tmp_path / "out")
    own = {name: _rows(folder) for name, folder in (("base", base), ("a", a), ("b", b))}

    def row(name: str, token: str) -> Tensor:
        matrix, ids = own[name]
        return matrix[ids[token]]

    assert {tokens[w] for w in WORDS} == set(range(10))
    for word in WORDS:
        expected = row("a", word) + row("b", word) - row("base", word)
        torch.testing.assert_close(merged[tokens[word]], expected)
    assert torch.equal(merged[tokens["<a>"]], row("a", "<a>"))
    assert torch.equal(merged[tokens["<b>"]], row("b", "<b>"))
    torch.testing.assert_close(merged[tokens["<both>"]], (row("a", "<both>") + row("b", "<both>")) / 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == merged.shape[0] == max(tokens.values()) + 1 == 13


@pytest.mark.parametrize("method", ["ties", "dare_ties", "sce", "model_stock", "breadcrumbs", "magmax"])
def test_rows_of_owners_are_their_mean_whatever_the_method(method: str, tmp_path: Path) -> None:
    """For methods on deltas: nothing is trimmed or dropped of what the base cannot have."""
    base = _model(tmp_path / "base", _tokenizer(WORDS), seed=0)
    a = _model(tmp_path / "a", _tokenizer(WORDS, ["<a>", "<both>"]), seed=1, near=base)
    b = _model(tmp_path / "b", _tokenizer(WORDS, ["<both>", "<b>"]), seed=2, near=base)
    takes = {parameter.name for parameter in METHODS[method].parameters}
    own = {name: value for name, value in {"weight": 1.0, "density": 0.4}.items() if name in takes}
    manifest = {
        "merge_method": method, "base_model": str(base), "tokenizer_source": "union",
        "models": [{"model": str(f), "parameters": own} for f in (a, b)],
    }  # fmt: skip
    merged, tokens = _merge(manifest, tmp_path / "out")
    (rows_a, ids_a), (rows_b, ids_b) = _rows(a), _rows(b)
    torch.testing.assert_close(merged[tokens["<a>"]], rows_a[ids_a["<a>"]])
    torch.testing.assert_close(merged[tokens["<both>"]], (rows_a[ids_a["<both>"]] + rows_b[ids_b["<both>"]]) / 2)


def test_rows_move_with_their_tokens(tmp_path: Path) -> None:
    """Two models whose vocabularies are the same tokens in another order."""
    order = [7, 3, 9, 0, 1, 2, 8, 4, 6, 5]
    a = _model(tmp_path / "a", _tokenizer(WORDS), seed=0)
    b = _model(tmp_path / "b", _tokenizer([WORDS[i] for i in order]), seed=1, near=a)
    merged, tokens = _merge(_linear(a, b, base=a, tokenizer_source="base"), tmp_path / "out")
    (rows_a, ids_a), (rows_b, ids_b) = _rows(a), _rows(b)
    for word in WORDS:
        torch.testing.assert_close(merged[tokens[word]], (rows_a[ids_a[word]] + rows_b[ids_b[word]]) / 2)
    head = load_file(tmp_path / "out" / "model.safetensors")[HEAD]
    theirs = load_file(b / "model.safetensors")[HEAD]
    ours = load_file(a / "model.safetensors")[HEAD]
    torch.testing.assert_close(head[tokens["w7"]], (ours[7] + theirs[0]) / 2)


def test_the_vocabulary_of_a_named_model(tmp_path: Path) -> None:
    a = _model(tmp_path / "a", _tokenizer(WORDS), seed=0)
    b = _model(tmp_path / "b", _tokenizer([*WORDS[5:], *WORDS[:5]], ["<b>"]), seed=1, near=a)
    manifest = _linear(a, b, tokenizer_source=str(b))
    merged, tokens = _merge(manifest, tmp_path / "out")
    assert tokens == _rows(b)[1]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()
    torch.testing.assert_close(merged[0], (_rows(a)[0][5] + _rows(b)[0][0]) / 2)


def test_padding_rows_stay_unless_a_multiple_is_asked(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", _tokenizer(WORDS), seed=0, rows=16)
    a = _model(tmp_path / "a", _tokenizer(WORDS, ["<a>"]), seed=1, rows=16, near=base)
    kept, tokens = _merge(_arithmetic(base, a, tokenizer_source="union"), tmp_path / "kept")
    assert (kept.shape[0], tokens["<a>"]) == (16, 10)
    assert torch.equal(kept[10], _rows(a)[0][10])
    torch.testing.assert_close(kept[11:], _rows(a)[0][11:])  # padding in both: merged by row, as without a tokenizer
    padded, _ = _merge(
        _arithmetic(base, a, tokenizer={"source": "union", "pad_to_multiple_of": 8}), tmp_path / "padded"
    )
    assert padded.shape[0] == 16
    grown, _ = _merge(_arithmetic(base, a, tokenizer={"source": "union", "pad_to_multiple_of": 32}), tmp_path / "grown")
    assert grown.shape[0] == 32
    assert torch.equal(grown[:16], kept)
    assert (grown[16:] == grown[16]).all()
    assert grown[16].norm() < kept.norm(dim=1).mean()


def test_rows_that_the_manifest_names(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", _tokenizer(WORDS), seed=0)
    a = _model(tmp_path / "a", _tokenizer(WORDS, ["<a>"]), seed=1, near=base)
    sources = {
        "<a>": {"source": {"kind": "model_token", "model": str(base), "token": "w3"}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": str(a), "token_id": 4}},
        "<none>": {"source": {"kind": "zero"}},
        "w1": {"source": str(base), "force": True},
    }  # fmt: skip
    merged, tokens = _merge(_arithmetic(base, a, tokenizer={"source": "union", "tokens": sources}), tmp_path / "out")
    assert torch.equal(merged[tokens["<a>"]], _rows(base)[0][3])
    assert torch.equal(merged[tokens["<new>"]], _rows(a)[0][4])
    assert not merged[tokens["<none>"]].any()
    assert torch.equal(merged[1], _rows(base)[0][1])
    bad = {"<a>": {"source": {"kind": "model_token", "model": str(base), "token": "<missing>"}}}
    plan = merger.plan(_arithmetic(base, a, tokenizer={"source": "union", "tokens": bad}))
    assert [p.code for p in plan.problems] == ["no-token"]


def test_configs_name_tokens_by_their_new_ids(tmp_path: Path) -> None:
    a = _model(tmp_path / "a", _tokenizer(WORDS), seed=0, eos_token_id=9, bos_token_id=[1, 2], pad_token_id=None)
    (a / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 0], "max_length": 9}))
    b = _model(tmp_path / "b", _tokenizer(list(reversed(WORDS))), seed=1, near=a)
    _merge(_linear(a, b, base=a, tokenizer_source=str(b)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (0, [8, 7], None)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [0, 9], "max_length": 9}


def test_what_is_tied_is_read_as_embeddings(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", _tokenizer(WORDS), seed=0, tied=True)
    a = _model(tmp_path / "a", _tokenizer(WORDS, ["<a>"]), seed=1, near=base)
    merged, tokens = _merge(_linear(base, a, tokenizer_source="union"), tmp_path / "out")
    head = load_file(tmp_path / "out" / "model.safetensors")[HEAD]
    assert torch.equal(head[tokens["<a>"]], load_file(a / "model.safetensors")[HEAD][10])
    torch.testing.assert_close(head[3], (_rows(base)[0][3] + load_file(a / "model.safetensors")[HEAD][3]) / 2)
    assert merged.shape == head.shape


@pytest.mark.parametrize("memory", [3 << 20, 64 << 20])
def test_bytes_do_not_follow_from_memory(memory: int, tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(3000)]
    base = _model(tmp_path / "base", _tokenizer(words), seed=0)
    a = _model(tmp_path / "a", _tokenizer(list(reversed(words)), ["<a>", "<c>"]), seed=1, near=base)
    b = _model(tmp_path / "b", _tokenizer(words, ["<b>", "<c>"]), seed=2, near=base)
    manifest = _arithmetic(base, a, b, tokenizer_source="union")
    merger.merge(manifest, tmp_path / "out", memory=memory)
    merger.merge(manifest, tmp_path / "other", memory=256 << 20)
    same = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "other")]
    assert same[0] == same[1]


def test_pieces_of_a_bpe_get_ids_of_their_own(tmp_path: Path) -> None:
    """Words that another BPE has become tokens that decode, though no merge makes them."""

    def bpe(extra: Sequence[tuple[str, str]], added: Sequence[str]) -> Tokenizer:
        vocabulary = {c: i for i, c in enumerate("abcdef")}
        merges = [("a", "b"), *extra]
        for left, right in merges:
            vocabulary[left + right] = len(vocabulary)
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(list(added))
        return tokenizer

    base = _model(tmp_path / "base", bpe([], ["<s>"]), seed=0)
    a = _model(tmp_path / "a", bpe([("c", "d")], ["<s>", "<x>"]), seed=1, near=base)
    merged, tokens = _merge(_arithmetic(base, a, tokenizer_source="union"), tmp_path / "out")
    ids = _rows(base)[1]
    assert {token: tokens[token] for token in ids} == ids
    assert torch.equal(merged[tokens["cd"]], _rows(a)[0][_rows(a)[1]["cd"]])
    assert torch.equal(merged[tokens["<x>"]], _rows(a)[0][_rows(a)[1]["<x>"]])
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert written.encode("<s>ab<x>").ids == [tokens["<s>"], tokens["ab"], tokens["<x>"]]
    assert written.decode([tokens["cd"]]) == "cd"
    warned = {w.code for w in merger.plan(_arithmetic(base, a, tokenizer_source="union")).warnings}
    assert warned == {"tokenizers-differ"}


def test_a_unigram_grows_at_its_end(tmp_path: Path) -> None:
    def unigram(words: Sequence[str]) -> Tokenizer:
        return Tokenizer(models.Unigram([("<unk>", 0.0), *((w, -1.0 - i) for i, w in enumerate(words))], 0, False))

    base = _model(tmp_path / "base", unigram(["a", "b"]), seed=0)
    a = _model(tmp_path / "a", unigram(["b", "c", "a"]), seed=1, near=base)
    merged, tokens = _merge(_arithmetic(base, a, tokenizer_source="union"), tmp_path / "out")
    assert tokens == {"<unk>": 0, "a": 1, "b": 2, "c": 3}
    assert torch.equal(merged[3], _rows(a)[0][2])


def test_tokens_without_rows_are_left_out(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", _tokenizer(WORDS, ["<lost>"]), seed=0, rows=10)
    a = _model(tmp_path / "a", _tokenizer(WORDS, ["<a>"]), seed=1, near=base)
    merged, tokens = _merge(_arithmetic(base, a, tokenizer_source="union"), tmp_path / "out")
    assert "<lost>" not in tokens
    assert tokens["<a>"] == 10
    assert torch.equal(merged[10], _rows(a)[0][10])


def test_a_source_without_a_tokenizer_is_taken_for_the_bases(tmp_path: Path) -> None:
    base = _model(tmp_path / "base", _tokenizer(WORDS), seed=0)
    a = _model(tmp_path / "a", None, seed=1, rows=10, near=base)
    plan = merger.plan(_arithmetic(base, a, tokenizer_source="union"))
    assert ([w.code for w in plan.warnings], plan.problems) == (["no-tokenizer"], ())
    b = _model(tmp_path / "b", None, seed=1, rows=12, near=base)
    assert [p.code for p in merger.plan(_arithmetic(base, b, tokenizer_source="union")).problems] == ["no-tokenizer"]


@pytest.mark.parametrize("asked", ["chatml", "auto", "{{ messages[0]['content'] }}!"])
def test_a_chat_template_is_written_once(asked: str, tmp_path: Path) -> None:
    a = _model(tmp_path / "a", _tokenizer(WORDS), seed=0)
    b = _model(tmp_path / "b", _tokenizer(WORDS), seed=1, near=a)
    for folder in (a, b):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": f"old of {folder.name}" + " " * 30}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (b / "chat_template.jinja").write_text("auto's choice: {{ messages }}")
    c = _model(tmp_path / "c", _tokenizer(WORDS), seed=2, near=a)
    (c / "chat_template.jinja").write_text("auto's choice: {{ messages }}")
    merger.merge(_linear(a, b, c, base=a, chat_template=asked), tmp_path / "out")
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert {"chatml": "<|im_start|>", "auto": "auto's choice"}.get(asked, asked) in template
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_an_unknown_template_is_refused(tmp_path: Path) -> None:
    a = _model(tmp_path / "a", _tokenizer(WORDS), seed=0)
    b = _model(tmp_path / "b", _tokenizer(WORDS), seed=1, near=a)
    plan = merger.plan(_linear(a, b, chat_template="chatmll"))
    assert "no-chat-template" in {p.code for p in plan.problems}
