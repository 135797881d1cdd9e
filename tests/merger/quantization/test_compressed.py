"""Checkpoints that the compressed-tensors library compressed, against its own decompression and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.quantization.utils.helpers import generate_gparam
from torch import Tensor

from merger.errors import RefusedError
from tests.quantised import QuantBench, decoded, delta, stored

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4-group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4-channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "int4-zeros": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "int4-channel-zeros": ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
    "int8-packed": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 64}),
    "int8-packed-zeros": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "int8-zeros": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-block": (
        "float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": torch.float8_e4m3fn},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
}  # fmt: skip


def scheme_of(kind: str) -> QuantizationScheme:
    form, weights = KINDS[kind]
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=form)


def spans(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """The weight as (…, elements that share a scale)."""
    rows, cols = weight.shape
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy == "tensor":
        return weight.reshape(1, -1)
    if strategy == "channel":
        return weight[:, None, :]
    if strategy == "block":
        high, wide = args.block_structure or [1, 1]
        return weight.reshape(rows // high, high, cols // wide, wide).transpose(1, 2).flatten(2)
    return weight.reshape(rows, -1, args.group_size or cols)


def compress(kind: str, weight: Tensor) -> dict[str, Tensor]:
    scheme = scheme_of(kind)
    assert scheme.weights is not None
    weight = weight.float()
    groups = spans(weight, scheme.weights)
    state: dict[str, Tensor] = {"weight": weight}
    if kind == "nvfp4":
        state["weight_global_scale"] = generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
    scale, zero = calculate_qparams(
        groups.amin(-1), groups.amax(-1), scheme.weights, state.get("weight_global_scale")
    )  # fmt: skip
    state |= {"weight_scale": scale.float(), "weight_zero_point": zero}
    if "zeros" in kind:
        state["weight_zero_point"] = torch.round(zero).to(torch.int8)
    made: dict[str, Tensor] = BaseCompressor.get_value_from_registry(KINDS[kind][0]).compress(state, scheme)
    return made


def decompress(kind: str, state: dict[str, Tensor]) -> Tensor:
    scheme = scheme_of(kind)
    if kind not in ("nvfp4", "mxfp4"):
        state = state | {"weight_scale": state["weight_scale"].float()}
    found: Tensor = BaseCompressor.get_value_from_registry(KINDS[kind][0]).decompress(dict(state), scheme)["weight"]
    return found.float()


def checkpoint(bench: QuantBench, kind: str) -> Path:
    form, _ = KINDS[kind]
    dumped = scheme_of(kind).model_dump(mode="json", exclude_none=True)
    config = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": dumped}, "dequantize": True,
    }  # fmt: skip

    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if "_proj" not in name:
            return None
        return {f"{name.removesuffix('.weight')}.{key}": value for key, value in compress(kind, weight).items()}

    return bench.edited(f"compressed-{kind}", config, edit)


def theirs(kind: str, path: Path) -> dict[str, Tensor]:
    tensors = stored(path)
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith("weight_scale")}
    return {
        f"{module}.weight": decompress(
            kind, {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{module}.")}
        )
        for module in modules
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 5])
def test_weights_are_those_of_the_library(quant_bench: QuantBench, kind: str, step: int) -> None:
    path = checkpoint(quant_bench, kind)
    ours, expected = decoded(path, step=step), theirs(kind, path)
    assert set(ours) == set(expected)
    assert len(ours) == 14
    # The library decompresses FP4 in bf16.
    relative = 2**-7 if kind in ("nvfp4", "mxfp4") else 1e-6
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=relative, atol=1e-9)


@pytest.mark.parametrize("kind", ["int4-zeros", "int8", "fp8-block", "nvfp4"])
def test_a_dense_fold_is_what_the_library_decompresses_plus_the_delta(
    quant_bench: QuantBench, kind: str, tmp_path: Path
) -> None:
    path, deltas = checkpoint(quant_bench, kind), delta(quant_bench.adapter())
    made = quant_bench.fold(path, tmp_path / "out", quantization="none")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(made) == set(stored(quant_bench.base()))
    for name, value in decoded(path).items():
        exact = value.double() + deltas.get(name, torch.zeros(()))
        torch.testing.assert_close(made[name].double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["int4-group", "fp8-channel"])
def test_logits_are_those_of_the_quantised_model_with_the_adapter_on_it(
    quant_bench: QuantBench, kind: str, tmp_path: Path
) -> None:
    path = checkpoint(quant_bench, kind)
    quant_bench.fold(path, tmp_path / "out", quantization="none")
    expected = quant_bench.logits(path, torch.bfloat16, quant_bench.adapter())
    found = quant_bench.logits(tmp_path / "out")
    # The library's model computes in bf16.
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 3, "type": "int"}}}}, "bit widths"),
    ],
)
def test_what_would_be_read_wrong_is_refused(
    quant_bench: QuantBench, changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = checkpoint(quant_bench, "int4-group")
    scheme = json.loads((path / "config.json").read_text())["quantization_config"]
    other = quant_bench.edited(f"compressed-{said}", scheme | changed, lambda name, value: None)
    (other / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    with pytest.raises(RefusedError, match=said):
        quant_bench.fold(other, tmp_path / "out", quantization="none")
