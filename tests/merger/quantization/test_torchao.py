"""torchao's tensor classes, from files written by the slow packers below, and by torchao where it is installed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import merger
from merger.catalog import inspect_source
from merger.errors import RefusedError
from tests.quantised import QuantBench, decoded, delta, stored

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def said(kind: str, data: dict[str, Any], *names: str) -> str:
    typed = {k: {"_type": "torch.dtype", "_data": v} if k.endswith("dtype") else v for k, v in data.items()}
    return json.dumps({"_type": kind, "_data": typed, "_tensor_data_names": list(names)})


def cut(weight: Tensor, wide: int) -> Tensor:
    return weight.double().reshape(len(weight), -1, wide)


def int8(weight: Tensor) -> tuple[dict[str, Tensor], str, Tensor]:
    """One scale a row; zero points are stored, and 0."""
    scale = (weight.double().abs().amax(1, keepdim=True) / 127.5).float()
    codes = torch.round(weight.double() / scale.double()).clamp(-128, 127)
    parts = {"qdata": codes.to(torch.int8), "scale": scale, "zero_point": torch.zeros(scale.shape, dtype=torch.int8)}
    data = {"act_quant_kwargs": None, "reduce_range": False, "block_size": [1, weight.shape[1]], "dtype": "bfloat16"}
    return parts, said("Int8Tensor", data, *parts), codes * scale.double()


def intx(weight: Tensor) -> tuple[dict[str, Tensor], str, Tensor]:
    """Codes of 4 bits in bytes, groups of 32 with zero points."""
    groups = cut(weight, 32)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).bfloat16().double().clamp(min=1e-6)
    zero = torch.round(-8 - low / scale).clamp(-8, 7)
    codes = torch.round(groups / scale + zero).clamp(-8, 7)
    exact = ((codes - zero) * scale).reshape(weight.shape)
    parts = {"qdata": codes.reshape(weight.shape).to(torch.int8), "scale": scale[..., 0].bfloat16(),
             "zero_point": zero[..., 0].to(torch.int8)}  # fmt: skip
    data = {"target_dtype": "int4", "block_size": [1, 32], "dtype": "bfloat16", "activation_quantization": None}
    return parts, said("IntxUnpackedToInt8Tensor", data, *parts), exact


def float8(weight: Tensor) -> tuple[dict[str, Tensor], str, Tensor]:
    scale = (weight.double().abs().amax(1, keepdim=True) / 448).float()
    codes = (weight.double() / scale.double()).float().to(torch.float8_e4m3fn)
    parts = {"qdata": codes, "scale": scale}
    data = {"block_size": [1, weight.shape[1]], "mm_config": None, "act_quant_kwargs": None, "dtype": "bfloat16"}
    return parts, said("Float8Tensor", data, *parts), codes.double() * scale.double()


def int4(weight: Tensor) -> tuple[dict[str, Tensor], str, Tensor]:
    """Signed codes, two a byte, the first low; scales and zeros (groups, out); the zero is added."""
    groups = cut(weight, 32)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).bfloat16().double().clamp(min=1e-6)
    zero = (low + 8 * scale).bfloat16().double()
    codes = torch.round((groups - zero) / scale).clamp(-8, 7)
    exact = (codes * scale + zero).reshape(weight.shape)
    nibbles = codes.reshape(weight.shape).long() & 15
    parts = {
        "qdata": (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8).view(torch.int8),
        "scale": scale[..., 0].T.bfloat16(), "zero_point": zero[..., 0].T.bfloat16(),
    }  # fmt: skip
    data = {"block_size": [1, 32], "shape": list(weight.shape), "activation_dtype": "bfloat16"}
    return parts, said("Int4Tensor", data, *parts), exact


def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes of E2M1 two a byte, the first low; what they stand for)."""
    levels = torch.tensor(E2M1, dtype=torch.float64)
    nearest = (values.abs()[..., None] - levels).abs().argmin(-1)
    codes = nearest + 8 * (values < 0)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), torch.copysign(levels[nearest], values)


