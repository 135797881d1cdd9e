"""Every difference to PEFT and mergekit is told by the merges that it is true of, and by no others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import merger
from merger import api
from merger.planning.deviations import DEVIATIONS
from merger.storage import MemoryStore
from tests.conformance.folders import LAYERS, adapter, lora_tensors, model
from tests.conformance.llamas import llama
from tests.merger.planning.test_moe import experts
from tests.strategies import Places, adapters, models, places

Document = Mapping[str, Any]
Case = Callable[[Places, Path], Document]
SENTENCES = {row.code: row.sentence for row in DEVIATIONS}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def place() -> Iterator[Places]:
    with places() as found:
        yield found


def told(document: Document) -> set[str]:
    """Codes of the rows that a merge tells of."""
    plan = api.plan(dict(document), "memory://somewhere")
    assert plan.problems == (), plan.problems
    return {code for code, sentence in SENTENCES.items() if sentence in plan.deviations}


# ---------------------------------------------------------------- sources


def pair(rank: int = 2, rows: int = 6, cols: int = 4) -> tuple[Any, Any]:
    return np.ones((rank, cols), np.float32), np.ones((rows, rank), np.float32)


def lora(place: Places, *modules: str, rank: int = 2, **config: Any) -> str:
    return place.adapter({name: pair(rank) for name in modules or (Q,)}, **config)


def tensors(dtype: torch.dtype = torch.float32, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{Q}.weight": torch.ones(6, 4, dtype=dtype), "model.norm.weight": torch.ones(4, dtype=dtype), **more}


def of_models(method: str, *, dtype: torch.dtype = torch.float32, count: int = 2, base: bool = True,
              parameters: Mapping[str, object] | None = None, extra: Mapping[str, torch.Tensor] | None = None,
              config: Mapping[str, Any] | None = None, **keys: Any) -> Case:  # fmt: skip
    """A merge of models of one layer."""

    def made(place: Places, folder: Path) -> Document:
        uris = [place.model({**tensors(dtype), **(extra or {})}, **(config or {})) for _ in range(count)]
        own: Mapping[str, object] = parameters if parameters is not None else {"weight": 1.0}
        first = uris[0] if base else None
        return models(method, first, uris[1:] if base else uris, [own] * (count - 1 if base else count), **keys)

    return made


def _named(method: str, dtype: str, stored: torch.dtype) -> Case:
    """Models in one dtype, merged with `dtype` in the manifest."""
    make = of_models(method, dtype=stored, base=method != "linear")
    return lambda place, folder: {**make(place, folder), "dtype": dtype}


def of_adapters(kind: str, configs: tuple[Mapping[str, Any], ...] = ({}, {}), **keys: Any) -> Case:
    """PEFT's combination of adapters."""

    def made(place: Places, folder: Path) -> Document:
        found = [lora(place, *c.get("modules", ()), **{k: v for k, v in c.items() if k != "modules"}) for c in configs]
        return {"combination_type": kind, "adapters": [{"adapter": a} for a in found], "weights": [1.0] * len(found),
                **keys}  # fmt: skip

    return made


def merged(
    method: str,
    *,
    count: int = 2,
    kind: str = "adapter",
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    output: Mapping[str, Any] | None = None,
    **shared: Any,
) -> Case:
    """Adapters by a merge method, into an adapter or a model."""

    def made(place: Places, folder: Path) -> Document:
        found = [lora(place, **(config or {})) for _ in range(count)]
        keys: dict[str, Any] = {"output": {"kind": kind, **(output or {})}}
        if kind == "model":
            keys["base_model"] = place.model(tensors(dtype))
        return adapters(method, found, [{"weight": 1.0}] * count, shared, **keys)

    return made


def real(of: str, **output: Any) -> Case:
    """Two adapters that need the base, in folders as PEFT writes them."""

    def made(place: Places, folder: Path) -> Document:
        root = model(folder / "base", 0, dtype=torch.float32)
        found = [_adapter_of(of, folder / f"{of}-{i}", i) for i in range(2)]
        return {"base_model": str(root), "adapters": [{"adapter": str(a)} for a in found],
                "output": {"kind": "adapter", **output}}  # fmt: skip

    return made


def ranked(combination: str, *ranks: int) -> Case:
    """Two adapters whose modules have several ranks."""

    def made(place: Places, folder: Path) -> Document:
        pairs = {f"model.layers.{i}.self_attn.q_proj": pair(rank) for i, rank in enumerate(ranks)}
        found = [{"adapter": place.adapter(pairs)} for _ in range(2)]
        return {"combination_type": combination, "adapters": found, "weights": [1.0, 1.0]}

    return made


