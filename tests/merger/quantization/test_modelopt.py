"""NVIDIA's Model Optimizer: FP8 and NVFP4 from files written below, and by modelopt where it is installed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from merger.catalog import inspect_source
from merger.errors import RefusedError
from merger.quantization.declare import partners_of
from tests.merger.quantization.test_torchao import pairs
from tests.quantised import QuantBench, decoded, delta, stored

KINDS = ("fp8", "fp8-rows", "nvfp4", "mxfp4", "int8")
FILE = "hf_quant_config.json"


def layer(weight: Tensor, kind: str, largest: float | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """(what follows `X.`, the weights that it stands for in float64). NVFP4's factor is of the `largest` magnitude."""
    w = weight.double()
    if kind in ("fp8", "fp8-rows"):
        scale = ((w.abs().max() if kind == "fp8" else w.abs().amax(1)) / 448).float()
        step = scale.double() if kind == "fp8" else scale.double()[:, None]
        codes = (w / step).float().to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, codes.double() * step
    if kind == "int8":
        scale = (w.abs().amax(1) / 127).float()
        codes = torch.round(w / scale.double()[:, None]).to(torch.int8)
        return {"weight": codes, "weight_scale": scale}, codes.double() * scale.double()[:, None]
    wide = 16 if kind == "nvfp4" else 32
    blocks = w.reshape(len(w), -1, wide).abs().amax(2)
    if kind == "mxfp4":
        exponent = torch.ceil(torch.log2(blocks / 6))
        step = (2.0**exponent).repeat_interleave(wide, 1)
        codes, values = pairs(w / step)
        return {"weight": codes, "weight_scale": (exponent + 127).to(torch.uint8)}, values * step
    whole = ((w.abs().max() if largest is None else torch.tensor(largest).double()) / (448 * 6)).float()
    scale = (blocks / 6 / whole.double()).float().to(torch.float8_e4m3fn)
    step = (scale.double() * whole.double()).repeat_interleave(wide, 1)
    codes, values = pairs(w / step)
    parts = {"weight": codes, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(0.5)}
    return parts, values * step


def said(kind: str) -> dict[str, Any]:
    """hf_quant_config.json."""
    named = {"quant_algo": kind.partition("-")[0].upper(), "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    return {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": named}


def checkpoint(bench: QuantBench, kind: str, *, where: str = "config", fused: bool = False) -> Path:
    """The scheme is said in config.json, in hf_quant_config.json, or in `both`. `fused`: q, k and v share NVFP4's
    factor, and gate and up, as the library leaves them."""
    base = stored(bench.base())

    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if "_proj" not in name:
            return None
        members = partners_of(name, base) if fused else {name}
        parts, _ = layer(weight, kind, max(float(base[member].abs().max()) for member in members))
        return {f"{name.removesuffix('weight')}{key}": value for key, value in parts.items()}

    algorithm = said(kind)["quantization"]["quant_algo"]
    scheme = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], "config_groups": {}}
    path = bench.edited(f"modelopt-{kind}-{where}{'-fused' * fused}", {} if where == "file" else scheme, edit)
    if where != "config":
        (path / FILE).write_text(json.dumps(said(kind)))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [7])
def test_weights_are_those_of_the_layout(quant_bench: QuantBench, kind: str, step: int) -> None:
    original, ours = stored(quant_bench.base()), decoded(checkpoint(quant_bench, kind), step=step)
    assert len(ours) == 14
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), layer(original[name], kind)[1], rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("where", ["config", "file", "both"])
def test_the_scheme_is_found_wherever_it_is_said(quant_bench: QuantBench, where: str) -> None:
    catalog = inspect_source(str(checkpoint(quant_bench, "nvfp4", where=where)))
    assert catalog.quantization is not None
    assert catalog.quantization.as_json(catalog.tensors) == {
        "method": "modelopt", "kind": "modelopt, nvfp4", "tensors": 14, "default": "keep",
    }  # fmt: skip
    assert not catalog.problems


