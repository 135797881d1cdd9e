"""Adapters with vocabularies of their own: rows follow tokens, in adapters and in models, and load as they stand.

What a source's rows are is what PEFT's own model says, unmerged; what they become is reckoned in float64.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor

import merger
from merger.errors import MergeFailedError
from merger.verify import verify_output
from tests import reference

if TYPE_CHECKING:
    from tests.merger.adapters.conftest import Workshop

WORDS = 160
WIDTH = 48
TARGETS = ["q_proj", "up_proj"]
TOLERANCE = 2e-6
"""Of rows of about 1."""


def tokenizer(added: Sequence[str], words: Sequence[str] | None = None) -> Tokenizer:
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words or plain_words())}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return made


def plain_words() -> list[str]:
    return [f"w{i}" for i in range(WORDS)]


@dataclass
class Trained:
    """An adapter on disk, and what PEFT's model of it says."""

    path: Path
    tokens: dict[str, int]
    embeddings: Tensor
    head: Tensor


def effective(model: Any) -> tuple[Tensor, Tensor]:
    """The embeddings and the head of a model as it uses them, whatever adapters do to them."""
    inner: Any = model.base_model.model if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        rows = inner.lm_head(torch.eye(WIDTH)).T
        return inner.model.embed_tokens(torch.arange(len(rows))).double(), rows.double()


def base_of(workshop: Workshop, kind: str, tmp_path: Path) -> Path:
    """A base with a tokenizer beside it."""
    base = tmp_path / kind
    workshop.model(workshop.base(kind)).save_pretrained(str(base))
    tokenizer([]).save(str(base / "tokenizer.json"))
    return base


def trained(
    workshop: Workshop, base: Path, path: Path, added: Sequence[str], seed: int, *, rows: int | None = None,
    moves: bool = False, **options: Any,
) -> Trained:  # fmt: skip
    """An adapter of a resized model, saved by PEFT. `moves` trains the embeddings themselves."""
    model, words = workshop.model(base), tokenizer(added)
    if added:
        model.resize_token_embeddings(rows or words.get_vocab_size(), mean_resizing=False)
    wrapped: Any = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=6, **{"target_modules": TARGETS, **options})
    )
    workshop.move(wrapped, seed)
    if moves:
        generator = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for layer in {id(m.weight): m for m in (model.get_input_embeddings(), model.lm_head)}.values():
                layer.weight.add_(0.05 * torch.randn(layer.weight.shape, generator=generator))
    wrapped.save_pretrained(str(path))
    if added:
        words.save(str(path / "tokenizer.json"))
    return Trained(path, words.get_vocab(), *effective(wrapped.eval()))


def expected(base: Tensor, sources: Sequence[Trained], rows: Sequence[Tensor], tokens: dict[str, int]) -> Tensor:
    """Base rows plus what each source changed of them; other tokens' rows are the mean of their owners'."""
    found = torch.zeros(max(tokens.values()) + 1, WIDTH, dtype=torch.float64)
    for token, number in tokens.items():
        own = [
            matrix[source.tokens[token]] for source, matrix in zip(sources, rows, strict=True) if token in source.tokens
        ]
        if token in plain_words():
            first = base[int(token[1:])]
            found[number] = first + sum(row - first for row in own)
        else:
            found[number] = torch.stack(own).mean(0)
    return found


