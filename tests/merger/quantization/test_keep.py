"""output.quantization: what is untouched keeps its bytes, what is touched is quantised again or dense, and it loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import merger
from merger.errors import RefusedError
from merger.quantization.pieces import E2M1
from merger.quantization.recode import narrow, narrow_e2m1, narrow_e4m3, powers
from tests.merger.quantization.test_columns import awq, gptq
from tests.merger.quantization.test_compressed import checkpoint as compressed
from tests.merger.quantization.test_eetq import checkpoint as eetq
from tests.merger.quantization.test_fp8 import checkpoint as fp8
from tests.merger.quantization.test_modelopt import checkpoint as modelopt
from tests.merger.quantization.test_mxfp4 import adapter as gpt_oss_adapter
from tests.merger.quantization.test_mxfp4 import gpt_oss
from tests.merger.quantization.test_quark import checkpoint as quark
from tests.merger.quantization.test_torchao import checkpoint as torchao
from tests.quantised import QuantBench, decoded, delta, stored

Make = Callable[[QuantBench], Path]

KEPT: dict[str, tuple[Make, float, float]] = {
    "fp8-blocks": (lambda b: fp8(b, "blocks"), 2**-4, 2**-10),
    "fp8-ragged": (lambda b: fp8(b, "ragged"), 2**-4, 2**-10),
    "fp8-tensor": (lambda b: fp8(b, "tensor"), 2**-4, 2**-10),
    "fp8-rows": (lambda b: fp8(b, "rows"), 2**-4, 2**-10),
    "compressed-fp8-tensor": (lambda b: compressed(b, "fp8-tensor"), 2**-4, 2**-10),
    "compressed-fp8-channel": (lambda b: compressed(b, "fp8-channel"), 2**-4, 2**-10),
    "compressed-fp8-block": (lambda b: compressed(b, "fp8-block"), 2**-4, 2**-10),
    "compressed-int8": (lambda b: compressed(b, "int8"), 0.0, 0.5 / 127),
    "compressed-int8-tensor": (lambda b: compressed(b, "int8-tensor"), 0.0, 0.5 / 127),
    "compressed-nvfp4": (lambda b: compressed(b, "nvfp4"), 0.28, 1 / 22),
    "compressed-mxfp4": (lambda b: compressed(b, "mxfp4"), 0.25, 1 / 14),
    "torchao-int8": (lambda b: torchao(b, "int8"), 0.0, 0.5 / 127),
    "torchao-float8": (lambda b: torchao(b, "float8"), 2**-4, 2**-10),
    "torchao-mxfp8": (lambda b: torchao(b, "mxfp8"), 2**-4, 2**-10),
    "eetq": (eetq, 0.0, 0.51 / 127),
    "modelopt-fp8": (lambda b: modelopt(b, "fp8", where="both"), 2**-4, 2**-10),
    "modelopt-fp8-rows": (lambda b: modelopt(b, "fp8-rows"), 2**-4, 2**-10),
    "quark-fp8-rows": (lambda b: quark(b, "fp8-rows"), 2**-4, 2**-10),
    "modelopt-int8": (lambda b: modelopt(b, "int8"), 0.0, 0.5 / 127),
    "modelopt-nvfp4": (lambda b: modelopt(b, "nvfp4"), 0.28, 1 / 22),
    "modelopt-mxfp4": (lambda b: modelopt(b, "mxfp4"), 0.25, 1 / 14),
}
"""Checkpoint; half a step of its codes, relative to the value and to the largest value of the tensor."""


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(
        torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    )  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_keep_writes_touched_tensors_back_and_copies_the_rest(
    quant_bench: QuantBench, kind: str, tmp_path: Path
) -> None:
    make, relative, smallest = KEPT[kind]
    path, deltas = make(quant_bench), delta(quant_bench.adapter())
    made, before = quant_bench.fold(path, tmp_path / "out", quantization="keep"), stored(path)
    assert set(made) == set(before)
    configs = [json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "out")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    touched = {name.rpartition(".")[0] for name in deltas}
    for name, value in before.items():
        if name.rpartition(".")[0] in touched:
            assert made[name].dtype == value.dtype
            assert made[name].shape == value.shape
        else:
            assert same_bytes(made[name], value), name
    ours, old = decoded(tmp_path / "out"), decoded(path)
    for name, change in deltas.items():
        if name not in old:  # dense there
            torch.testing.assert_close(made[name].double(), before[name].double() + change, rtol=2**-8, atol=1e-6)
            continue
        exact = (old[name].double() + change).float()
        error = (ours[name] - exact).abs()
        largest = float(exact.abs().max())
        assert bool((error <= 1.01 * torch.clamp(exact.abs() * relative, min=largest * smallest)).all()), name
        assert not torch.equal(ours[name], old[name])


@pytest.mark.parametrize(
    "kind, part", [("compressed-nvfp4", "weight_global_scale"), ("modelopt-nvfp4", "weight_scale_2")]
)
def test_the_factor_of_a_whole_tensor_is_of_the_merged_weights(
    quant_bench: QuantBench, kind: str, part: str, tmp_path: Path
) -> None:
    """Scales of 8 bits reach down to 2⁻⁹: without it the blocks of small weights would be 0. Of layers alone."""
    path = KEPT[kind][0](quant_bench)
    made, old = quant_bench.fold(path, tmp_path / "out", quantization="keep"), decoded(path)
    alone = {name: change for name, change in delta(quant_bench.adapter()).items() if "down_proj" in name}
    assert alone
    for name, change in alone.items():
        largest = float((old[name].double() + change).abs().max())
        factor = float(made[f"{name.removesuffix('weight')}{part}"])
        assert (1 / factor if part == "weight_global_scale" else factor) == pytest.approx(largest / 2688, rel=1e-6)


def factors_of(path: Path) -> dict[str, float]:
    return {name: float(value) for name, value in stored(path).items() if name.endswith("weight_scale_2")}


def test_layers_that_run_as_one_keep_one_factor(quant_bench: QuantBench, tmp_path: Path) -> None:
    """vLLM 0.33 takes the largest of q's, k's and v's factors for all three, and reads those of another one wrongly."""
    path = modelopt(quant_bench, "nvfp4", fused=True)
    adapter = quant_bench.adapter(("q_proj", "v_proj", "up_proj"))
    quant_bench.fold(path, tmp_path / "out", adapter, quantization="keep")
    assert factors_of(tmp_path / "out") == factors_of(path)
    report = json.loads((tmp_path / "out" / "raymerge-report.json").read_text())
    assert "beyond-factor" not in {warning["code"] for warning in report["warnings"]}
    ours, old = decoded(tmp_path / "out"), decoded(path)
    for name, change in delta(adapter).items():
        exact = (old[name].double() + change).float()
        bound = torch.clamp(exact.abs() * 0.28, min=float(exact.abs().max()) / 22)
        assert bool(((ours[name] - exact).abs() <= 1.01 * bound).all()), name