@pytest.mark.parametrize(
    "where, mode", [("config", "mixed"), ("file", "keep"), ("file", "mixed"), ("both", "mixed"), ("both", "none")]
)
def test_both_files_say_what_became_of_the_scheme(
    quant_bench: QuantBench, where: str, mode: str, tmp_path: Path
) -> None:
    path, adapter = checkpoint(quant_bench, "fp8", where=where), quant_bench.adapter(("q_proj",))
    made, before = quant_bench.fold(path, tmp_path / "out", adapter, quantization=mode), stored(path)
    scheme = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config")
    beside = tmp_path / "out" / FILE
    assert (scheme is not None) == (where != "file" and mode != "none")
    assert beside.exists() == (where != "config" and mode != "none")
    dense = {n for n in before if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) and mode == "mixed"}
    modules = {name.removesuffix(".weight") for name in dense} | {"lm_head"}
    if scheme is not None:
        assert set(scheme["ignore"]) == modules
    if beside.exists():
        written = json.loads(beside.read_text())
        assert set(written["quantization"]["exclude_modules"]) == modules
        assert written["producer"] == said("fp8")["producer"]
    if mode == "none":
        assert set(made) == set(stored(quant_bench.base()))
    for name, change in delta(adapter).items():
        exact = decoded(path)[name].double() + change
        if mode == "keep":
            kept = decoded(tmp_path / "out")[name].double()
            assert bool(((kept - exact).abs() <= exact.abs() * 2**-4 * 1.01 + exact.abs().max() * 2**-10).all())
        else:
            torch.testing.assert_close(made[name].double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("part", ["pre_quant_scale", "svdquant_lora_a"])
def test_layers_with_more_than_a_weight_are_refused(quant_bench: QuantBench, part: str, tmp_path: Path) -> None:
    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if "q_proj" not in name:
            return None
        parts = layer(weight, "nvfp4")[0] | {part: torch.ones(128)}
        return {f"{name.removesuffix('weight')}{key}": value for key, value in parts.items()}

    path = quant_bench.edited(f"modelopt-{part}", {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, edit)
    with pytest.raises(RefusedError, match=f"changed inputs .{part}"):
        quant_bench.fold(path, tmp_path / "out", quantization="none")


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda p: {k: v for k, v in p.items() if k != "weight_scale"}, "cannot be read .NVFP4"),
        (lambda p: p | {"weight_scale": p["weight_scale"].float()}, "no floats of 4 bits"),
        (lambda p: p | {"weight_scale_2": torch.ones(2)}, "more than one weight_scale_2"),
        (lambda p: p | {"weight_scale": p["weight_scale"][:, :3]}, "scales of 128 × 3"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    quant_bench: QuantBench, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], why: str, tmp_path: Path
) -> None:
    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if "q_proj" not in name:
            return None
        parts = change(layer(weight, "nvfp4")[0])
        return {f"{name.removesuffix('weight')}{key}": value for key, value in parts.items()}

    path = quant_bench.edited(f"modelopt-{why}", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, edit)
    with pytest.raises(RefusedError, match=why):
        quant_bench.fold(path, tmp_path / "out", quantization="none")


def test_layers_of_mixed_precision_have_no_list_to_add_to(quant_bench: QuantBench, tmp_path: Path) -> None:
    path = quant_bench.edited(
        "modelopt-mixed-precision",
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "ignore": [], "quantized_layers": {}},
        lambda name, weight: {
            f"{name.removesuffix('weight')}{key}": value
            for key, value in layer(weight, "fp8" if "q_proj" in name else "nvfp4")[0].items()
        } if "_proj" in name else None,
    )  # fmt: skip
    assert len(quant_bench.fold(path, tmp_path / "dense", quantization="none")) == 21
    with pytest.raises(RefusedError, match="no list of single modules"):
        quant_bench.fold(path, tmp_path / "out", quantization="mixed")


# ---------------------------------------------------------------- with modelopt itself


def exported(bench: QuantBench, kind: str) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint that modelopt exports, and its own float32 weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq = pytest.importorskip(
            "modelopt.torch.quantization", reason="modelopt is not installed: see the extra oracles"
        )
        from modelopt.torch.export import export_hf_checkpoint
        from modelopt.torch.quantization.qtensor import NVFP4QTensor

        path = bench.root / f"modelopt-exported-{kind}"
        if not path.exists():
            configs = {"fp8": mtq.FP8_DEFAULT_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}
            model: Any = AutoModelForCausalLM.from_pretrained(str(bench.base()), dtype=torch.bfloat16)
            model = mtq.quantize(model, configs[kind], lambda m: m(torch.arange(3, 43)[None]))
            export_hf_checkpoint(model, export_dir=str(path))
    tensors, found = stored(path), {}
    for name, scale in tensors.items():
        weight = name.removesuffix("_scale")
        if name.endswith(".weight_scale") and kind == "fp8":
            found[weight] = tensors[weight].float() * scale
        elif name.endswith(".weight_scale"):
            shape = (tensors[weight].shape[0], 2 * tensors[weight].shape[1])
            held = NVFP4QTensor(torch.Size(shape), torch.float32, tensors[weight])
            scales = {"scale": scale, "double_scale": tensors[f"{weight}_scale_2"]}
            found[weight] = held.dequantize(torch.float32, block_sizes={-1: 16}, **scales)
    return path, found


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_weights_are_those_of_modelopt(quant_bench: QuantBench, kind: str) -> None:
    path, theirs = exported(quant_bench, kind)
    ours = decoded(path, step=7)
    assert set(ours) == set(theirs)
    assert len(ours) == 14
    for name, value in ours.items():
        assert torch.equal(value, theirs[name])


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_logits_are_those_of_modelopts_weights_with_the_adapter_on_them(
    quant_bench: QuantBench, kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Nothing runs an exported checkpoint on a CPU: transformers runs the weights that modelopt reads from it."""
    path, theirs = exported(quant_bench, kind)
    quant_bench.fold(path, tmp_path / "out", quantization="none")
    model: Any = AutoModelForCausalLM.from_pretrained(str(quant_bench.base()), dtype=torch.bfloat16)
    model.load_state_dict(theirs, strict=False)
    tuned: Any = peft.PeftModel.from_pretrained(model, str(quant_bench.adapter()))
    with torch.no_grad():
        expected = tuned.eval()(torch.arange(3, 43)[None]).logits.float()
    found = quant_bench.logits(tmp_path / "out", torch.bfloat16)
    error = float((found - expected).norm() / expected.norm())
    record_property("logits", error)
    assert error < 0.03