BOTH = ["embed_tokens", "lm_head"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "resized": ("llama", {"moves": True}, {"moves": True}),
    "resized, tied": ("llama-tied", {"moves": True}, {"moves": True}),
    "modules_to_save": ("llama", {"modules_to_save": BOTH}, {"modules_to_save": BOTH}),
    "modules_to_save, tied": ("llama-tied", {"modules_to_save": BOTH}, {"modules_to_save": BOTH}),
    "embeddings alone, tied": ("llama-tied", {"modules_to_save": BOTH[:1]}, {"moves": True}),
    "LoRA on both": ("llama", {"target_modules": [*TARGETS, *BOTH]}, {"moves": True}),
    "LoRA on the head, tied": ("llama-tied", {"target_modules": [*TARGETS, "lm_head"]}, {"moves": True}),
    "trained rows": ("llama", {"trainable_token_indices": [3, 160, 161]}, {"moves": True}),
    "trained rows, tied": (
        "llama-tied", {"trainable_token_indices": [3, 160, 161]}, {"trainable_token_indices": [161, 7, 3, 160]},
    ),
}  # fmt: skip
QUICK = ("resized", "LoRA on both", "trained rows, tied")


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
@pytest.mark.filterwarnings("ignore")
def test_rows_follow_their_tokens(workshop: Workshop, case: str, kind: str, tmp_path: Path) -> None:
    which, first, second = CASES[case]
    base = base_of(workshop, which, tmp_path)
    sources = [
        trained(workshop, base, tmp_path / "a", ["<a>", "<both>"], 1, **first),
        trained(workshop, base, tmp_path / "b", ["<both>", "<b>", "<b2>"], 2, **second),
    ]
    manifest = {
        "merge_method": "task_arithmetic", "base_model": str(base), "tokenizer_source": "union",
        "adapters": [{"adapter": str(source.path)} for source in sources], "output": {"kind": kind},
    }  # fmt: skip
    out = workshop.merge(manifest, tmp_path / "out")
    tokens = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
    assert len(tokens) == WORDS + 4
    if kind == "model":
        model = workshop.model(out)
        assert model.config.vocab_size == WORDS + 4
    else:
        model = workshop.model(base)
        model.resize_token_embeddings(WORDS + 4)
        model = peft.PeftModel.from_pretrained(model, str(out)).eval()
    embeddings, head = effective(model)
    base_embeddings, base_head = effective(workshop.model(base))
    torch.testing.assert_close(
        embeddings, expected(base_embeddings, sources, [s.embeddings for s in sources], tokens), rtol=0, atol=TOLERANCE
    )
    torch.testing.assert_close(
        head, expected(base_head, sources, [s.head for s in sources], tokens), rtol=0, atol=TOLERANCE
    )
    tied = torch.equal(embeddings, head)
    assert tied == (which == "llama-tied" and case in ("resized, tied", "trained rows, tied"))
    if kind == "model":
        assert model.config.tie_word_embeddings is tied


@pytest.fixture
def pair(workshop: Workshop, tmp_path: Path) -> tuple[Path, Trained, Trained]:
    """A base, and two adapters of it that call row 160 by different names."""
    base = base_of(workshop, "llama", tmp_path)
    one = trained(workshop, base, tmp_path / "a", ["<a>", "<both>"], 1, moves=True)
    return base, one, trained(workshop, base, tmp_path / "b", ["<both>", "<b>"], 2, moves=True)