def swizzle(scales: Tensor) -> Tensor:
    """Rows and columns of scales one by one into cuBLAS' blocks of 128 × 4."""
    rows, cols = scales.shape
    high, wide = -(-rows // 128), -(-cols // 4)
    out = torch.zeros(high * wide * 512, dtype=scales.dtype)
    for r in range(rows):
        for c in range(cols):
            out[((r // 128) * wide + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] = scales[r, c]
    return out.reshape(32 * high, 16 * wide)


def nvfp4(weight: Tensor, *, swizzled: bool = True) -> tuple[dict[str, Tensor], str, Tensor]:
    groups = cut(weight, 16)
    whole = (weight.double().abs().max() / (448 * 6)).float()
    scale = (groups.abs().amax(2) / 6 / whole.double()).float().to(torch.float8_e4m3fn)
    step = (scale.double() * whole.double()).repeat_interleave(16, 1)
    codes, values = pairs(weight.double() / step)
    held = swizzle(scale.view(torch.uint8)).view(torch.float8_e4m3fn) if swizzled else scale
    parts = {"qdata": codes, "scale": held, "per_tensor_scale": whole}
    data = {"block_size": 16, "orig_dtype": "bfloat16", "is_swizzled_scales": swizzled, "act_quant_kwargs": None}
    return parts, said("NVFP4Tensor", data, *parts), values * step


def nvfp4_plain(weight: Tensor) -> tuple[dict[str, Tensor], str, Tensor]:
    return nvfp4(weight, swizzled=False)


def mxfp8(weight: Tensor) -> tuple[dict[str, Tensor], str, Tensor]:
    exponent = torch.ceil(torch.log2(cut(weight, 32).abs().amax(2) / 448))
    step = (2.0**exponent).repeat_interleave(32, 1)
    codes = (weight.double() / step).float().to(torch.float8_e4m3fn)
    parts = {"qdata": codes, "scale": (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)}
    data = {"elem_dtype": "float8_e4m3fn", "block_size": 32, "orig_dtype": "bfloat16", "is_swizzled_scales": False}
    return parts, said("MXTensor", data, *parts), codes.double() * step


KINDS: dict[str, Callable[[Tensor], tuple[dict[str, Tensor], str, Tensor]]] = {
    "int8": int8, "intx": intx, "float8": float8, "int4": int4, "nvfp4": nvfp4, "nvfp4-plain": nvfp4_plain,
    "mxfp8": mxfp8,
}  # fmt: skip
ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
SCHEME: dict[str, Any] = {"quant_method": "torchao", "quant_type": {"default": {}}, "modules_to_not_convert": None}


def checkpoint(bench: QuantBench, kind: str) -> Path:
    """As transformers saves a model of torchao's classes: parts in the tensors, classes in the header."""
    words: dict[str, str] = {}

    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith(ATTENTION):
            words[name] = json.dumps({"_type": "Tensor"})
            made = None
        else:
            parts, words[name], _ = KINDS[kind](weight)
            made = {f"{name.removesuffix('weight')}_weight_{part}": value for part, value in parts.items()}
        words["tensor_names"] = json.dumps([name for name in words if name != "tensor_names"])
        return made

    return bench.edited(f"torchao-{kind}", SCHEME, edit, metadata=words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 7])
def test_weights_are_those_of_the_layout(quant_bench: QuantBench, kind: str, step: int) -> None:
    original = stored(quant_bench.base())
    ours = decoded(checkpoint(quant_bench, kind), step=step)
    assert len(ours) == 8
    for name, value in ours.items():
        exact = KINDS[kind](original[name])[2]
        torch.testing.assert_close(value.double(), exact, rtol=3e-7, atol=1e-9)


def test_inspect_says_what_it_is(quant_bench: QuantBench) -> None:
    catalog = inspect_source(str(checkpoint(quant_bench, "int4")))
    assert catalog.quantization is not None
    assert catalog.quantization.as_json(catalog.tensors) == {
        "method": "torchao", "kind": "int4", "tensors": 8, "default": "none",
    }  # fmt: skip
    assert set(catalog.tensors) == set(stored(quant_bench.base()))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_fold_is_dense_and_its_header_says_no_class(quant_bench: QuantBench, kind: str, tmp_path: Path) -> None:
    path, deltas = checkpoint(quant_bench, kind), delta(quant_bench.adapter())
    made = quant_bench.fold(path, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(made) == set(stored(quant_bench.base()))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, value in decoded(path).items():
        exact = value.double() + deltas.get(name, torch.zeros(()))
        torch.testing.assert_close(made[name].double(), exact, rtol=2**-8, atol=1e-6)
    assert bool(quant_bench.logits(tmp_path / "out").isfinite().all())


def test_a_quantised_donor_merges_as_dense(quant_bench: QuantBench, tmp_path: Path) -> None:
    path = checkpoint(quant_bench, "intx")
    merger.merge({
        "merge_method": "linear", "models": [
            {"model": str(quant_bench.base()), "parameters": {"weight": 3.0}},
            {"model": str(path), "parameters": {"weight": 1.0}},
        ], "output": {"path": str(tmp_path / "out")},
    })  # fmt: skip
    made, original = stored(tmp_path / "out"), stored(quant_bench.base())
    for name, value in decoded(path).items():
        exact = (value.double() + 3 * original[name].double()) / 4
        torch.testing.assert_close(made[name].double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("mode", ["keep", "mixed"])
def test_the_header_of_what_is_kept_says_the_class_of_each_tensor(
    quant_bench: QuantBench, mode: str, tmp_path: Path
) -> None:
    path = checkpoint(quant_bench, "int8")
    quant_bench.fold(path, tmp_path / "out", quant_bench.adapter(("q_proj",)), quantization=mode)
    with safe_open(path / "model.safetensors", "pt") as file:
        before = file.metadata()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        after, held = file.metadata(), set(file.keys())
    assert set(json.loads(after["tensor_names"])) == set(json.loads(before["tensor_names"]))
    dense = {n for n in before if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and mode == "mixed"}
    assert len(dense) == (6 if mode == "mixed" else 0)
    for name in json.loads(before["tensor_names"]):
        if name in dense:
            assert json.loads(after[name]) == {"_type": "Tensor"}
            assert name in held
        else:
            assert json.loads(after[name]) == json.loads(before[name])
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert set(listed or ()) == {name.removesuffix(".weight") for name in dense}


@pytest.mark.parametrize("kind", ["intx", "int4", "nvfp4"])
def test_what_cannot_be_written_back_is_refused(quant_bench: QuantBench, kind: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="cannot be written back") as refused:
        quant_bench.fold(checkpoint(quant_bench, kind), tmp_path / "out", quantization="keep")
    assert {p.fix for p in refused.value.problems} == {"write output.quantization: mixed, or none"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda w: w.replace("Int8Tensor", "Int4TilePackedTo4dTensor"), "Int4TilePackedTo4dTensor cannot be read"),
        (lambda w: w.replace('"scale"]', '"scale", "act_pre_scale"]'), "lacks act_pre_scale"),
        (lambda w: w.replace('"block_size": [1, ', '"block_size": [3, '), "do not fit each other"),
        (lambda w: w.replace("Int8Tensor", "Novel"), "Novel cannot be read"),
    ],
)
def test_other_classes_and_broken_headers_are_refused(
    quant_bench: QuantBench, change: Callable[[str], str], why: str, tmp_path: Path
) -> None:
    words: dict[str, str] = {}

    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if "q_proj" not in name:
            return None
        parts, text, _ = int8(weight)
        parts.pop("zero_point")
        words[name] = change(text.replace(', "zero_point"', ""))
        words["tensor_names"] = json.dumps([n for n in words if n != "tensor_names"])
        return {f"{name.removesuffix('weight')}_weight_{part}": value for part, value in parts.items()}

    path = quant_bench.edited(f"torchao-broken-{len(why)}", SCHEME, edit, metadata=words)
    with pytest.raises(RefusedError, match=why):
        quant_bench.fold(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_smoothed_inputs_are_refused(quant_bench: QuantBench, tmp_path: Path) -> None:
    words = {"tensor_names": "[]"}

    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if "q_proj" not in name:
            return None
        parts, text, _ = int8(weight)
        parts["act_pre_scale"] = torch.ones(weight.shape[1])
        words[name] = text.replace('"zero_point"]', '"zero_point", "act_pre_scale"]')
        return {f"{name.removesuffix('weight')}_weight_{part}": value for part, value in parts.items()}

    path = quant_bench.edited("torchao-smoothed", SCHEME, edit, metadata=words)
    with pytest.raises(RefusedError, match="inputs that are scaled first"):
        quant_bench.fold(path, tmp_path / "out")


# ---------------------------------------------------------------- with torchao itself


def written(bench: QuantBench, kind: str) -> Path:
    """A checkpoint that transformers and torchao wrote."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: see the extra oracles")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    configs: dict[str, Callable[[], Any]] = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8-dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
        "float8": quantization.Float8WeightOnlyConfig,
        "intx": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, "int4"),  # noqa: B009 - a dtype that torch does not annotate
            granularity=quantization.PerGroup(32)
        ),
    }  # fmt: skip
    path = bench.root / f"torchao-written-{kind}"
    if not path.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: Any = TorchAoConfig
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(bench.base()), dtype=torch.bfloat16, quantization_config=config(configs[kind]())
            )
            model.save_pretrained(str(path))
    return path


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "float8", "intx"])
def test_weights_are_those_of_torchao(quant_bench: QuantBench, kind: str) -> None:
    path = written(quant_bench, kind)
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(path / "model.safetensors", "pt") as file:
        theirs, _ = unflatten_tensor_state_dict(stored(path), file.metadata())
    ours = decoded(path, step=7)
    assert len(ours) == 14
    for name, value in ours.items():
        if kind == "intx":  # it dequantises to its own dtype alone
            torch.testing.assert_close(value, theirs[name].dequantize().float(), rtol=2**-8, atol=1e-6)
        else:
            assert torch.equal(value, theirs[name].dequantize(torch.float32))


@pytest.mark.parametrize("kind", ["int8", "float8", "intx"])
def test_logits_are_those_of_torchaos_model_with_the_adapter_on_it(
    quant_bench: QuantBench, kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    path = written(quant_bench, kind)
    quant_bench.fold(path, tmp_path / "out")
    expected = quant_bench.logits(path, torch.bfloat16, quant_bench.adapter())
    found = quant_bench.logits(tmp_path / "out", torch.bfloat16)
    error = float((found - expected).norm() / expected.norm())
    record_property("logits", error)
    assert error < 0.03


@pytest.mark.parametrize("kind, mode", [("int8", "keep"), ("float8", "keep"), ("int8", "mixed"), ("intx", "mixed")])
def test_what_is_kept_loads_in_torchao(quant_bench: QuantBench, kind: str, mode: str, tmp_path: Path) -> None:
    path, adapter = written(quant_bench, kind), quant_bench.adapter(("q_proj",))
    quant_bench.fold(path, tmp_path / "kept", adapter, quantization=mode)
    quant_bench.fold(path, tmp_path / "dense", adapter)
    kept, dense = (quant_bench.logits(tmp_path / name, torch.bfloat16) for name in ("kept", "dense"))
    # Quantised again: half a step of 8-bit floats is 2⁻⁴ of a weight.
    assert float((kept - dense).norm() / dense.norm()) < (0.1 if kind == "float8" else 0.05)
