"""output.quantization: nf4, fp4, int8, fp8: merged weights stored in fewer bits, as the schemes' libraries would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merger
from merger.errors import RefusedError
from merger.kernels.native import CODES
from merger.planning.memory import peak_bytes
from merger.quantization.grid import LEVELS, dynamic_levels, round_absmax
from merger.quantization.recode_bnb import TABLES_4BIT, absmax_of, recode_blocks, recode_blocks_plainly
from merger.quantization.writing import state_text
from tests.merger.quantization.test_bnb import checkpoint as bnb
from tests.merger.quantization.test_bnb import theirs
from tests.quantised import QuantBench, decoded, delta, stored

DOUBLE: Any = {"nf4": {"blocksize": 64, "double_quant": True}}
KINDS: dict[str, tuple[Any, str]] = {
    "nf4": ("nf4", "nf4"),
    "nf4-double": (DOUBLE, "nf4-double"),
    "fp4": ("fp4", "fp4"),
    "int8": ("int8", "int8"),
}
"""Kind → (output.quantization, the checkpoint that bitsandbytes writes of the same base)."""


def passed_through(bench: QuantBench, out: Path, quantization: Any) -> dict[str, Tensor]:
    """The base, stored otherwise."""
    merger.merge({
        "merge_method": "passthrough", "models": [{"model": str(bench.base())}],
        "output": {"path": str(out), "quantization": quantization},
    })  # fmt: skip
    return stored(out)


def codes_equal(name: str, ours: Tensor, other: Tensor) -> float:
    """Share of bytes that differ."""
    return float((ours.reshape(-1).view(torch.uint8) != other.reshape(-1).view(torch.uint8)).float().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_bitsandbytes_writes(quant_bench: QuantBench, kind: str, tmp_path: Path) -> None:
    asked, library = KINDS[kind]
    expected, made = stored(bnb(quant_bench, library)), passed_through(quant_bench, tmp_path / "out", asked)
    assert set(made) == set(expected)
    for name, value in expected.items():
        assert made[name].dtype == value.dtype, name
        if "quant_state" in name and kind == "nf4-double":
            ours, other = (json.loads(bytes(t.numpy().tobytes())) for t in (made[name], value))
            assert ours.pop("nested_offset") == pytest.approx(other.pop("nested_offset"), rel=1e-6)
            assert ours == other
            continue
        assert made[name].shape == value.shape, name
        # bitsandbytes rounds a few absmaxes to a level that is not the nearest, gives a small negative fp4 the code of
        # minus zero, and makes int8 of weights in float16.
        exact = kind == "nf4" or not name.endswith((".weight", ".absmax"))
        assert codes_equal(name, made[name], value) <= (0 if exact else 0.02), name
    library_bits, ours_bits = theirs(bnb(quant_bench, library)), decoded(tmp_path / "out")
    for name, value in library_bits.items():
        step = 0.0 if kind == "nf4" else 0.02
        assert float((ours_bits[name] - value).norm() / value.norm()) <= step, name


@pytest.mark.parametrize("kind", [*KINDS, "fp8"])
def test_a_fold_is_the_quantised_sum(quant_bench: QuantBench, kind: str, tmp_path: Path) -> None:
    asked = KINDS.get(kind, (kind, ""))[0]
    quant_bench.fold(quant_bench.base(), tmp_path / "out", quantization=asked)
    dense, made = quant_bench.fold(quant_bench.base(), tmp_path / "dense"), decoded(tmp_path / "out")
    deltas, base = delta(quant_bench.adapter()), stored(quant_bench.base())
    halves = {n for n in dense if kind == "fp8" and n.endswith(("k_proj.weight", "v_proj.weight"))}
    assert set(made) == {n for n in dense if n.endswith("_proj.weight")} - halves
    worst = {"nf4": 0.16, "fp4": 0.17, "int8": 0.5 / 127, "fp8": 2**-4}[kind.removesuffix("-double")]
    for name, value in made.items():
        exact = (base[name].double() + deltas.get(name, torch.zeros(()))).float()
        largest = exact.abs().max()
        allowed = (
            torch.maximum(exact.abs() * worst, largest * worst)
            if kind != "fp8"
            else exact.abs() * worst + largest * 2**-10
        )
        assert bool(((value - exact).abs() <= 1.02 * allowed).all()), name
    others = {n for n in dense if n not in made}
    written = stored(tmp_path / "out")
    assert all(torch.equal(written[n], dense[n]) for n in others)


def as_dense(path: Path, out: Path, bench: QuantBench) -> Path:
    """A checkpoint with its codes decoded."""
    shutil.copytree(bench.base(), out)
    tensors = load_file(bench.base() / "model.safetensors") | {
        name: value.to(torch.bfloat16) for name, value in decoded(path).items()
    }
    save_file(tensors | {n: t for n, t in stored(path).items() if n in tensors and t.is_floating_point()
                         and t.dtype == torch.bfloat16}, out / "model.safetensors", {"format": "pt"})  # fmt: skip
    return out


@pytest.mark.parametrize("kind", [*KINDS, "fp8"])
def test_it_loads_and_answers_as_its_decoded_weights_do(quant_bench: QuantBench, kind: str, tmp_path: Path) -> None:
    asked = KINDS.get(kind, (kind, ""))[0]
    quant_bench.fold(quant_bench.base(), tmp_path / "out", quantization=asked)
    dense = as_dense(tmp_path / "out", tmp_path / "dense", quant_bench)
    found, expected = (quant_bench.logits(p, torch.bfloat16) for p in (tmp_path / "out", dense))
    assert bool(found.isfinite().all())
    # int8 rounds activations, too.
    assert float((found - expected).norm() / expected.norm()) < (0.08 if kind == "int8" else 0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_keep_writes_bitsandbytes_codes_back(quant_bench: QuantBench, kind: str, tmp_path: Path) -> None:
    path, deltas = bnb(quant_bench, KINDS[kind][1]), delta(quant_bench.adapter())
    made, before = quant_bench.fold(path, tmp_path / "out", quantization="keep"), stored(path)
    configs = [json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "out")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert set(made) == set(before)
    for name in before:
        if not any(name.startswith(f"{d.removesuffix('.weight')}.") for d in deltas):
            assert torch.equal(made[name], before[name]), name
    old, new = decoded(path), decoded(tmp_path / "out")
    for name, change in deltas.items():
        exact = (old[name].double() + change).float()
        if kind == "int8":
            assert float((new[name] - exact).abs().max()) <= 0.51 / 127 * float(exact.abs().max())
        else:
            assert float((new[name] - exact).norm() / exact.norm()) < 0.16


@pytest.mark.parametrize("kind", ["nf4-double", "fp8"])
def test_bytes_do_not_depend_on_memory_or_workers(quant_bench: QuantBench, kind: str, tmp_path: Path) -> None:
    manifest = {
        "merge_method": "ties", "base_model": str(quant_bench.base()), "parameters": {"density": 0.5},
        "adapters": [{"adapter": str(quant_bench.adapter())}, {"adapter": str(quant_bench.adapter(("q_proj",)))}],
        "output": {"kind": "model", "quantization": KINDS.get(kind, (kind, ""))[0]},
    }  # fmt: skip
    wide = merger.merge(manifest, tmp_path / "wide", workers=1)
    plan = merger.plan(manifest, tmp_path / "narrow")
    narrow = merger.merge(manifest, tmp_path / "narrow", workers=2, memory=2 * peak_bytes(plan) + 1000)
    assert wide.content_digest == narrow.content_digest


@pytest.mark.parametrize("asked", ["fp8", DOUBLE])
def test_methods_that_need_tensors_whole(quant_bench: QuantBench, asked: Any, tmp_path: Path) -> None:
    """tsv_m of models: its delta is whole, and what is written comes in blocks all the same."""
    other = quant_bench.fold(quant_bench.base(), tmp_path / "other")
    assert other
    manifest: dict[str, Any] = {
        "merge_method": "tsv_m", "base_model": str(quant_bench.base()),
        "models": [{"model": str(tmp_path / "other"), "parameters": {"weight": 1.0}}],
    }  # fmt: skip
    merger.merge({**manifest, "output": {"path": str(tmp_path / "dense")}})
    merger.merge({**manifest, "output": {"path": str(tmp_path / "out"), "quantization": asked}})
    dense = stored(tmp_path / "dense")
    for name, value in decoded(tmp_path / "out").items():
        assert float((value - dense[name].float()).norm() / dense[name].float().norm()) < (
            0.04 if asked == "fp8" else 0.12
        )


def test_a_quantised_base_is_stored_in_another_scheme(quant_bench: QuantBench, tmp_path: Path) -> None:
    path = bnb(quant_bench, "nf4")
    quant_bench.fold(path, tmp_path / "out", quantization="fp8")
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert scheme["quant_method"] == "fp8"
    deltas = delta(quant_bench.adapter())
    before = theirs(path)
    for name, value in decoded(tmp_path / "out").items():
        exact = (before[name].double() + deltas.get(name, torch.zeros(()))).float()
        assert float((value - exact).norm() / exact.norm()) < 0.04


@pytest.mark.parametrize(
    "change, said",
    [
        ({"quantization": "nf5"}, "no quantisation of an output"),
        ({"quantization": {"nf4": {"blocksize": 63}}}, "input should be 32, 64"),
        ({"quantization": {"fp8": {}}}, "no quantisation of an output"),
        ({"quantization": "nf4", "kind": "adapter"}, "cannot be quantised"),
        ({"quantization": {"nf4": {"blocksize": 4096}}}, "nothing to quantise"),
    ],
)
def test_what_cannot_be_is_refused(quant_bench: QuantBench, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=said) as refused:
        quant_bench.fold(quant_bench.base(), tmp_path / "out", **change)
    assert refused.value.problems[0].where or refused.value.problems[0].fix
    assert not (tmp_path / "out").exists()


def test_what_blocks_do_not_divide_stays_dense_and_is_said(quant_bench: QuantBench, tmp_path: Path) -> None:
    """k and v have 64 rows, half a block."""
    made = quant_bench.fold(quant_bench.base(), tmp_path / "out", quantization="fp8")
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    left = {n.rpartition(".")[0] for n in made if n.endswith(("k_proj.weight", "v_proj.weight"))}
    assert left < set(scheme["modules_to_not_convert"])
    assert "lm_head" in scheme["modules_to_not_convert"]
    plan = merger.plan({
        "base_model": str(quant_bench.base()), "adapters": [{"adapter": str(quant_bench.adapter())}],
        "output": {"kind": "model", "quantization": "fp8"},
    }, tmp_path / "other")  # fmt: skip
    assert any(w.code == "left-dense" and "4 matrices" in w.what for w in plan.warnings)


# ---------------------------------------------------------------- the arithmetic


def values(kind: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(32, 128, generator=g)
    if kind == "mixed":
        x = x * torch.logspace(-30, 30, 64).reshape(32, 2).repeat_interleave(64, dim=1)
    if kind == "zeros":
        x[::2] = 0.0
        x[1::4] = -0.0
    if kind == "denormal":
        x = x * 1e-41
    return x.numpy()


def parts(kind: str, rows: Any, block: int = 64) -> dict[str, Any]:
    text = state_text(kind, block, "float32", rows.shape, double=False)
    parameters: dict[str, int | float | str] = {"kind": kind, "block": block, "nested_block": 0, "state": text}
    return recode_blocks(parameters, rows, np.empty(0, np.float32), first_row=0)


@pytest.mark.parametrize("kind", ["normal", "mixed", "zeros"])
@pytest.mark.filterwarnings("ignore")
def test_nf4_codes_are_those_of_bitsandbytes(kind: str) -> None:
    from bitsandbytes import functional

    x = values(kind)
    codes, state = functional.quantize_4bit(
        torch.from_numpy(x), blocksize=64, compress_statistics=False, quant_type="nf4"
    )
    made = parts("nf4", x)
    assert np.array_equal(made["absmax"].view(np.float32), state.absmax.numpy())
    assert np.array_equal(made["codes"], codes.reshape(-1).numpy())
    assert np.array_equal(made["table"].view(np.float32), state.code.numpy())


@pytest.mark.parametrize("kind", ["normal", "mixed", "zeros", "denormal"])
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_the_error_is_at_most_half_the_widest_step(kind: str, levels: str) -> None:
    x = values(kind)
    made = parts(levels, x)
    codes, table = made["codes"], TABLES_4BIT[levels]
    both = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1, 64)
    absmax = made["absmax"].view(np.float32)[:, None]
    error = np.abs(table[both].astype(np.float64) * absmax - x.reshape(-1, 64))
    widest = float(np.diff(LEVELS[levels]).max())
    assert bool((error <= absmax * (widest / 2 * (1 + 1e-6)) + 1e-44).all())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_the_compiled_loop_is_the_plain_one(kind: str, block: int) -> None:
    x = values("mixed").reshape(-1)
    levels = LEVELS[kind]
    order = np.array([int(np.flatnonzero(TABLES_4BIT[kind] == level)[0]) for level in levels], np.uint8)
    made = np.empty(x.size // 2, np.uint8)
    CODES.code_levels(x, absmax_of(x, block), block, (levels[1:] + levels[:-1]) / np.float32(2), order, made)
    assert np.array_equal(made, recode_blocks_plainly(kind, block, x))


def test_doubled_absmaxes_are_those_that_the_grid_rounds_to() -> None:
    """What is written is what base_quantization says that it will be."""
    x = np.abs(values("normal")).repeat(5, axis=0)
    absmax = absmax_of(x.reshape(-1), 64)
    text = state_text("nf4", 64, "bfloat16", x.shape, double=True)
    parameters: dict[str, int | float | str] = {"kind": "nf4", "block": 64, "nested_block": 256, "state": text}
    made = recode_blocks(parameters, x, absmax, first_row=0)
    state = json.loads(bytes(made["state"].tobytes()))
    nested = made["nested"].view(np.float32)
    found = dynamic_levels()[made["absmax"]] * np.repeat(nested, 256)[: absmax.size] + np.float32(
        state["nested_offset"]
    )
    assert np.array_equal(found, round_absmax(absmax))
