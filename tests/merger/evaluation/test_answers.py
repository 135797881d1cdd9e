"""`compare --data` and `tune`: scores are those of the library's own models, choices are right where one is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import merger
from jobs.cli import main
from merger.errors import ManifestError, RaymergeError, RefusedError, SourceError
from merger.evaluation.answers import compare_answers
from merger.evaluation.items import Item, load_items, parse_items, tokens_of
from merger.evaluation.scores import Score, difference, summary_of
from merger.evaluation.tune import parse_over, to_try, tune
from tests.merger.evaluation.asked import base, loaded, lora, taught, tokenizer, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("asked")
    lora(made / "one", base(made / "base"), 1)
    lora(made / "two", made / "base", 2)
    return made


def texts(folder: Path) -> list[dict[str, Any]]:
    return [{"text": row["text"], "task": f"t{i % 2}"} for i, row in enumerate(taught(loaded(folder / "base"), 6))]


def test_scores_are_those_of_the_library(folder: Path) -> None:
    """NLL is its loss, KL and agreement are of its logits; adapters are those that PEFT puts on."""
    items = parse_items("".join(json.dumps(row) + "\n" for row in texts(folder)), "x.jsonl")
    found = compare_answers([str(folder / n) for n in ("base", "one", "two")], items, "x", base=str(folder / "base"))
    models = [loaded(folder / "base"), loaded(folder / "base", folder / "one"), loaded(folder / "base", folder / "two")]
    ids = [torch.tensor([tokenizer()(item.text).input_ids]) for item in items]
    with torch.inference_mode():
        logits = [[model(input_ids=i).logits[0, :-1].double() for i in ids] for model in models]
    for output, own in zip(found.outputs, logits, strict=True):
        logs = [x.log_softmax(-1) for x in own]
        firsts = [x.log_softmax(-1) for x in logits[0]]
        nll = [-float(log[torch.arange(len(log)), i[0, 1:]].sum()) for log, i in zip(logs, ids, strict=True)]
        count = sum(len(log) for log in logs)
        assert output.summary.nll == pytest.approx(sum(nll) / count, abs=1e-4)
        assert [score.nll for score in output.scores] == pytest.approx(nll, abs=1e-3)
        assert output.summary.exact is None
        if output is not found.outputs[0]:
            kl = sum(float((f.exp() * (f - log)).sum()) for f, log in zip(firsts, logs, strict=True)) / count
            same = sum(int((f.argmax(-1) == log.argmax(-1)).sum()) for f, log in zip(firsts, logs, strict=True))
            assert output.summary.kl == pytest.approx(kl, abs=1e-4)
            assert output.summary.kl
            assert output.summary.kl > 0.01
            assert output.summary.agreement == same / count
            assert output.nll is not None
            assert output.nll.low <= output.nll.value <= output.nll.high
        assert set(output.tasks) == {"t0", "t1"}
    assert found.one_vocabulary


def answers(folder: Path, adapter: str, count: int, *, chat: bool = False) -> list[dict[str, Any]]:
    """What base and adapter answer greedily, written as items."""
    made = []
    for row in taught(loaded(folder / "base", folder / adapter), count):
        answer = row["text"].removeprefix(row["prompt"])
        made.append({"prompt": row["prompt"], "answer": answer} if not chat else {"messages": [
            {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer.strip()}]})  # fmt: skip
    return made


def test_right_is_what_greedy_decoding_gives(folder: Path, tmp_path: Path) -> None:
    """Its own answers, one of another model, and its own with an end that it has not learnt."""
    own = answers(folder, "one", 8)
    rows = [*own, *answers(folder, "two", 4), *({**row, "end": True} for row in own)]
    items = load_items(str(write(tmp_path / "a.jsonl", rows)))
    (found,) = compare_answers([str(folder / "one")], items, "x", base=str(folder / "base")).outputs
    assert [score.right for score in found.scores] == [True] * 8 + [False] * 12
    assert found.summary.exact == 8 / 20


def test_the_tuned_lambda_is_the_one_that_answers_were_made_with(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"]} for row in taught(loaded(folder / "base", folder / "one", 0.5), 24, length=12)]
    data, other = write(tmp_path / "a.jsonl", rows[:16]), write(tmp_path / "b.jsonl", rows[16:])
    manifest = {
        "merge_method": "task_arithmetic", "base_model": str(folder / "base"),
        "adapters": [{"adapter": str(folder / "one")}], "output": {"kind": "adapter"},
    }  # fmt: skip
    over = {"parameters.lambda": [0.25, 0.5, 0.75, 1.5]}
    found = tune(manifest, load_items(str(data)), "a", over=over, check=load_items(str(other)))
    assert found.best.chosen == {"parameters.lambda": 0.5}
    assert [trial.chosen for trial in found.trials] == [
        {},
        *({"parameters.lambda": x} for x in over["parameters.lambda"]),
    ]
    assert found.best.overrides == ["parameters.lambda=0.5"]
    before, after = found.checked
    assert after.summary.nll < before.summary.nll
    far = found.trials[-1].scored
    assert far.nll is not None
    assert far.nll.low > 0
    (best,) = (trial for trial in found.trials if trial is found.best)
    assert best.scored.nll is None
    # The same merge from files says the same.
    merger.merge(manifest, tmp_path / "out", overrides=found.best.overrides)
    (again,) = compare_answers([str(tmp_path / "out")], load_items(str(data)), "a", base=str(folder / "base")).outputs
    assert again.summary.nll == best.scored.summary.nll
    assert any("--set parameters.lambda=0.5" in line for line in found.lines())
    assert any(line.startswith("on other items: as written") for line in found.lines())


def test_what_is_merged_is_what_is_said(folder: Path, tmp_path: Path) -> None:
    """Overrides hold for every trial, also where nothing is said to try, and are in the command; quantised outputs are
    asked as what they hold; what cannot be is refused before the first trial."""
    path = tmp_path / "my merge.yaml"
    path.write_text(json.dumps({
        "merge_method": "linear", "base_model": str(folder / "base"), "output": {"kind": "model"},
        "adapters": [{"adapter": str(folder / "one")}],
    }))  # fmt: skip
    items = load_items(str(write(tmp_path / "a.jsonl", texts(folder))))
    given = ["merge_method=task_arithmetic", "output.quantization=int8"]
    found = tune(str(path), items, "a", overrides=given, over={"parameters.lambda": [0.0, 1.0]})
    assert found.trials[1].scored.summary.nll != found.trials[2].scored.summary.nll
    assert found.command[:3] == ["raymerge", "merge", str(path)]
    assert [word for word in found.command[3:] if word != "--set"][:2] == given
    assert len(tune(str(path), items, "a", overrides=given[:1]).trials) == 9
    told: list[str] = []
    with pytest.raises(RefusedError):
        tune(str(path), items, "a", over={"merge_method": ["task_arithmetic", "nothing"]}, told=told.append)
    assert not told


def test_a_document_with_a_place_of_its_own_is_refused(folder: Path, tmp_path: Path) -> None:
    one = {
        "name": "first", "merge_method": "task_arithmetic", "base_model": str(folder / "base"),
        "adapters": [{"adapter": str(folder / "one")}], "output": {"kind": "model", "path": str(tmp_path / "kept")},
    }  # fmt: skip
    two = {"merge_method": "linear", "models": [{"model": "first", "parameters": {"weight": 1.0}}]}
    path = tmp_path / "merge.yaml"
    path.write_text("---\n".join(json.dumps(document) + "\n" for document in (one, two)))
    items = parse_items('{"text": "w1 w2 w3"}', "a.jsonl")
    with pytest.raises(ManifestError, match="place of its own"):
        tune(str(path), items, "a", over={"models[0].parameters.weight": [0.5]})
    assert not (tmp_path / "kept").exists()


def test_models_are_tuned_too_and_nothing_is_left_in_memory(folder: Path, tmp_path: Path) -> None:
    from merger.storage.memory import _PLACES

    for name in ("one", "two"):
        merger.fold(folder / name, tmp_path / name, base=folder / "base")
    manifest = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / n), "parameters": {"weight": 1.0}} for n in ("one", "two")],
    }  # fmt: skip
    held = {name for name, files in _PLACES.items() if files}
    rows = [{"text": row["text"]} for row in taught(loaded(tmp_path / "two"), 12, length=12)]
    items = load_items(str(write(tmp_path / "a.jsonl", rows)))
    found = tune(manifest, items, "a", over={"models[0].parameters.weight": [0.0, 3.0]})
    assert found.best.chosen == {"models[0].parameters.weight": 0.0}
    assert {name for name, files in _PLACES.items() if files} == held


def test_what_is_tried_where_nothing_is_said() -> None:
    manifest = {"merge_method": "ties", "adapters": [{"adapter": "org/a"}]}
    assert [t.get("parameters.lambda") for t in to_try(manifest, {})][:3] == [None, 0.3, 0.4]
    assert len(to_try(manifest, {"a": [1, 2], "b": [3, 4, 5]})) == 1 + 6
    with pytest.raises(ManifestError, match="not said what to try"):
        to_try({"merge_method": "passthrough", "models": [{"model": "org/a"}]}, {})


@pytest.mark.parametrize("text", ["lambda", "=[1]", "a=1", "a=[]", "a=[1", "a={}"])
def test_values_to_try_are_a_list(text: str) -> None:
    with pytest.raises(ManifestError, match="cannot be used"):
        parse_over([text])


def test_a_key_is_tried_once() -> None:
    assert parse_over(["a.b=[1, 2]", "c=[x]"]) == {"a.b": [1, 2], "c": ["x"]}
    with pytest.raises(ManifestError, match="cannot be used"):
        parse_over(["a=[1]", "a=[2]"])


# ---- items -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, why",
    [
        ("{", "delimiter|property"), ("[]", "no object"), ("{}", "its keys are none"), ('{"answer": "x"}', "answer"),
        ('{"prompt": "x", "answer": ""}', "nothing to score"), ('{"text": 3}', "strings"), ('{"text": ""}', "nothing"),
        ('{"text": "a", "prompt": "b"}', "its keys"), ('{"text": "a", "task": 3}', "its keys"),
        ('{"messages": []}', "two or more"), ('{"messages": [{"role": "user"}, {}]}', "two or more"),
        ('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}', "assistant's"),
    ],
)  # fmt: skip
def test_lines_that_are_no_items_are_named(line: str, why: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_items('{"text": "fine"}\n\n' + line + "\n", "data.jsonl")
    (problem,) = caught.value.problems
    assert problem.code == "bad-data"
    assert problem.where == "data.jsonl:3"
    assert re.search(why, problem.why)


def test_lines_end_where_json_s_do_and_other_formats_are_no_text() -> None:
    assert [item.text for item in parse_items('{"text": "a\u2028b\x85c"}\r\n{"text": "d"}', "a.jsonl")] == [
        "a\u2028b\x85c",
        "d",
    ]
    for name in ("a.json", "a.csv", "b.parquet"):
        with pytest.raises(ManifestError, match="not read from"):
            parse_items("[]", name)


def test_a_text_is_its_paragraphs() -> None:
    assert [item.text for item in parse_items("one\ntwo\n\n \nthree\n", "a.txt")] == ["one\ntwo", "three"]
    with pytest.raises(ManifestError, match="nothing to ask"):
        parse_items("\n\n", "a.txt")


def test_messages_are_scored_as_the_template_writes_them() -> None:
    tokens = tokenizer()
    item = parse_items(
        '{"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]}', "a.jsonl"
    )[0]
    found = tokens_of(item, tokens, limit=None)
    assert tokens.decode(found.ids) == "user w1 w2 </s> assistant w3 </s>"
    assert tokens.decode(found.ids[found.first :]) == "w3 </s>"
    with pytest.raises(SourceError, match="no chat template"):
        tokens_of(item, tokenizer(None), limit=None)


def test_items_beyond_what_a_model_takes() -> None:
    tokens = tokenizer()
    assert len(tokens_of(Item("a", text="w1 w2 w3 w4"), tokens, limit=3).ids) == 3
    with pytest.raises(SourceError, match="4 tokens"):
        tokens_of(Item("a", prompt="w1 w2", answer=" w3 w4"), tokens, limit=3)
    assert len(tokens_of(Item("a", prompt="w1 w2", answer=" w3"), tokens, limit=3, text_limit=2).ids) == 3
    cut = tokens_of(Item("a", text="w1 w2 w3 w4"), tokens, limit=None, text_limit=2)
    assert (len(cut.ids), cut.cut, cut.size) == (2, True, 2)
    with pytest.raises(SourceError, match="no token to score"):
        tokens_of(Item("a", text="w1"), tokens, limit=3)


def pieces(*, begins: bool = False, ends: bool = False) -> Any:
    """A tokenizer that writes a space before a word into the word, as those of Llama 2 do, with what it adds."""
    from tokenizers import Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(("<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁b", ">", "▁>"))}
    inner = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b"), ("▁", ">")], unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    around = ("<s> " if begins else "") + "$A" + (" </s>" if ends else "")
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("prompt, answer", [("a >", " b"), ("a > ", "b")])
def test_an_answer_is_read_as_it_stands_behind_its_prompt(begins: bool, ends: bool, prompt: str, answer: str) -> None:
    """Read apart it would begin with a space of its own; what a tokenizer adds to a text is before it or nowhere."""
    tokens = pieces(begins=begins, ends=ends)
    found = tokens_of(Item("a", prompt=prompt, answer=answer), tokens, limit=None)
    assert tokens.convert_ids_to_tokens(found.ids) == [*(["<s>"] if begins else []), "▁a", "▁>", "▁b"]
    assert tokens.convert_ids_to_tokens(found.ids[found.first :]) == ["▁b"]
    closed = tokens_of(Item("a", prompt=prompt, answer=answer, ends=True), tokens, limit=None)
    assert tokens.convert_ids_to_tokens(closed.ids[closed.first :]) == ["▁b", "</s>"]


def test_bytes_are_those_of_what_is_scored(folder: Path, tmp_path: Path) -> None:
    """Two models that differ in nothing but how much they take have the same score a byte, nearly."""
    import shutil

    shutil.copytree(folder / "base", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    rows = [{"text": row["text"]} for row in taught(loaded(folder / "base"), 12, words=20, length=8)]
    items = load_items(str(write(tmp_path / "a.jsonl", rows)))
    found = compare_answers([str(folder / "base"), str(tmp_path / "short")], items, "x")
    long, short = found.outputs
    assert (long.summary.cut, short.summary.cut) == (0, 12)
    assert short.as_json()["cut"] == 12
    assert not found.one_vocabulary
    assert short.summary.nll_per_byte == pytest.approx(long.summary.nll_per_byte, rel=0.5)
    assert short.nll is not None
    assert short.nll.value == pytest.approx(short.summary.nll_per_byte - long.summary.nll_per_byte)
    assert "of 12 text(s) only the beginning was asked" in found.lines()


def test_a_model_that_answers_nothing_is_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    merger.fold(folder / "one", tmp_path / "broken", base=folder / "base")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= float("nan")
    save_file(tensors, file, {"format": "pt"})
    items = parse_items('{"text": "w1 w2 w3"}', "a.jsonl")
    with pytest.raises(RaymergeError) as caught:
        compare_answers([str(folder / "base"), str(tmp_path / "broken")], items, "x")
    assert caught.value.problems[0].code == "not-finite"


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_a_paired_interval_covers_its_difference_about_19_times_in_20() -> None:
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        level = draw.normal(size=40)
        a = [Score(float(x + e), 1, None) for x, e in zip(level, draw.normal(size=40), strict=True)]
        b = [Score(float(x + 0.3), 1, None) for x in level]
        found = difference(b, a)
        assert found is not None
        covered += found.low <= 0.3 <= found.high
    assert 176 <= covered <= 198


def test_differences_that_tell_nothing() -> None:
    one = [Score(1.0, 2, True)]
    assert difference(one, one) is None
    assert difference([Score(1.0, 1, None)] * 3, [Score(1.0, 1, None)] * 3, "exact") is None
    equal = difference([Score(1.0, 1, True)] * 3, [Score(1.0, 1, True)] * 3, "exact")
    assert equal is not None
    assert (equal.low, equal.value, equal.high) == (0, 0, 0)
    assert summary_of([Score(1.0, 2, True, 4)]).nll_per_byte == 0.25


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write(tmp_path / "a.jsonl", answers(folder, "one", 4, chat=True)))
    one, two, on = (str(folder / name) for name in ("one", "two", "base"))
    assert main(["compare", on, one, two, "--base", on, "--data", data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [output["output"] for output in found["outputs"]] == [on, one, two]
    assert main(["compare", on, one, "--base", on, "--data", data]) == 0
    assert "4 items of" in capsys.readouterr().out
    manifest = tmp_path / "merge.yaml"
    manifest.write_text(json.dumps({
        "merge_method": "ties", "base_model": on, "adapters": [{"adapter": one}, {"adapter": two}],
        "parameters": {"density": 0.5}, "output": {"kind": "adapter"},
    }))  # fmt: skip
    over = ["--over", "parameters.lambda=[0.5, 1.0]", "--over", "parameters.density=[0.5, 0.9]"]
    assert main(["tune", str(manifest), "--data", data, *over, "--by", "exact", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["trials"]) == 5
    assert found["best"]["set"] in [trial["set"] for trial in found["trials"]]
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "merge.yaml"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "ONE"], ["compare", "ONE", "ONE"], ["compare", "ONE", "BASE"], ["tune", "MANIFEST"],
        ["compare", "BASE", "--data", "NOWHERE"], ["compare", "BASE", "--data", "DATA", "--device", "tpu"],
        ["tune", "MANIFEST", "--data", "TEXT", "--by", "exact"], ["tune", "MANIFEST", "--data", "DATA", "--over", "x"],
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_exit_2(
    folder: Path, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3\n\nw4 w5")
    manifest = {"merge_method": "ties", "base_model": str(folder / "base"), "parameters": {"density": 0.5},
                "adapters": [{"adapter": str(folder / "one")}], "output": {"kind": "adapter"}}  # fmt: skip
    (tmp_path / "merge.yaml").write_text(json.dumps(manifest))
    places = {
        "ONE": folder / "one", "BASE": folder / "base", "NOWHERE": tmp_path / "no.jsonl", "TEXT": tmp_path / "text.txt",
        "MANIFEST": tmp_path / "merge.yaml", "DATA": tmp_path / "text.txt",
    }  # fmt: skip
    assert main([str(places.get(a, a)) for a in arguments]) == 2
    told = capsys.readouterr().err
    assert all(part in told for part in ("error ", "where", "why", "fix"))