def _adapter_of(kind: str, folder: Path, seed: int) -> Path:
    found = lora_tensors(seed)
    config: dict[str, object] = {}
    if kind == "dora":
        config = {"use_dora": True}
        found |= {f"base_model.model.{name}.lora_magnitude_vector": torch.ones(96) for name in LAYERS}
    if kind == "pissa":
        config = {"init_lora_weights": "pissa"}
    if kind == "bias":
        config = {"bias": "lora_only"}
        found |= {f"base_model.model.{name}.bias": torch.ones(96) for name in LAYERS}
    return adapter(folder, seed, tensors=found, config=config)


def _with_biases(place: Places, folder: Path) -> Document:
    document = dict(real("bias", kind="model")(place, folder))
    held = {f"model.layers.{i}.self_attn.q_proj.{p}": torch.ones(*s) for i in range(2) for p, s in
            (("weight", (96, 64)), ("bias", (96,)))}  # fmt: skip
    model(folder / "base", 0, tensors=held)
    return document


def _tokens(place: Places, folder: Path) -> Document:
    words = "model.embed_tokens"
    model(folder / "base", 0, tensors={f"{words}.weight": torch.ones(8, 64), **_linear_weights()})
    found = []
    for i in range(2):
        name = f"base_model.model.{words}.token_adapter.trainable_tokens_delta"
        rows = {**lora_tensors(i), name: torch.ones(1, 64)}
        found.append(adapter(folder / f"t{i}", i, tensors=rows, config={"trainable_token_indices": {words: [i]}}))
    return {"base_model": str(folder / "base"), "adapters": [{"adapter": str(a)} for a in found],
            "output": {"kind": "model"}}  # fmt: skip


def _linear_weights() -> dict[str, torch.Tensor]:
    return {f"model.layers.{i}.self_attn.q_proj.weight": torch.ones(96, 64) for i in range(2)}


def _ia3(place: Places, *modules: str) -> str:
    from safetensors.torch import save

    store = MemoryStore(place.fresh())
    document = {"peft_type": "IA3", "target_modules": list(modules), "feedforward_modules": [],
                "base_model_name_or_path": "org/base"}  # fmt: skip
    store.put("adapter_config.json", json.dumps(document).encode())
    store.put("adapter_model.safetensors", save({f"base_model.model.{m}.ia3_l": torch.ones(6, 1) for m in modules}))
    return store.uri


def ia3(*lists: tuple[str, ...], **keys: Any) -> Case:
    def made(place: Places, folder: Path) -> Document:
        found = [{"adapter": _ia3(place, *modules)} for modules in lists]
        weights = {"weights": [1.0] * len(found)} if "combination_type" in keys else {}
        return {"adapters": found, **weights, **keys}

    return made


def _plus(dtype: torch.dtype) -> Case:
    def made(place: Places, folder: Path) -> Document:
        base = place.model(tensors(dtype))
        both = [f"{base}+{lora(place)}" for _ in range(2)]
        return models("ties", base, both, [{"weight": 1.0}] * 2)

    return made


def _quantised(folder: Path, *, quantised: bool) -> list[Path]:
    """Two models of FP8, or of bfloat16."""
    found = []
    for seed in range(2):
        codes = torch.ones(96, 64).to(torch.float8_e4m3fn) if quantised else torch.ones(96, 64, dtype=torch.bfloat16)
        held = {"model.layers.0.self_attn.q_proj.weight": codes}
        config: dict[str, object] = {}
        if quantised:
            held["model.layers.0.self_attn.q_proj.weight_scale_inv"] = torch.ones(3, 2)
            config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32],
                                              "activation_scheme": "dynamic"}}  # fmt: skip
        found.append(model(folder / f"q{seed}-{quantised}", seed, tensors=held, config=config))
    return found


def coded(*, quantised: bool) -> Case:
    def made(place: Places, folder: Path) -> Document:
        first, second = _quantised(folder, quantised=quantised)
        return models("slerp", str(first), [str(second)], [{}], {"t": 0.5})

    return made


def bnb(output: Mapping[str, Any]) -> Case:
    def made(place: Places, folder: Path) -> Document:
        codes = {"model.layers.0.self_attn.q_proj.weight": torch.ones(96, 64).to(torch.int8),
                 "model.layers.0.self_attn.q_proj.SCB": torch.ones(96),
                 "model.layers.0.self_attn.q_proj.weight_format": torch.tensor(0, dtype=torch.uint8)}  # fmt: skip
        scheme = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
        base = model(folder / "bnb", 0, tensors=codes, config={"quantization_config": scheme})
        one = adapter(folder / "a", 0, modules=[Q])
        return {"base_model": str(base), "adapters": [{"adapter": str(one)}], "output": {"kind": "model", **output}}

    return made