def test_weights_beyond_a_shared_factor_get_their_own_and_are_told(quant_bench: QuantBench, tmp_path: Path) -> None:
    path = modelopt(quant_bench, "nvfp4", fused=True)
    adapter = quant_bench.adapter(("q_proj", "v_proj", "down_proj"))
    manifest = {
        "base_model": str(path), "adapters": [{"adapter": str(adapter), "parameters": {"weight": 12}}],
        "merge_method": "task_arithmetic", "output": {"path": str(tmp_path / "out"), "kind": "model"},
    }  # fmt: skip
    report = merger.merge(manifest)
    (told,) = [warning for warning in report.warnings if warning.code == "beyond-factor"]
    ours, before, old = factors_of(tmp_path / "out"), factors_of(path), decoded(path)
    changed = {name.partition(".weight_scale_2")[0] for name in ours if ours[name] != before[name]}
    grown = {name.removesuffix(".weight"): (old[name].double() + 12 * d) for name, d in delta(adapter).items()}
    far = {
        name for name, value in grown.items()
        if float(value.abs().max()) > 7 / 6 * 2688 * before[f"{name}.weight_scale_2"]
    }  # fmt: skip
    assert changed == far | {name for name in grown if "down_proj" in name}
    partnered = {name for name in far if "down_proj" not in name}
    assert partnered
    assert all(f"{name}.weight (" in told.where for name in partnered)
    assert told.what.startswith(f"{len(partnered)} tensor(s)")
    for name in partnered:
        assert ours[f"{name}.weight_scale_2"] == pytest.approx(float(grown[name].abs().max()) / 2688, rel=1e-6)


