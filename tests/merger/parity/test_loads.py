"""Every kind of output loads with nothing missing and nothing left over, and computes what first principles say."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import merger
from merger.kernels.hashing import element_key, keep_limit
from merger.kernels.plain import drop
from merger.methods import COMBINATION_TYPES

if TYPE_CHECKING:
    from tests.merger.parity.conftest import Bench

Deltas = dict[str, Tensor]
NAMES = ("a", "few", "rslora")
WEIGHTS = (0.7, 0.9, -0.35)


# ---------------------------------------------------------------- first principles, in float64


def sources(bench: Bench, names: Sequence[str]) -> list[Deltas]:
    """Every source's delta of every module; zero where it has none."""
    every = [bench.deltas(bench.adapter(name)) for name in names]
    shapes = {module: delta.shape for deltas in every for module, delta in deltas.items()}
    zero = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in shapes.items()}
    return [{module: deltas.get(module, zero[module]) for module in shapes} for deltas in every]


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The ⌊density·n⌋ largest magnitudes (at least one)."""
    count = max(1, int(density * delta.numel()))
    if not delta.count_nonzero():
        return delta
    order = delta.abs().flatten().argsort(descending=True)[:count]
    mask = torch.zeros(delta.numel(), dtype=torch.float64)
    mask[order] = 1
    return delta * mask.reshape(delta.shape)


def dropped(delta: Tensor, density: float, position: int, module: str, rescale: str) -> Tensor:
    """A random share, and what restores the size of the delta: its L1 norm, or one over the density."""
    key = element_key(0, position, f"{module}.weight", "delta")
    mask = torch.ones(delta.numel())
    drop(mask, 0, key & 0xFFFFFFFF, key >> 32, keep_limit(density), 1.0, mask)
    kept = delta * mask.double().reshape(delta.shape)
    if rescale == "inverse":
        return kept / density
    after = float(kept.abs().sum())
    return kept * (float(delta.abs().sum()) / after) if after > 0 else kept


def elected(deltas: Sequence[Tensor], weights: Sequence[float], *, weighted: bool, divisor: str | None) -> Tensor:
    """The sum of what agrees with the elected sign, divided by the weights that agree, their number, or nothing."""
    stack = torch.stack(list(deltas))
    w = torch.tensor(weights, dtype=torch.float64).reshape(-1, 1, 1)
    judged = stack * w if weighted else stack
    sign = torch.where(judged.sum(dim=0) >= 0, 1.0, -1.0).double()
    agrees = (judged.sign() == sign).double()
    total = (stack * w * agrees).sum(dim=0)
    if divisor is None:
        return total
    count = (agrees * w).sum(dim=0) if divisor == "weights" else agrees.sum(dim=0)
    return total / torch.where(count == 0, torch.ones_like(count), count)


def expected(
    bench: Bench, method: str, names: Sequence[str], weights: Sequence[float], parameters: Mapping[str, Any]
) -> Deltas:
    """What a merge method makes of deltas, by its definition."""
    every = sources(bench, names)
    density, scale = parameters.get("density", 1.0), parameters.get("lambda", 1.0)
    found = {}
    for module in every[0]:
        deltas = [deltas[module] for deltas in every]
        if method in ("ties", "magnitude_prune"):
            deltas = [trimmed(delta, density) for delta in deltas]
        elif method.startswith("dare"):
            rescale = parameters.get("rescale", "l1")
            deltas = [dropped(delta, density, i, module, rescale) for i, delta in enumerate(deltas)]
        total = torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)]).sum(dim=0)
        if method == "linear":
            total = total / math.fsum(weights)
        elif method in ("ties", "dare_ties"):
            divisor = parameters.get("divisor", "weights") if parameters.get("normalize", method == "ties") else None
            is_weighted = parameters.get("elect", "weighted") == "weighted"
            total = elected(deltas, weights, weighted=is_weighted, divisor=divisor)
        found[module] = total * scale
    return found


def merge(
    bench: Bench, out: Path, names: Sequence[str], weights: Sequence[float], method: str, kind: str,
    parameters: Mapping[str, Any], store: object = None,
) -> Path:  # fmt: skip
    output: dict[str, object] = {"kind": kind}
    if store is not None:
        output["store"] = store
    document: dict[str, object] = {
        "merge_method": method,
        "adapters": [
            {"adapter": str(bench.adapter(n)), "parameters": {"weight": w}} for n, w in zip(names, weights, strict=True)
        ],
        "parameters": dict(parameters),
        "output": output,
        "base_model": str(bench.base()),
    }
    merger.merge(document, out, workers=2)
    return out


# ---------------------------------------------------------------- loading


def assert_adapter_loads(bench: Bench, out: Path, base: Path | None = None) -> Any:
    """PEFT finds a place for every tensor, makes no module that has none, and holds the very values of the file."""
    file = load_file(out / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of missing keys
        model = peft.PeftModel.from_pretrained(bench.model(base or bench.base()), str(out), adapter_name="s0").eval()
        again = model.load_adapter(str(out), adapter_name="again")
    assert not again.unexpected_keys
    assert not [key for key in again.missing_keys if "lora_" in key]
    bench.assert_equal(peft.get_peft_model_state_dict(model, adapter_name="s0"), file)
    return model


def assert_model_loads(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(str(path), dtype="auto", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], f"{kind}: {info[kind]}"
    assert model.dtype == dtype
    return model.eval()


def assert_logits(ours: Tensor, theirs: Tensor, changed_from: Tensor) -> None:
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float((theirs - changed_from).abs().max()) > 1e-2  # the deltas can be seen


# ---------------------------------------------------------------- adapters


METHODS: list[tuple[str, dict[str, Any], object]] = [
    ("task_arithmetic", {}, None),
    ("task_arithmetic", {"lambda": 0.5}, "concat"),
    ("task_arithmetic", {}, {"svd": {"rank": 5}}),
    ("task_arithmetic", {}, {"svd": {"rank": 40}}),
    ("linear", {}, None),
    ("linear", {}, "concat"),
    ("linear", {}, {"svd": {"rank": 9}}),
    ("cat", {}, None),
    ("svd", {}, None),
    ("svd", {"lambda": 1.5}, {"svd": {"rank": 3}}),
    ("ties", {"density": 0.4}, None),
    ("ties", {"density": 0.4, "lambda": 0.8}, {"svd": {"rank": 48}}),
    ("ties", {"density": 0.7, "elect": "unweighted", "divisor": "count"}, {"svd": {"rank": 96}}),
    ("ties", {"density": 1.0, "normalize": False}, {"svd": {"rank": 96}}),
    ("dare_linear", {"density": 0.5}, {"svd": {"rank": 96}}),
    ("dare_ties", {"density": 0.5}, None),
    ("dare_ties", {"density": 0.3}, {"svd": {"rank": 96}}),
    ("dare_ties", {"density": 0.6, "rescale": "inverse", "elect": "unweighted"}, {"svd": {"rank": 20}}),
    ("magnitude_prune", {"density": 0.2}, {"svd": {"rank": 96}}),
]


@pytest.mark.parametrize("method, parameters, store", METHODS, ids=str)
def test_adapters(bench: Bench, method: str, parameters: dict[str, Any], store: object, tmp_path: Path) -> None:
    out = merge(bench, tmp_path / "out", NAMES, WEIGHTS, method, "adapter", parameters, store)
    exact = expected(bench, method, NAMES, WEIGHTS, parameters)
    tensors = load_file(out / "adapter_model.safetensors")
    products = bench.products(tensors)
    is_linear = method in ("task_arithmetic", "linear", "cat", "svd")
    is_cut = isinstance(store, dict) or method == "svd" or not is_linear
    for module, delta in exact.items():
        rank = tensors[f"base_model.model.{module}.lora_A.weight"].shape[0]
        best, gaps = bench.cut({module: delta}, rank)
        # Elementwise methods start from float32 deltas; an SVD of those errs by that over the gap at its cut.
        tolerance = 1e-6 if is_linear else max(2e-6, 1e-6 / gaps[module])
        bench.assert_close({module: products[module]}, best if is_cut else {module: delta}, tolerance)
        if isinstance(store, dict) and not is_linear:
            assert rank == min(store["svd"]["rank"], *delta.shape)
    loaded = bench.logits(assert_adapter_loads(bench, out))
    assert_logits(loaded, bench.expected_logits(products), bench.logits(bench.model(bench.base())))


@pytest.mark.parametrize("kind", COMBINATION_TYPES)
def test_adapters_of_combination_types(bench: Bench, kind: str, tmp_path: Path) -> None:
    adapters = [bench.adapter(n) for n in NAMES]
    options: dict[str, Any] = {"density": 0.5} if kind.startswith(("ties", "dare", "magn")) else {}
    ours = bench.weighted(adapters, WEIGHTS, tmp_path / "out", kind, **options)
    products = bench.products(ours)
    loaded = bench.logits(assert_adapter_loads(bench, tmp_path / "out"))
    assert_logits(loaded, bench.expected_logits(products), bench.logits(bench.model(bench.base())))
    if kind == "cat":
        bench.assert_close(products, bench.weighted_sum(adapters, WEIGHTS), 1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"]
    assert not config["use_rslora"]


@pytest.mark.parametrize("names", [("few",), ("upper", "few"), ("patterns", "upper"), ("small", "large", "patterns")])
def test_adapters_with_unlike_modules_and_ranks(bench: Bench, names: tuple[str, ...], tmp_path: Path) -> None:
    """A module that a name's ending would match too must stay as it is."""
    weights = (0.5, 1.5, -0.75)[: len(names)]
    out = merge(bench, tmp_path / "out", names, weights, "task_arithmetic", "adapter", {})
    exact = bench.weighted_sum([bench.adapter(n) for n in names], weights)
    bench.assert_close(bench.products(load_file(out / "adapter_model.safetensors")), exact, 1e-6)
    loaded = bench.logits(assert_adapter_loads(bench, out))
    assert_logits(loaded, bench.expected_logits(exact), bench.logits(bench.model(bench.base())))