def fold_of_head(*, tied: bool) -> Case:
    def made(place: Places, folder: Path) -> Document:
        words = {"model.embed_tokens.weight": torch.ones(8, 4)}
        held = words if tied else {**words, "lm_head.weight": torch.ones(8, 4)}
        base = place.model({**tensors(), **held}, tie_word_embeddings=tied)
        return {"base_model": base, "adapters": [{"adapter": place.adapter({"lm_head": pair(rows=8)})}],
                "output": {"kind": "model"}}  # fmt: skip

    return made


def copies(*, copied: bool) -> Case:
    def made(place: Places, folder: Path) -> Document:
        more: dict[str, Any] = {"layer_replication": [[0, 1], [0, 1]]} if copied else {}
        names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2 if copied else 1)]
        base = place.model(tensors(), num_hidden_layers=1, model_type="llama")
        return {"base_model": base, "adapters": [{"adapter": lora(place, *names, **more)}], "output": {"kind": "model"}}

    return made


def vocabulary(**keys: Any) -> Case:
    def made(place: Places, folder: Path) -> Document:
        found = [llama(folder / name, seed) for seed, name in enumerate(("v0", "v1"))]
        for path in found:
            (path / "generation_config.json").write_text('{"eos_token_id": 2}')
        return {**models("linear", str(found[0]), [str(p) for p in found], [{"weight": 1.0}] * 2), **keys}

    return made


def moe(mode: str) -> Case:
    return lambda place, folder: experts(folder, mode)


def single(document: Case) -> Case:
    """The same with its first adapter only."""

    def made(place: Places, folder: Path) -> Document:
        found = dict(document(place, folder))
        return {**found, "adapters": found["adapters"][:1]}

    return made


HALF = torch.bfloat16
ONE_EXPERT = {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(4, 4)}
BIAS = {f"{Q}.bias": torch.ones(6)}
COLUMN = {"model.layers.0.mixer.scale": torch.ones(6, 1)}
LARGE = {"model.layers.0.mlp.up_proj.weight": torch.ones(1001, 1000)}

CASES: dict[str, tuple[Case, Case]] = {
    "moe-names": (moe("random"), of_models("ties")),
    "moe-hidden": (moe("hidden"), moe("cheap_embed")),
    "moe-random": (moe("random"), moe("cheap_embed")),
    "arithmetic": (of_models("ties", dtype=HALF), of_models("ties")),
    "unrounded-fold": (_plus(HALF), _plus(torch.float32)),
    "equal-magnitudes": (of_models("ties", parameters={"weight": 1.0, "density": 0.5}), of_models("ties")),
    "mergekit-masks": (of_models("dare_ties", parameters={"weight": 1.0, "density": 0.5}), of_models("dare_ties")),
    "rows-of-one": (
        of_models("della", parameters={"weight": 1.0, "density": 0.5}, extra=COLUMN),
        of_models("della", parameters={"weight": 1.0, "density": 0.5}),
    ),
    "quartiles": (of_models("arcee_fusion", parameters={}, extra=LARGE), of_models("arcee_fusion", parameters={})),
    "result-dtype": (of_models("arcee_fusion", parameters={}, dtype=HALF), of_models("arcee_fusion", parameters={})),
    "experts-one-by-one": (
        of_models("ties", parameters={"weight": 1.0, "density": 0.5}, extra=ONE_EXPERT),
        of_models("task_arithmetic", extra=ONE_EXPERT),
    ),
    "nothing-left-out": (
        of_models("ties", extra=BIAS, config={"model_type": "llama"}),
        of_models("ties", extra=BIAS, config={"model_type": "qwen2"}),
    ),
    "decoded": (coded(quantised=True), coded(quantised=False)),
    "donor": (of_models("linear", base=False), of_models("task_arithmetic")),
    "generation": (vocabulary(tokenizer_source="union"), vocabulary()),
    "untied": (fold_of_head(tied=True), fold_of_head(tied=False)),
    "signs": (of_adapters("svd", svd_clamp=0.9), of_adapters("svd")),
    "rslora": (
        of_adapters("cat", ({"use_rslora": True}, {})),
        of_adapters("cat", ({}, {"use_rslora": True})),  # PEFT's settings are the first adapter's
    ),
    "peft-masks": (of_adapters("dare_linear", density=0.5), of_adapters("dare_linear", density=1.0)),
    "deltas": (merged("linear"), merged("task_arithmetic")),
    "others-layers": (
        of_adapters("cat", ({"layers_to_transform": [0]}, {"modules": (Q, Q.replace("0", "1"))})),
        of_adapters("cat", ({"layers_to_transform": [0]}, {})),
    ),
    "ranks": (ranked("linear", 2, 3), ranked("cat", 2, 3)),
    "cat-dtype": (of_adapters("cat"), of_adapters("svd")),
    "ia3-absent-peft": (
        ia3((Q,), (Q, "k_proj"), combination_type="linear"), ia3((Q,), (Q,), combination_type="linear")
    ),
    "ia3-absent": (
        ia3((Q,), (Q, "k_proj"), merge_method="linear"), ia3((Q,), (Q,), merge_method="linear")
    ),
    "dora": (real("dora", store={"svd": {"rank": 4}}), real("lora")),
    "began-in-base": (real("pissa", store={"svd": {"rank": 4}}), real("lora")),
    "biases": (_with_biases, single(_with_biases)),
    "tokens": (_tokens, single(_tokens)),
    "rounded-each": (
        merged("task_arithmetic", kind="model", dtype=HALF, output={"rounding": "peft_safe"}),
        merged("task_arithmetic", kind="model", dtype=HALF),
    ),
    "rounded-once": (
        merged("task_arithmetic", kind="model", dtype=HALF),
        merged("task_arithmetic", kind="model", dtype=HALF, count=1),
    ),
    "copied-layers": (copies(copied=True), copies(copied=False)),
    "dense-base": (bnb({}), bnb({"quantization": "keep"})),
}  # fmt: skip