@pytest.mark.parametrize("kind", ["fp8-blocks", "compressed-fp8-channel"])
def test_what_is_kept_loads_in_transformers(quant_bench: QuantBench, kind: str, tmp_path: Path) -> None:
    path = KEPT[kind][0](quant_bench)
    quant_bench.fold(path, tmp_path / "kept")
    quant_bench.fold(path, tmp_path / "dense", quantization="none")
    kept, dense = (quant_bench.logits(tmp_path / p, torch.bfloat16) for p in ("kept", "dense"))
    assert float((kept - dense).abs().max()) < 0.15 * float(dense.abs().max())
    assert float((kept - dense).norm() / dense.norm()) < 0.1


@pytest.mark.parametrize("kind", ["fp8-blocks", "compressed-int4-zeros", "awq"])
def test_mixed_writes_touched_modules_and_their_partners_dense(
    quant_bench: QuantBench, kind: str, tmp_path: Path
) -> None:
    makes: dict[str, tuple[Make, str]] = {
        "fp8-blocks": (lambda b: fp8(b, "blocks"), "modules_to_not_convert"),
        "compressed-int4-zeros": (lambda b: compressed(b, "int4-zeros"), "ignore"),
        "awq": (awq, "modules_to_not_convert"),
    }
    make, key = makes[kind]
    path, adapter = make(quant_bench), quant_bench.adapter(("q_proj",))
    made = quant_bench.fold(path, tmp_path / "out", adapter, quantization="mixed")
    before, deltas, old = stored(path), delta(adapter), decoded(path)
    scheme = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config")
    partners = {n.replace("q_proj", p) for n in deltas for p in ("q_proj", "k_proj", "v_proj")} & set(old)
    for name in partners:
        exact = old[name].double() + deltas.get(name, torch.zeros(()))
        torch.testing.assert_close(made[name].double(), exact, rtol=2**-8, atol=1e-6)
    kept = {n for n in before if not any(n.startswith(f"{p.rpartition('.')[0]}.") for p in partners)}
    assert all(same_bytes(made[n], before[n]) for n in kept)
    assert set(made) == kept | partners
    if kind == "awq":  # only q and k are quantised there, so nothing of the scheme is left
        assert scheme is None
    else:
        assert {n.rpartition(".")[0] for n in partners} | {"lm_head"} == set(scheme[key])
        found = quant_bench.logits(tmp_path / "out", torch.bfloat16)
        quant_bench.fold(path, tmp_path / "dense", adapter, quantization="none")
        dense = quant_bench.logits(tmp_path / "dense", torch.bfloat16)
        assert float((found - dense).abs().max()) < 0.05 * float(dense.abs().max())