def manifest_of(base: Path, *adapters: Path, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "task_arithmetic", "base_model": str(base),
        "adapters": [{"adapter": str(adapter), "name": adapter.name} for adapter in adapters], **more,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_is_folded_is_the_merge_into_a_model(
    workshop: Workshop, pair: tuple[Path, Trained, Trained], tmp_path: Path
) -> None:
    base, one, other = pair
    manifest = manifest_of(base, one.path, other.path, tokenizer={"source": "union", "pad_to_multiple_of": 8})
    merged = workshop.merge(manifest, tmp_path / "adapter")
    folded = workshop.fold(base, [merged], tmp_path / "folded")
    model = workshop.merge(manifest | {"output": {"kind": "model"}}, tmp_path / "model")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folded, model))
    assert ours["model.embed_tokens.weight"].shape == (168, WIDTH)
    for name in ours.keys() | theirs.keys():
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    assert (folded / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert "resize_token_embeddings(168)" in (merged / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_special_token_trap_is_named(pair: tuple[Path, Trained, Trained], tmp_path: Path) -> None:
    """Without tokenizer_source a row is merged by its index, and row 160 is <a> of one and <both> of the other."""
    base, one, other = pair
    silent = merger.plan(manifest_of(base, one.path, other.path))
    assert {p.code for p in silent.problems} == {"modules-to-save"}
    assert all("tokenizer_source: union" in p.fix for p in silent.problems)
    for kind in ("adapter", "model"):
        output = {"kind": kind, "modules_to_save": "average"}
        mixed = merger.plan(manifest_of(base, one.path, other.path, output=output))
        assert {p.code for p in mixed.problems} == {"vocabularies-differ"}
        assert "160: '<a>' / '<both>'" in mixed.problems[0].where
        assert "average row by row" in mixed.problems[0].what or "averaged row by row" in mixed.problems[0].what
        chosen = merger.plan(
            manifest_of(base, one.path, other.path, output=output | {"modules_to_save": {"from": "b"}})
        )
        assert not chosen.problems
        assert "vocabularies-differ" in {w.code for w in chosen.warnings}


@pytest.mark.filterwarnings("ignore")
def test_rows_that_an_entry_leaves_out_are_the_base_s(pair: tuple[Path, Trained, Trained], tmp_path: Path) -> None:
    """The same adapter twice, once without its embeddings and head: a source of the base's vocabulary."""
    base, one, _ = pair
    whole, part = {"adapter": str(one.path)}, {"adapter": str(one.path), "exclude": BOTH}
    manifest = {"merge_method": "linear", "base_model": str(base), "tokenizer_source": "union"}
    merger.merge(manifest | {"adapters": [part, whole]}, tmp_path / "out", workers=1)
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.lm_head.weight"].double()
    below = load_file(base / "model.safetensors")["lm_head.weight"].double()
    torch.testing.assert_close(ours[:WORDS], (below + one.head[:WORDS]) / 2, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(ours[WORDS:], one.head[WORDS:], rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore")
def test_what_is_chosen_brings_its_tokenizer(
    workshop: Workshop, pair: tuple[Path, Trained, Trained], tmp_path: Path
) -> None:
    base, one, other = pair
    out = workshop.merge(
        manifest_of(base, one.path, other.path, output={"kind": "adapter", "modules_to_save": {"from": "b"}}),
        tmp_path / "out",
    )
    assert (out / "tokenizer.json").read_bytes() == (other.path / "tokenizer.json").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_without_a_tokenizer_has_the_base_s_or_is_refused(
    workshop: Workshop, pair: tuple[Path, Trained, Trained], tmp_path: Path
) -> None:
    base, one, other = pair
    (other.path / "tokenizer.json").unlink()
    asked = manifest_of(base, one.path, other.path, tokenizer_source="union")
    refused = merger.plan(asked)
    assert [p.code for p in refused.problems] == ["no-tokenizer"]
    assert "162 rows" in refused.problems[0].what
    (other.path / "added_tokens.json").write_text(json.dumps({"<both>": 160, "<b>": 161}))
    out = workshop.merge(asked, tmp_path / "grown")
    tokens = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
    rows = load_file(out / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"].double()
    torch.testing.assert_close(rows[tokens["<b>"]], other.embeddings[161])
    torch.testing.assert_close(rows[tokens["<both>"]], (one.embeddings[161] + other.embeddings[160]) / 2)
    plain = trained(workshop, base, tmp_path / "plain", [], 3, modules_to_save=BOTH)
    out = workshop.merge(manifest_of(base, one.path, plain.path, tokenizer_source="union"), tmp_path / "out")
    rows = load_file(out / "adapter_model.safetensors")["base_model.model.lm_head.weight"].double()
    head = effective(workshop.model(base))[1]
    torch.testing.assert_close(rows[:WORDS], one.head[:WORDS] + plain.head - head, rtol=0, atol=TOLERANCE)
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head", "model.embed_tokens"]


@pytest.mark.filterwarnings("ignore")
def test_permuted_rows_and_the_vocabulary_of_a_named_adapter(
    workshop: Workshop, pair: tuple[Path, Trained, Trained], tmp_path: Path
) -> None:
    """One adapter's tokenizer has the base's words in another order."""
    base, one, other = pair
    order = torch.randperm(WORDS, generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer(["<both>", "<b>"], [f"w{i}" for i in order]).save(str(other.path / "tokenizer.json"))
    path = other.path / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held = tensors[f"base_model.model.{name}"]
        tensors[f"base_model.model.{name}"] = torch.cat([held[:WORDS][order], held[WORDS:]])
    save_file(tensors, path)
    for source, first in (("base", "w0"), (str(other.path), f"w{order[0]}")):
        out = workshop.merge(
            manifest_of(base, one.path, other.path, tokenizer_source=source), tmp_path / f"out-{source.count('/')}"
        )
        tokens = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab()
        assert tokens[first] == 0
        rows = load_file(out / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"].double()
        below = effective(workshop.model(base))[0]
        wanted = torch.stack([
            one.embeddings[i] + other.embeddings[i] - below[i] for i in (int(t[1:]) for t in sorted(
                (t for t in tokens if t.startswith("w")), key=lambda t: tokens[t]))
        ])  # fmt: skip
        torch.testing.assert_close(rows[:WORDS], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore")
def test_what_looks_at_whole_rows_does_not_move(
    workshop: Workshop, pair: tuple[Path, Trained, Trained], tmp_path: Path
) -> None:
    base, one, _ = pair
    other = trained(workshop, base, tmp_path / "dora", [], 3, target_modules=["embed_tokens"], use_dora=True)
    plan = merger.plan(manifest_of(base, one.path, other.path, tokenizer_source="union"))
    assert [p.code for p in plan.problems] == ["not-movable"]
    (one.path / "tokenizer.json").unlink()
    head = load_file(one.path / "adapter_model.safetensors")
    head["base_model.model.lm_head.weight"] = head["base_model.model.lm_head.weight"][:WORDS].clone()
    save_file(head, one.path / "adapter_model.safetensors")
    assert [p.code for p in merger.plan(manifest_of(base, one.path, tokenizer_source="union")).problems] == [
        "rows-differ"
    ]


@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.filterwarnings("ignore")
def test_a_copy_that_lora_on_embeddings_brings_along_is_no_change(
    workshop: Workshop, kind: str, tmp_path: Path
) -> None:
    """PEFT's save_embedding_layers="auto" saves what LoRA targets, and the other layer beside it."""
    base = base_of(workshop, "llama", tmp_path)
    sources = [
        trained(workshop, base, tmp_path / name, [], seed, target_modules=[*TARGETS, layer])
        for seed, (name, layer) in enumerate((("a", "embed_tokens"), ("b", "lm_head")), 1)
    ]
    manifest = manifest_of(base, *(source.path for source in sources), output={"kind": kind})
    out = workshop.merge(manifest, tmp_path / "out")
    if kind == "adapter":
        held = load_file(out / "adapter_model.safetensors")
        assert not [name for name in held if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    model = workshop.model(out) if kind == "model" else workshop.loaded(base, out)
    for got, wanted in zip(effective(model), (sources[0].embeddings, sources[1].head), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
    path = sources[1].path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.base_layer.weight"][5, 5] += 0.5
    save_file(tensors, path)
    with pytest.raises(MergeFailedError, match=r"no copy of lm_head\.weight"):
        workshop.merge(manifest, tmp_path / "bad")
    assert not (tmp_path / "bad" / "raymerge.json").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_that_is_not_its_embeddings_ends_the_merge(workshop: Workshop, tmp_path: Path) -> None:
    base = base_of(workshop, "llama-tied", tmp_path)
    source = trained(workshop, base, tmp_path / "a", ["<a>"], 1, moves=True)
    path = source.path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"][5, 5] += 0.5
    save_file(tensors, path)
    with pytest.raises(MergeFailedError, match=r"no copy of model\.embed_tokens\.weight"):
        workshop.merge(manifest_of(base, source.path, tokenizer_source="union"), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "model"])
@pytest.mark.filterwarnings("ignore")
def test_bytes_do_not_follow_from_memory_or_workers(
    workshop: Workshop, pair: tuple[Path, Trained, Trained], kind: str, tmp_path: Path
) -> None:
    base, one, other = pair
    lora = trained(workshop, base, tmp_path / "c", ["<c>"], 3, target_modules=[*TARGETS, *BOTH])
    manifest = manifest_of(
        base, one.path, other.path, lora.path, tokenizer_source="union", parameters={"density": 0.3},
        output={"kind": kind, "store": {"svd": {"rank": 4}}} if kind == "adapter" else {"kind": kind},
    ) | {"merge_method": "dare_ties"}  # fmt: skip
    digests = {
        merger.merge(manifest, tmp_path / f"out{i}", workers=workers, memory=memory).content_digest
        for i, (workers, memory) in enumerate([(1, 12 << 20), (2, 64 << 20), (3, 1 << 30)])
    }
    assert len(digests) == 1
    assert verify_output(str(tmp_path / "out0"), replay=None).extents


@pytest.mark.parametrize("kind", ["ties", pytest.param("cat", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_peft_types_take_rows_as_their_deltas(pair: tuple[Path, Trained, Trained], kind: str, tmp_path: Path) -> None:
    """The guide's form: what PEFT's type does with deltas, on what each adapter changed in the base's rows."""
    base, one, other = pair
    options: dict[str, Any] = {"density": 0.4} if kind == "ties" else {}
    merger.merge(
        {
            "combination_type": kind, "base_model": str(base), "tokenizer_source": "union", "weights": [2.0, -0.5],
            "adapters": [{"adapter": str(source.path)} for source in (one, other)], **options,
        },
        tmp_path / "out", workers=1,
    )  # fmt: skip
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.lm_head.weight"].numpy()
    below = load_file(base / "model.safetensors")["lm_head.weight"].numpy()
    rows = np.concatenate([below, np.zeros((3, WIDTH), np.float32)])
    sources = [source.head.numpy().astype(np.float32) for source in (one, other)]
    deltas = [np.concatenate([reference.delta(s[:WORDS], below), np.zeros((3, WIDTH))]) for s in sources]
    if kind == "ties":
        wanted = reference.ties(rows, deltas, (2.0, -0.5), (0.4, 0.4), elect="unweighted", divisor="count")
    else:
        wanted = reference.task_arithmetic(rows, deltas, (2.0, -0.5))
    np.testing.assert_allclose(ours[:WORDS], wanted[:WORDS], rtol=0, atol=TOLERANCE)