@pytest.mark.parametrize("code", SENTENCES)
def test_a_row_is_told_where_it_applies(code: str, place: Places, tmp_path: Path) -> None:
    (tmp_path / "yes").mkdir()
    assert code in told(CASES[code][0](place, tmp_path / "yes"))


@pytest.mark.parametrize("code", SENTENCES)
def test_a_row_is_not_told_where_it_does_not_apply(code: str, place: Places, tmp_path: Path) -> None:
    (tmp_path / "no").mkdir()
    assert code not in told(CASES[code][1](place, tmp_path / "no"))


@pytest.mark.parametrize(
    "case, expected",
    [
        (of_models("linear", dtype=HALF, base=False), False),  # mergekit computes these in float32, too
        (of_models("linear", dtype=HALF, base=False, out_dtype="float32"), False),
        (of_models("linear", base=False, dtype=torch.float32), False),
        (_named("linear", "bfloat16", torch.float32), True),  # its inputs are rounded first
        (_named("linear", "bfloat16", HALF), False),
        (_named("ties", "float32", HALF), False),
        (_named("ties", "bfloat16", torch.float32), True),
    ],
)
def test_which_arithmetic_is_not_mergekits(case: Case, expected: bool, place: Places, tmp_path: Path) -> None:
    assert ("arithmetic" in told(case(place, tmp_path))) == expected


def test_rows_are_sentences_of_their_own() -> None:
    assert len({row.code for row in DEVIATIONS}) == len({row.sentence for row in DEVIATIONS}) == len(DEVIATIONS)
    for row in DEVIATIONS:
        assert row.code in CASES
        assert re.search(r"PEFT|mergekit|published", row.sentence), row.sentence
        assert not row.sentence.endswith(".")


def test_the_file_and_the_card_say_them(tmp_path: Path) -> None:
    paths = [model(tmp_path / f"m{i}", i) for i in range(2)]
    merger.merge(models("karcher", None, [str(p) for p in paths], [{}] * 2), tmp_path / "out", workers=1)
    expected = {SENTENCES["arithmetic"], SENTENCES["donor"]}
    assert set(json.loads((tmp_path / "out" / "raymerge.json").read_text())["deviations"]) == expected
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"- {sentence}" in card for sentence in expected)
    assert sum(sentence in card for sentence in SENTENCES.values()) == len(expected)


def test_a_merge_like_any_other_says_nothing(tmp_path: Path) -> None:
    paths = [model(tmp_path / f"m{i}", i, dtype=torch.float32) for i in range(2)]
    document = models("task_arithmetic", str(paths[0]), [str(paths[1])], [{"weight": 1.0}])
    merger.merge(document, tmp_path / "out", workers=1)
    assert json.loads((tmp_path / "out" / "raymerge.json").read_text())["deviations"] == []
    assert "differs from other tools" not in (tmp_path / "out" / "README.md").read_text()