@pytest.mark.parametrize(
    "make, asked, said",
    [
        (lambda b: compressed(b, "int4-group"), None, "calibration"),
        (lambda b: gptq(b, 4), "keep", "calibration or a table"),
        (lambda b: gptq(b, 4), "mixed", "no list of single modules"),
        (lambda b: b.base(), "mixed", "needs a quantised base"),
    ],
)
def test_what_cannot_be_written_so_is_refused_with_a_way_out(
    quant_bench: QuantBench, make: Make, asked: str | None, said: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {} if asked is None else {"quantization": asked}
    with pytest.raises(RefusedError, match=said) as refused:
        quant_bench.fold(make(quant_bench), tmp_path / "out", **options)
    assert all(p.fix for p in refused.value.problems)
    assert len(refused.value.problems) == len({p.why for p in refused.value.problems}), "each reason is said once"
    assert not (tmp_path / "out").exists()


def test_gpt_oss_keeps_its_experts_while_attention_is_folded(quant_bench: QuantBench, tmp_path: Path) -> None:
    path, adapter = gpt_oss(quant_bench), gpt_oss_adapter(quant_bench)
    made, before = quant_bench.fold(path, tmp_path / "out", adapter), stored(path)
    assert set(made) == set(before)
    for name, value in before.items():
        assert same_bytes(made[name], value) == (name not in delta(adapter)), name
    expected = quant_bench.logits(path, torch.bfloat16, adapter)
    found = quant_bench.logits(tmp_path / "out", torch.bfloat16)
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_merged_gpt_oss_models_are_quantised_again(quant_bench: QuantBench, tmp_path: Path) -> None:
    paths = [gpt_oss(quant_bench, seed) for seed in (0, 1)]
    merger.merge({
        "merge_method": "linear", "models": [{"model": str(p), "parameters": {"weight": 1.0}} for p in paths],
        "output": {"path": str(tmp_path / "out")},
    })  # fmt: skip
    assert set(stored(tmp_path / "out")) == set(stored(paths[0]))
    first, second, made = (decoded(p) for p in (*paths, tmp_path / "out"))
    for name, value in made.items():
        exact = (first[name] + second[name]) / 2
        # Blocks of 32 inputs, which lie along the rows.
        blocks = exact.reshape(exact.shape[0], -1, 32, exact.shape[2])
        largest = blocks.abs().amax(2, keepdim=True).expand(blocks.shape).reshape(exact.shape)
        assert bool(((value - exact).abs() <= torch.maximum(exact.abs() / 4, largest / 8) * 1.01).all())
    assert bool(quant_bench.logits(tmp_path / "out", torch.bfloat16).isfinite().all())


def test_the_same_merge_of_equal_checkpoints_keeps_their_bytes(quant_bench: QuantBench, tmp_path: Path) -> None:
    """A slice of one FP8 model: what a frankenmerge hands on is copied, layer by layer."""
    path = fp8(quant_bench, "blocks")
    layers = [{"sources": [{"model": str(path), "layer_range": [i, i + 1]}]} for i in (0, 1, 0)]
    merger.merge({"merge_method": "passthrough", "slices": layers, "output": {"path": str(tmp_path / "out")}})
    made, before = stored(tmp_path / "out"), stored(path)
    assert len([n for n in made if n.endswith("weight_scale_inv")]) == 21
    for name, value in made.items():
        source = name.replace("layers.2.", "layers.0.")
        assert same_bytes(value, before[source])


def test_bytes_do_not_depend_on_memory_or_workers(quant_bench: QuantBench, tmp_path: Path) -> None:
    from merger.planning.memory import peak_bytes
    from merger.verify import verify_output

    for kind in ("ragged", "tensor"):
        manifest = {
            "base_model": str(fp8(quant_bench, kind)), "adapters": [{"adapter": str(quant_bench.adapter())}],
            "output": {"kind": "model"},
        }  # fmt: skip
        wide = merger.merge(manifest, tmp_path / f"wide-{kind}", workers=1)
        needed = peak_bytes(merger.plan(manifest, tmp_path / "narrow"))
        narrow_ = merger.merge(manifest, tmp_path / f"narrow-{kind}", workers=2, memory=2 * needed + 1000)
        assert wide.content_digest == narrow_.content_digest
        assert verify_output(str(tmp_path / f"narrow-{kind}"), replay=None).replayed > 0


# ---------------------------------------------------------------- codes


def values() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20000, generator=generator) * torch.logspace(-4, 3, 20000)
    return torch.cat(
        [spread, torch.tensor([0.0, -0.0, 448, -448, 500, 1e9, 2**-9, 2**-10, 3 * 2**-10, 1.0625, 1.1875])]
    )


def test_e4m3_codes_are_torchs() -> None:
    x = values().clamp(-448, 448)
    expected = x.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(torch.from_numpy(narrow_e4m3(values().numpy())), expected)
    wide = values().clamp(-57344, 57344)
    assert torch.equal(torch.from_numpy(narrow(wide.numpy(), "e5m2")), wide.to(torch.float8_e5m2).view(torch.uint8))


def test_e2m1_codes_are_the_nearest_and_ties_go_to_even() -> None:
    x = torch.cat([values(), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])]).numpy()
    codes = narrow_e2m1(x)
    for value, code in zip(x.clip(-6, 6).tolist(), codes.tolist(), strict=True):
        distances = np.abs(E2M1[:8].astype(np.float64) - abs(value))
        nearest = np.flatnonzero(distances == distances.min())
        assert code & 7 in nearest
        if len(nearest) == 2:
            assert code % 2 == 0
        assert bool(code >> 3) == bool(np.signbit(np.float32(value)))


def test_a_block_fits_under_its_power_of_two() -> None:
    grid = np.array([[0.0, 1.0, 6.0, 6.99, 7.0, 12.0, 2.0**-120, 3e38]], np.float32)
    scale = 2.0 ** (powers(grid, "e2m1").astype(np.float64) - 127)
    assert bool((grid[0] / scale[0] < 7.0).all())
    assert bool((grid[0, 1:-1] / scale[0, 1:-1] >= 3.5).all())