def test_adapter_on_the_head(bench: Bench, tmp_path: Path) -> None:
    names, weights = ("head", "a"), (0.5, 1.5)
    out = merge(bench, tmp_path / "out", names, weights, "task_arithmetic", "adapter", {})
    exact = bench.weighted_sum([bench.adapter(n) for n in names], weights)
    assert "lm_head" in exact
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = bench.peft_model([out])
        held = peft.get_peft_model_state_dict(model, adapter_name="s0", save_embedding_layers=False)
    bench.assert_equal(held, load_file(out / "adapter_model.safetensors"))
    assert_logits(bench.logits(model), bench.expected_logits(exact), bench.logits(bench.model(bench.base())))


def test_half_precision_adapters(bench: Bench, tmp_path: Path) -> None:
    """merge_method keeps the sources' dtype: B·A to the rounding of its factors."""
    names, weights = ("a-bf16", "b-bf16"), (0.5, 1.5)
    out = merge(bench, tmp_path / "out", names, weights, "task_arithmetic", "adapter", {})
    tensors = load_file(out / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    exact = bench.weighted_sum([bench.adapter(n) for n in names], weights)
    bench.assert_close(bench.products(tensors), exact, 4e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = bench.peft_model([out])
    loaded = peft.get_peft_model_state_dict(model, adapter_name="s0")
    bench.assert_equal(loaded, {key: value.float() for key, value in tensors.items()})


def test_transformers_loads_an_adapter_by_itself(bench: Bench, tmp_path: Path) -> None:
    out = merge(bench, tmp_path / "out", NAMES, WEIGHTS, "task_arithmetic", "adapter", {})
    model = bench.model(bench.base())
    model.load_adapter(str(out))
    exact = bench.weighted_sum([bench.adapter(n) for n in NAMES], WEIGHTS)
    assert_logits(bench.logits(model), bench.expected_logits(exact), bench.logits(bench.model(bench.base())))


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    "method, parameters",
    [
        ("task_arithmetic", {}),
        ("task_arithmetic", {"lambda": 0.25, "normalize": True}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "elect": "unweighted", "divisor": "count"}),
        ("dare_linear", {"density": 0.5}),
        ("dare_ties", {"density": 0.5}),
        ("magnitude_prune", {"density": 0.2, "lambda": 0.5}),
    ],
    ids=str,
)
def test_models_of_adapters(bench: Bench, method: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    out = merge(bench, tmp_path / "out", NAMES, WEIGHTS, method, "model", parameters)
    exact = expected(bench, method, NAMES, WEIGHTS, parameters)
    if method == "task_arithmetic" and parameters.get("normalize"):
        exact = {module: delta / math.fsum(WEIGHTS) for module, delta in exact.items()}
    base, ours = load_file(bench.base() / "model.safetensors"), load_file(out / "model.safetensors")
    for module, delta in exact.items():
        error = ours[f"{module}.weight"].double() - (base[f"{module}.weight"].double() + delta)
        assert float(error.abs().max()) < 1e-6 * float(delta.abs().max() + 1), module
    loaded = bench.logits(assert_model_loads(out))
    assert_logits(loaded, bench.expected_logits(exact), bench.logits(bench.model(bench.base())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
def test_folds(bench: Bench, dtype: torch.dtype, sharded: bool, tmp_path: Path) -> None:
    base, adapter = bench.base(dtype, sharded=sharded), bench.adapter("a")
    merger.fold([str(adapter)], tmp_path / "out", base=str(base), workers=2)
    ours = bench.logits(assert_model_loads(tmp_path / "out", dtype))
    assert_logits(ours, bench.logits(bench.folded([adapter], base)), bench.logits(bench.model(base)))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_an_untied_head_loads(bench: Bench, tmp_path: Path) -> None:
    base = bench.base(tied=True)
    adapter = bench.adapter("head", base)
    merger.fold([str(adapter)], tmp_path / "out", base=str(base), workers=2)
    model = assert_model_loads(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    unmerged = bench.logits(bench.peft_model([adapter], base))
    assert_logits(bench.logits(model), unmerged, bench.logits(bench.model(base)))


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "passthrough"])
def test_models_of_models(bench: Bench, method: str, tmp_path: Path) -> None:
    base, folded = bench.base(), tmp_path / "folded"
    merger.fold([str(bench.adapter("a"))], folded, base=str(base), workers=2)
    entries: dict[str, list[dict[str, Any]]] = {
        "linear": [
            {"model": str(base), "parameters": {"weight": 1}}, {"model": str(folded), "parameters": {"weight": 3}},
        ],
        "slerp": [{"model": str(folded)}],
        "task_arithmetic": [{"model": str(folded), "parameters": {"weight": 0.75}}],
        "passthrough": [{"model": str(folded)}],
    }  # fmt: skip
    document: dict[str, object] = {"merge_method": method, "models": entries[method]}
    if method in ("slerp", "task_arithmetic"):
        document["base_model"] = str(base)
    if method == "slerp":
        document["parameters"] = {"t": 0.75}
    merger.merge(document, tmp_path / "out", workers=2)
    ours = bench.logits(assert_model_loads(tmp_path / "out"))
    plain = bench.logits(bench.model(base))
    share = 1.0 if method == "passthrough" else 0.75
    if method == "slerp":
        assert float((ours - plain).abs().max()) > 1e-2
        return
    exact = {module: share * delta for module, delta in bench.deltas(bench.adapter("a")).items()}
    assert_logits(ours, bench.expected_logits(exact), plain)
