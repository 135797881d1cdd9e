"""Weighted merges against PEFT 0.21.2's add_weighted_adapter: bits where it merges factors, B·A where it cuts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
from torch import Tensor

import merger
from merger.errors import ManifestError, RefusedError
from merger.kernels.hashing import MIX_A, MIX_B, element_key
from merger.methods import COMBINATION_TYPES

if TYPE_CHECKING:
    from tests.merger.parity.conftest import Bench

PREFIX = "base_model.model."
FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
PRUNED_SVD = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")

# (adapters, weights): every case has adapters of one rank, so that PEFT's factor types take it.
SETS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "three": (("a", "b", "c"), (0.7, 0.4, 1.3)),
    "negative": (("a", "b", "c"), (0.7, -0.4, 1.3)),
    "first negative": (("b", "a"), (-1.25, 0.5)),
    "all negative": (("a", "b"), (-0.3, -0.6)),
    "zero": (("a", "b", "c"), (0.5, 0.0, -0.25)),
    "missing in one": (("a", "few"), (0.6, 0.9)),
    "missing in the first": (("few", "b", "other"), (0.6, 0.9, -0.2)),
    "one layer only": (("a", "upper"), (1.0, 0.3)),
    "half files": (("a-bf16", "b-bf16", "c-f16"), (0.7, -0.4, 1.3)),
    "bfloat16 and float32": (("a-bf16", "b"), (0.9, 0.8)),
    "rsLoRA second": (("a", "rslora"), (0.5, 0.75)),
}
DENSITIES = (0.1, 0.37, 0.5, 0.9, 1.0)


@pytest.fixture(scope="module", params=sorted(SETS))
def case(request: pytest.FixtureRequest, bench: Bench) -> tuple[list[Path], tuple[float, ...]]:
    names, weights = SETS[request.param]
    return [bench.adapter(name) for name in names], weights


def test_the_eleven_types_are_all_compared() -> None:
    assert sorted(COMBINATION_TYPES) == sorted((*FACTORS, "cat", "svd", *PRUNED_SVD))


def test_peft_is_the_version_whose_numbers_these_are() -> None:
    assert peft.__version__ == "0.21.2"


# ---------------------------------------------------------------- masks of random drops


def hashed_mask(key: int, shape: Sequence[int], density: float) -> Tensor:
    """merger/kernels/hashing.py's rule, written once more: 1 where an element is kept."""

    def mix(h: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        h = h ^ (h >> np.uint64(16))
        h = h * np.uint64(MIX_A) & word
        h = h ^ (h >> np.uint64(15))
        h = h * np.uint64(MIX_B) & word
        return h ^ (h >> np.uint64(16))

    word = np.uint64(0xFFFFFFFF)
    index = np.arange(shape[0] * shape[1], dtype=np.uint64)  # below 2³², so its upper half adds nothing
    first = mix(index ^ np.uint64(key & 0xFFFFFFFF))
    hashes = mix((first + np.uint64(key >> 32)) & word)
    return torch.from_numpy(hashes < round(density * 2**32)).float().reshape(*shape)


def masks_for(adapters: Sequence[Path], density: float, *, dense: bool) -> Callable[[Any], list[Tensor]]:
    """Our masks in the order in which PEFT draws: module by module; A of each adapter, then B; or each delta."""

    def make(model: Any) -> list[Tensor]:
        masks: list[Tensor] = []
        if density >= 1:
            return masks
        for name, module in model.named_modules():
            if not hasattr(module, "lora_A") or not name.startswith(PREFIX):
                continue
            present = [i for i in range(len(adapters)) if f"s{i}" in module.lora_A]
            path = name.removeprefix(PREFIX)
            for factor in "A" if dense else "AB":
                for i in present:
                    key = element_key(0, i, f"{PREFIX}{path}.lora_{factor}.weight", factor)
                    a, b = module.lora_A[f"s{i}"].weight, module.lora_B[f"s{i}"].weight
                    shape = (b.shape[0], a.shape[1]) if dense else (a if factor == "A" else b).shape
                    masks.append(hashed_mask(key, shape, density))
        return masks

    return make


def test_a_mask_keeps_its_share_and_differs_from_key_to_key() -> None:
    one, two = (hashed_mask(element_key(0, i, "t", "A"), (64, 64), 0.3) for i in (0, 1))
    assert abs(float(one.mean()) - 0.3) < 0.03
    assert 0.3 < float((one != two).float().mean()) < 0.55  # 2 · .3 · .7 for masks that know nothing of each other


# ---------------------------------------------------------------- bits


def test_linear(bench: Bench, case: tuple[list[Path], tuple[float, ...]], tmp_path: Path) -> None:
    adapters, weights = case
    bench.assert_equal(
        bench.weighted(adapters, weights, tmp_path / "out", "linear"), bench.peft_weighted(adapters, weights, "linear")
    )


def test_cat(bench: Bench, case: tuple[list[Path], tuple[float, ...]], tmp_path: Path) -> None:
    adapters, weights = case
    bench.assert_equal(
        bench.weighted(adapters, weights, tmp_path / "out", "cat"), bench.peft_weighted(adapters, weights, "cat")
    )


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_a_copy_of_the_base_s_embeddings_is_no_change(bench: Bench, kind: str, tmp_path: Path) -> None:
    """PEFT saves one beside LoRA on embeddings, of a merge too."""
    adapters, weights = [bench.adapter("embedding"), bench.adapter("a")], (0.7, 0.4)
    theirs = bench.peft_weighted(adapters, weights, kind)
    plain = {name: value for name, value in theirs.items() if ".base_layer." not in name}
    assert len(plain) == len(theirs) - 1
    bench.assert_equal(bench.weighted(adapters, weights, tmp_path / "out", kind), plain)


@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties(bench: Bench, case: tuple[list[Path], tuple[float, ...]], sign: str, tmp_path: Path) -> None:
    adapters, weights = case
    options: dict[str, Any] = {"density": 0.37, "majority_sign_method": sign}
    bench.assert_equal(
        bench.weighted(adapters, weights, tmp_path / "out", "ties", **options),
        bench.peft_weighted(adapters, weights, "ties", **options),
    )


def test_magnitude_prune(bench: Bench, case: tuple[list[Path], tuple[float, ...]], tmp_path: Path) -> None:
    adapters, weights = case
    bench.assert_equal(
        bench.weighted(adapters, weights, tmp_path / "out", "magnitude_prune", density=0.37),
        bench.peft_weighted(adapters, weights, "magnitude_prune", density=0.37),
    )


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare(bench: Bench, case: tuple[list[Path], tuple[float, ...]], kind: str, tmp_path: Path) -> None:
    adapters, weights = case
    theirs = bench.peft_weighted(adapters, weights, kind, density=0.37, masks=masks_for(adapters, 0.37, dense=False))
    bench.assert_equal(bench.weighted(adapters, weights, tmp_path / "out", kind, density=0.37), theirs)


@pytest.mark.parametrize(
    "names, density",
    [*((("a", "b", "c"), d) for d in DENSITIES), (("a-bf16", "b-bf16"), 0.1), (("a-bf16", "b-bf16"), 0.5)],
)
@pytest.mark.parametrize("kind", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_densities(bench: Bench, names: tuple[str, ...], kind: str, density: float, tmp_path: Path) -> None:
    adapters, weights = [bench.adapter(n) for n in names], (0.7, -0.4, 1.3)[: len(names)]
    masks = masks_for(adapters, density, dense=False) if kind.startswith("dare") else None
    bench.assert_equal(
        bench.weighted(adapters, weights, tmp_path / "out", kind, density=density),
        bench.peft_weighted(adapters, weights, kind, density=density, masks=masks),
    )


@pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
def test_density_that_keeps_nothing(bench: Bench, kind: str, tmp_path: Path) -> None:
    adapters = [bench.adapter("a"), bench.adapter("b")]
    ours = bench.weighted(adapters, (1.0, 0.5), tmp_path / "out", kind, density=0.0)
    bench.assert_equal(ours, bench.peft_weighted(adapters, (1.0, 0.5), kind, density=0.0))
    assert all(int(value.count_nonzero()) == 0 for value in ours.values())


def test_the_share_that_is_kept_is_cut_as_peft_cuts_it(bench: Bench, tmp_path: Path) -> None:
    # int(.29 · 800) is 231 where .29 · 800 is 232 but for its rounding.
    adapters = [bench.adapter("a"), bench.adapter("few")]
    for density in (0.29, 0.57, 0.07):
        bench.assert_equal(
            bench.weighted(adapters, (1.0, 1.0), tmp_path / f"out{density}", "magnitude_prune", density=density),
            bench.peft_weighted(adapters, (1.0, 1.0), "magnitude_prune", density=density),
        )


@pytest.mark.parametrize(
    "kind, name, weight",
    [
        *((kind, "b", -0.7) for kind in COMBINATION_TYPES),
        ("linear", "a", 1.0),
        ("svd", "a-bf16", 0.4),
        ("cat", "few", 2.0),
        ("ties", "c", 0.0),
    ],
)
def test_a_single_adapter_is_linear_whatever_the_type(
    bench: Bench, kind: str, name: str, weight: float, tmp_path: Path
) -> None:
    adapters = [bench.adapter(name)]
    options: dict[str, Any] = {"density": 0.5} if kind.startswith(("ties", "dare", "magn")) else {}
    bench.assert_equal(
        bench.weighted(adapters, [weight], tmp_path / "out", kind, **options),
        bench.peft_weighted(adapters, [weight], kind, **options),
    )


def test_a_single_adapter_with_patterns(bench: Bench, tmp_path: Path) -> None:
    adapters = [bench.adapter("patterns")]
    bench.assert_equal(
        bench.weighted(adapters, [0.7], tmp_path / "out", "linear"), bench.peft_weighted(adapters, [0.7], "linear")
    )


@pytest.mark.parametrize("weights", [(0.7, -0.4, 1.3), (0.0, 1.0, 1.0)])
def test_cat_of_different_ranks(bench: Bench, weights: tuple[float, ...], tmp_path: Path) -> None:
    adapters = [bench.adapter(n) for n in ("small", "large", "few")]
    ours = bench.weighted(adapters, weights, tmp_path / "out", "cat")
    bench.assert_equal(ours, bench.peft_weighted(adapters, weights, "cat"))
    assert ours[f"{PREFIX}model.layers.0.self_attn.k_proj.lora_A.weight"].shape[0] == 28


@pytest.mark.parametrize("kind", [*FACTORS, "cat"])
def test_patterns(bench: Bench, kind: str, tmp_path: Path) -> None:
    """rank_pattern and alpha_pattern, which agree between the adapters so that PEFT can add A to A."""
    adapters, weights = [bench.adapter("patterns"), bench.adapter("patterns-too")], (0.8, -0.3)
    options: dict[str, Any] = {} if kind in ("linear", "cat") else {"density": 0.5}
    masks = masks_for(adapters, 0.5, dense=False) if kind.startswith("dare") else None
    ours = bench.weighted(adapters, weights, tmp_path / "out", kind, **options)
    bench.assert_equal(ours, bench.peft_weighted(adapters, weights, kind, masks=masks, **options))
    ranks = {value.shape[0] for key, value in ours.items() if "lora_A" in key}
    assert ranks == ({16} if kind == "cat" else {8, 4, 3})


def test_workers_change_no_bit(bench: Bench, tmp_path: Path) -> None:
    adapters = [str(bench.adapter(n)) for n in ("a", "b")]
    digests = {
        merger.add_weighted_adapter(
            adapters, (0.5, 0.7), tmp_path / f"{kind}{workers}", combination_type=kind, density=0.4, workers=workers
        ).content_digest
        for kind in ("dare_ties_svd",)
        for workers in (1, 3)
    }
    assert len(digests) == 1


# ---------------------------------------------------------------- B·A


def assert_svd(bench: Bench, adapters: Sequence[Path], weights: Sequence[float], out: Path, rank: int | None) -> None:
    """B·A to 1e-5 of PEFT's, and to 1e-6 of the best approximation there is.

    Where singular values nearly meet at the cut, PEFT's float32 SVD itself is off by more than 1e-5.
    """
    ours = bench.weighted(adapters, weights, out, "svd", svd_rank=rank)
    theirs = bench.peft_weighted(adapters, weights, "svd", svd_rank=rank)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    found = next(v.shape[0] for k, v in ours.items() if "lora_A" in k)
    best, gaps = bench.cut(bench.weighted_sum(adapters, weights), found)
    our_products, their_products = bench.products(ours), bench.products(theirs)
    bench.assert_close(our_products, best, 1e-6)
    for module, gap in gaps.items():
        tolerance = max(1e-5, 1e-6 / gap)
        bench.assert_close({module: our_products[module]}, {module: their_products[module]}, tolerance)


def test_svd(bench: Bench, case: tuple[list[Path], tuple[float, ...]], tmp_path: Path) -> None:
    assert_svd(bench, *case, tmp_path / "out", None)


@pytest.mark.parametrize("names", [("small", "large", "few"), ("patterns", "small"), ("few", "rslora-16")])
@pytest.mark.parametrize("rank", [None, 1, 12])
def test_svd_of_different_ranks(bench: Bench, names: tuple[str, ...], rank: int | None, tmp_path: Path) -> None:
    assert_svd(bench, [bench.adapter(n) for n in names], (0.7, -0.4, 1.3)[: len(names)], tmp_path / "out", rank)


def test_svd_factors_are_peft_s_but_for_signs(bench: Bench, tmp_path: Path) -> None:
    """A' has orthonormal rows and B' all of the energy."""
    adapters = [bench.adapter("a"), bench.adapter("b")]
    ours = bench.weighted(adapters, (0.7, 0.4), tmp_path / "out", "svd")
    theirs = bench.peft_weighted(adapters, (0.7, 0.4), "svd")
    for key, value in theirs.items():
        axis = 1 if "lora_A" in key else 0
        flipped = torch.sign((ours[key] * value).sum(dim=axis, keepdim=True)) * ours[key]
        assert float((flipped - value).abs().max()) < 1e-4 * float(value.abs().max()), key


@pytest.mark.parametrize("kind", PRUNED_SVD)
def test_pruned_svd(bench: Bench, case: tuple[list[Path], tuple[float, ...]], kind: str, tmp_path: Path) -> None:
    adapters, weights = case
    masks = masks_for(adapters, 0.37, dense=True) if kind.startswith("dare") else None
    bench.assert_close(
        bench.products(bench.weighted(adapters, weights, tmp_path / "out", kind, density=0.37)),
        bench.products(bench.peft_weighted(adapters, weights, kind, density=0.37, masks=masks)),
        1e-4,
    )


@pytest.mark.parametrize("kind", PRUNED_SVD)
@pytest.mark.parametrize("density", [0.1, 0.9, 1.0])
def test_pruned_svd_of_different_ranks(bench: Bench, kind: str, density: float, tmp_path: Path) -> None:
    adapters, weights = [bench.adapter(n) for n in ("few", "patterns", "rslora-16")], (0.7, -0.4, 1.3)
    masks = masks_for(adapters, density, dense=True) if kind.startswith("dare") else None
    ours = bench.weighted(adapters, weights, tmp_path / "out", kind, density=density, svd_rank=6)
    theirs = bench.peft_weighted(adapters, weights, kind, density=density, svd_rank=6, masks=masks)
    bench.assert_close(bench.products(ours), bench.products(theirs), 1e-4)


@pytest.mark.parametrize("kind", ["ties_svd", "dare_ties_svd"])
def test_pruned_svd_by_frequency(bench: Bench, kind: str, tmp_path: Path) -> None:
    adapters, weights = [bench.adapter(n) for n in ("a", "b", "c")], (0.7, -0.4, 1.3)
    masks = masks_for(adapters, 0.5, dense=True) if kind.startswith("dare") else None
    options: dict[str, Any] = {"density": 0.5, "majority_sign_method": "frequency"}
    bench.assert_close(
        bench.products(bench.weighted(adapters, weights, tmp_path / "out", kind, **options)),
        bench.products(bench.peft_weighted(adapters, weights, kind, masks=masks, **options)),
        1e-4,
    )


def test_svd_clamp_limits_both_factors_at_a_quantile_of_all_their_elements(bench: Bench, tmp_path: Path) -> None:
    """PEFT's own values depend on the signs that LAPACK chose, so the rule is checked on our signs."""
    adapters = [bench.adapter("a"), bench.adapter("b")]
    plain = bench.weighted(adapters, (0.7, 0.4), tmp_path / "plain", "svd")
    clamped = bench.weighted(adapters, (0.7, 0.4), tmp_path / "clamped", "svd", svd_clamp=0.9)
    for key in plain:
        if "lora_A" not in key:
            continue
        b = key.replace("lora_A", "lora_B")
        high = float(torch.quantile(torch.cat([plain[b].flatten(), plain[key].flatten()]), 0.9))
        for name in (key, b):
            assert torch.allclose(clamped[name], plain[name].clamp(-high, high), rtol=0, atol=1e-6), name
        assert float(clamped[b].abs().max()) < float(plain[b].abs().max())


# ---------------------------------------------------------------- where PEFT is wrong and says nothing


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("names", [("rslora",), ("rslora", "a"), ("rslora", "b", "rslora")])
def test_rslora_first_is_scaled_once(bench: Bench, kind: str, names: tuple[str, ...], tmp_path: Path) -> None:
    adapters, weights = [bench.adapter(n) for n in names], (0.5, -0.75, 0.25)[: len(names)]
    rank: dict[str, Any] = {"svd_rank": 24} if kind == "svd" and len(names) > 1 else {}
    ours = bench.weighted(adapters, weights, tmp_path / "out", kind, **rank)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"]) == (False, config["r"])
    exact = bench.weighted_sum(adapters, weights)
    if kind != "linear" or len(names) == 1:
        bench.assert_close(bench.products(ours), exact, 2e-6)
    theirs = bench.peft_weighted(adapters, weights, kind, **rank)
    bench.assert_close(bench.products(ours), bench.products(theirs), 1e-5)  # its factors are right, its config is not
    model = bench.peft_model([tmp_path / "out"])
    if kind != "linear" or len(names) == 1:
        assert float((bench.logits(model) - bench.expected_logits(exact)).abs().max()) < 1e-4


def test_the_report_names_the_rslora_deviation(bench: Bench, tmp_path: Path) -> None:
    def deviations(*names: str) -> str:
        out = tmp_path / "-".join(names)
        report = merger.add_weighted_adapter(
            [str(bench.adapter(n)) for n in names], [1.0] * len(names), out, combination_type="cat", workers=2
        )
        return " ".join(report.deviations)

    assert "rsLoRA" in deviations("rslora", "a")
    assert "rsLoRA" not in deviations("a", "b")


def test_the_report_names_the_masks_of_dare(bench: Bench, tmp_path: Path) -> None:
    adapters = [str(bench.adapter("a")), str(bench.adapter("b"))]
    report = merger.add_weighted_adapter(
        adapters, (1.0, 1.0), tmp_path / "out", combination_type="dare_ties", density=0.5, workers=2
    )
    assert any("mask" in deviation for deviation in report.deviations)
    assert "mask" in (tmp_path / "out" / "raymerge-report.json").read_text()


def test_peft_is_still_wrong_about_rslora(bench: Bench, tmp_path: Path) -> None:
    """If this fails, PEFT has mended it: take the deviation out of the report."""
    model = bench.peft_model([bench.adapter("rslora")])
    model.add_weighted_adapter(["s0"], [1.0], "merged", combination_type="linear")
    module = model.base_model.model.model.layers[0].self_attn.q_proj
    assert module.scaling["merged"] == pytest.approx(8**0.5)


def test_layers_to_transform_of_the_first_adapter_drops_no_layer_of_others(bench: Bench, tmp_path: Path) -> None:
    adapters, weights = [bench.adapter("upper"), bench.adapter("a")], (0.5, 1.5)
    ours = bench.products(bench.weighted(adapters, weights, tmp_path / "out", "cat"))
    bench.assert_close(ours, bench.weighted_sum(adapters, weights), 1e-6)
    assert len(ours) == 14


def test_svd_rank_above_the_layer_s_own_is_padded_and_loads(bench: Bench, tmp_path: Path) -> None:
    adapters, weights = [bench.adapter("a"), bench.adapter("b")], (0.5, 1.5)
    ours = bench.weighted(adapters, weights, tmp_path / "out", "svd", svd_rank=60)  # k_proj has 48 rows
    assert {v.shape[0] for k, v in ours.items() if "lora_A" in k} == {60}
    exact = bench.weighted_sum(adapters, weights)
    bench.assert_close(bench.products(ours), exact, 1e-6)
    loaded = bench.logits(bench.peft_model([tmp_path / "out"]))
    assert float((loaded - bench.expected_logits(exact)).abs().max()) < 1e-4


def test_a_bfloat16_base_takes_no_digits_from_cat(bench: Bench, tmp_path: Path) -> None:
    base = bench.base(torch.bfloat16)
    adapters, weights = [bench.adapter("a"), bench.adapter("b")], (0.7, 0.3)
    ours = bench.weighted(adapters, weights, tmp_path / "out", "cat", base=str(base))
    bench.assert_equal(ours, bench.peft_weighted(adapters, weights, "cat"))
    assert {v.dtype for v in bench.peft_weighted(adapters, weights, "cat", base=base).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["linear", "ties", "cat", "svd", "magnitude_prune_svd"])
def test_merges_of_rank_patterns_load_again(bench: Bench, kind: str, tmp_path: Path) -> None:
    """PEFT saves rank_pattern = {} beside factors of several ranks (issue 3737)."""
    adapters = [bench.adapter("patterns"), bench.adapter("patterns-too")]
    options: dict[str, Any] = {"density": 0.5} if kind.startswith(("ties", "magn")) else {}
    ours = bench.weighted(adapters, (0.8, -0.3), tmp_path / "out", kind, **options)
    model = bench.peft_model([tmp_path / "out"])
    bench.assert_equal(peft.get_peft_model_state_dict(model, adapter_name="s0"), ours)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "scaling", None), dict):
            assert module.scaling["s0"] == 1.0, name


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], []])
def test_a_weight_for_every_adapter(bench: Bench, weights: list[float], tmp_path: Path) -> None:
    adapters = [str(bench.adapter("a")), str(bench.adapter("b"))]
    with pytest.raises(ManifestError, match=f"{len(weights)} weights for 2 adapters"):
        merger.add_weighted_adapter(adapters, weights, tmp_path / "out", combination_type="cat")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("dora", "is dora"),
        ("lora-bias", r"\.bias"),
        ("saved-head", "lm_head"),
        ("saved-norm", "model.norm"),
        ("pissa", "pissa"),
        ("olora", "olora"),
        ("replicated", "layer_replication"),
        ("tokens", "trainable tokens"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_peft_loses_is_refused_by_name(bench: Bench, name: str, message: str, first: bool, tmp_path: Path) -> None:
    adapters = [str(bench.adapter(name)), str(bench.adapter("a"))]
    with pytest.raises(RefusedError, match=message):
        merger.add_weighted_adapter(
            adapters if first else adapters[::-1], [1.0, 1.0], tmp_path / "out", combination_type="cat"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"kasa_config": {"rank": 2}}, "KaSA"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "ADALORA"}, "adalora"),
        ({"r": 4}, "rank 8 on disk and 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_changes_the_numbers_is_refused_by_name(
    bench: Bench, fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    name = "-".join(f"{k}-{v}" for k, v in fields.items()).replace("/", "")
    adapters = [str(bench.adapter("b")), str(bench.edited("a", name, **fields))]
    with pytest.raises(RefusedError, match=message):
        merger.add_weighted_adapter(adapters, [1.0, 1.0], tmp_path / "out", combination_type="cat")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("names", [("a", "large"), ("a", "patterns")])
def test_factors_of_different_ranks_are_refused(
    bench: Bench, kind: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    options: dict[str, Any] = {} if kind == "linear" else {"density": 0.5}
    with pytest.raises(RefusedError, match="ranks differ"):
        bench.weighted([bench.adapter(n) for n in names], (1.0, 1.0), tmp_path / "out", kind, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_that_keeps_nothing_is_refused(bench: Bench, kind: str, tmp_path: Path) -> None:
    """PEFT divides by zero: NaN, or an error of LAPACK."""
    with pytest.raises(ManifestError, match="density"):
        bench.weighted([bench.adapter("a"), bench.adapter("b")], (1.0, 1.0), tmp_path / "out", kind, density=0.0)


@pytest.mark.parametrize("kind", ["ties", "dare_linear", "magnitude_prune_svd"])
@pytest.mark.parametrize("density", [None, -0.1, 1.5])
def test_a_density_in_bounds_is_demanded(bench: Bench, kind: str, density: float | None, tmp_path: Path) -> None:
    adapters = [bench.adapter("a"), bench.adapter("b")]
    with pytest.raises(ManifestError, match="density"):
        bench.weighted(adapters, (1.0, 1.0), tmp_path / "out", kind, density=density)


@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_the_rank_follows_from_the_config_as_in_peft(bench: Bench, kind: str, tmp_path: Path) -> None:
    """r is 8 and rank_pattern makes every module 4: PEFT's svd keeps rank 8, which here is the exact sum."""
    adapters = [bench.adapter("narrowed"), bench.edited("narrowed", "narrowed-too", lora_alpha=4)]
    weights = (0.5, -1.25)
    theirs = bench.peft_weighted(adapters, weights, kind)
    ours = bench.weighted(adapters, weights, tmp_path / "out", kind)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    bench.assert_close(bench.products(ours), bench.products(theirs), 1e-5)
