"""GPTQ and AWQ from files written by the slow packers below: their libraries need a GPU, so the layout is the published
one (GPTQModel's and AutoAWQ's `pack`), every code placed bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import merger
from merger.errors import RefusedError
from tests.quantised import QuantBench, decoded, delta, stored

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output that lies in nibble i of a word."""


def stream(codes: Tensor, bits: int) -> Tensor:
    """(n, m) codes → (n·bits/32, m) words: down each column one stream of bits, the lowest first."""
    n, m = codes.shape
    words = torch.zeros(-(-n * bits // 32), m, dtype=torch.int64)
    for i in range(n):
        for bit in range(bits):
            at = i * bits + bit
            words[at // 32] |= ((codes[i].long() >> bit) & 1) << (at % 32)
    return words.to(torch.int32)


def quantise(weight: Tensor, bits: int, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes (in, out), zeros (groups, out), scales (groups, out)) of a weight (out, in), inputs in their groups."""
    w = weight.float().T
    groups = int(group.max()) + 1
    scales, zeros = torch.zeros(groups, w.shape[1]), torch.zeros(groups, w.shape[1])
    codes = torch.zeros(w.shape)
    top = 2**bits - 1
    for g in range(groups):
        rows = w[group == g]
        low, high = rows.amin(0).clamp(max=-1e-3), rows.amax(0).clamp(min=1e-3)
        scales[g] = ((high - low) / top).half().float()
        zeros[g] = torch.round(-low / scales[g]).clamp(1, top)
        codes[group == g] = torch.round(rows / scales[g] + zeros[g]).clamp(0, top)
    return codes, zeros, scales


def gptq(bench: QuantBench, bits: int, *, form: str = "gptq", act_order: bool = False, group: int = 32) -> Path:
    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return None
        size = weight.shape[1]
        index = torch.arange(size) // group
        if act_order:
            index = index[torch.randperm(size, generator=torch.Generator().manual_seed(3))]
        codes, zeros, scales = quantise(weight, bits, index)
        base = name.removesuffix(".weight")
        written = zeros - (1 if form == "gptq" else 0)
        return {
            f"{base}.qweight": stream(codes, bits), f"{base}.qzeros": stream(written.T, bits).T,
            f"{base}.scales": scales.half(), f"{base}.g_idx": index.to(torch.int32),
        }  # fmt: skip

    scheme = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order,
              "checkpoint_format": form, "sym": False}  # fmt: skip
    return bench.edited(f"gptq-{bits}-{form}-{act_order}", scheme, edit, torch.float16)


def awq(bench: QuantBench) -> Path:
    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return None
        codes, zeros, scales = quantise(weight, 4, torch.arange(weight.shape[1]) // 64)

        def pack(values: Tensor) -> Tensor:
            words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
            for column in range(words.shape[1]):
                for nibble in range(8):
                    words[:, column] |= values[:, 8 * column + AWQ_ORDER[nibble]].long() << (4 * nibble)
            return words.to(torch.int32)

        base = name.removesuffix(".weight")
        return {f"{base}.qweight": pack(codes), f"{base}.qzeros": pack(zeros), f"{base}.scales": scales.half()}

    scheme = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
    return bench.edited("awq", scheme, edit, torch.float16)


def near(path: Path, bench: QuantBench, step: int, bits: int) -> None:
    """Decoding gives (code − zero)·scale, which is the weight to half a step."""
    ours, original = decoded(path, step=step), stored(bench.base(torch.float16))
    assert len(ours) == 4
    tensors = stored(path)
    for name, value in ours.items():
        base = name.removesuffix(".weight")
        index = tensors.get(f"{base}.g_idx", torch.arange(value.shape[1]) // 64).long()
        codes, zeros, scales = quantise(original[name], bits, index)
        exact = ((codes - zeros[index]).double() * scales[index].double()).T
        assert torch.equal(value, exact.float())
        step_size = scales[index].T
        assert bool(((value - original[name].float()).abs() <= 0.51 * step_size + 1e-3).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"form": "gptq_v2"}, {"act_order": True}], ids=["v1", "v2", "act-order"])
def test_gptq(quant_bench: QuantBench, bits: int, options: dict[str, Any]) -> None:
    path = gptq(quant_bench, bits, **options)
    for step in (0, 1, 7):
        near(path, quant_bench, step, bits)


def test_awq(quant_bench: QuantBench) -> None:
    for step in (0, 1, 7):
        near(awq(quant_bench), quant_bench, step, 4)


@pytest.mark.parametrize("step", [0, 7])
def test_gptq_with_other_bits_by_layer(quant_bench: QuantBench, step: int) -> None:
    """As GPTQModel writes `dynamic`: 8 bits in groups of 64 for k, 4 in groups of 32 for the others."""

    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return None
        bits, group = (8, 64) if "k_proj" in name else (4, 32)
        index = torch.arange(weight.shape[1]) // group
        codes, zeros, scales = quantise(weight, bits, index)
        base = name.removesuffix(".weight")
        return {
            f"{base}.qweight": stream(codes, bits), f"{base}.qzeros": stream((zeros - 1).T, bits).T,
            f"{base}.scales": scales.half(), f"{base}.g_idx": index.to(torch.int32),
        }  # fmt: skip

    scheme = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq", "sym": False,
              "dynamic": {r"+:.*k_proj": {"bits": 8, "group_size": 64}, r"-:.*mlp": {}}}  # fmt: skip
    path = quant_bench.edited("gptq-dynamic", scheme, edit, torch.float16)
    original, ours = stored(quant_bench.base(torch.float16)), decoded(path, step=step)
    assert len(ours) == 4
    for name, value in ours.items():
        bits, group = (8, 64) if "k_proj" in name else (4, 32)
        index = torch.arange(value.shape[1]) // group
        codes, zeros, scales = quantise(original[name], bits, index)
        assert torch.equal(value, ((codes - zeros[index]).double() * scales[index].double()).T.float())


@pytest.mark.parametrize("step", [0, 1, 7])
def test_awq_gemv(quant_bench: QuantBench, step: int) -> None:
    """Rows as rows, eight inputs of a word in their order, zeros and scales padded to whole words (AutoAWQ's)."""

    def pack(values: Tensor) -> Tensor:
        words = torch.zeros(values.shape[0], -(-values.shape[1] // 8), dtype=torch.int64)
        for column in range(values.shape[1]):
            words[:, column // 8] |= values[:, column].long() << (4 * (column % 8))
        return words.to(torch.int32)

    def edit(name: str, weight: Tensor) -> dict[str, Tensor] | None:
        if not name.endswith(("q_proj.weight", "down_proj.weight")):
            return None
        codes, zeros, scales = quantise(weight, 4, torch.arange(weight.shape[1]) // 64)
        padded = torch.zeros(weight.shape[0], 8)
        padded[:, : len(scales)] = scales.T
        base = name.removesuffix(".weight")
        return {f"{base}.qweight": pack(codes.T), f"{base}.qzeros": pack(zeros.T), f"{base}.scales": padded.half()}

    scheme = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv", "zero_point": True}
    path = quant_bench.edited("awq-gemv", scheme, edit, torch.float16)
    original, ours = stored(quant_bench.base(torch.float16)), decoded(path, step=step)
    assert len(ours) == 4
    for name, value in ours.items():
        index = torch.arange(value.shape[1]) // 64
        codes, zeros, scales = quantise(original[name], 4, index)
        assert torch.equal(value, ((codes - zeros[index]).double() * scales[index].double()).T.float())


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_fold_is_dense_and_loads(quant_bench: QuantBench, kind: str, tmp_path: Path) -> None:
    path = gptq(quant_bench, 4, act_order=True) if kind == "gptq" else awq(quant_bench)
    made, deltas = quant_bench.fold(path, tmp_path / "out"), delta(quant_bench.adapter())
    assert set(made) == set(stored(quant_bench.base()))
    for name, value in decoded(path).items():
        exact = value.double() + deltas.get(name, torch.zeros(()))
        assert made[name].dtype == torch.float16
        torch.testing.assert_close(made[name].double(), exact, rtol=2**-11, atol=1e-6)
    assert bool(quant_bench.logits(tmp_path / "out").isfinite().all())


def test_other_layouts_are_refused_by_name(quant_bench: QuantBench, tmp_path: Path) -> None:
    for name, scheme, said in (
        ("marlin", {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "one kernel"),
        ("gemv-fast", {"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "format gemv_fast"),
        ("hqq", {"quant_method": "hqq"}, "no tensor holds its codes"),
        ("aqlm", {"quant_method": "aqlm"}, "no tensor holds its codes"),
        ("torchao", {"quant_method": "torchao"}, "do not say which tensors"),
        ("vptq", {"quant_method": "vptq"}, "codebooks"),
        ("higgs", {"quant_method": "higgs"}, "rotated"),
        ("odd", {"quant_method": "new-scheme"}, "new-scheme"),
        ("empty", {"quant_method": "awq", "bits": 4}, "no tensor holds its codes"),
    ):
        path = quant_bench.edited(f"refused-{name}", scheme, lambda name, value: None)
        with pytest.raises(RefusedError, match=said) as refused:
            quant_bench.fold(path, tmp_path / "out")
        assert {problem.code for problem in refused.value.problems} == {"quantised-source"}
        assert not (tmp_path / "out").exists()


def test_an_adapter_over_a_base_that_cannot_be_read_is_merged_all_the_same(
    quant_bench: QuantBench, tmp_path: Path
) -> None:
    """A merged adapter needs none of the base's weights."""
    base = quant_bench.edited("unread-hqq", {"quant_method": "hqq"}, lambda name, value: None)
    adapters = [quant_bench.adapter(("q_proj",)), quant_bench.adapter()]
    made = merger.merge({
        "merge_method": "linear", "base_model": str(base), "adapters": [{"adapter": str(a)} for a in adapters],
        "output": {"path": str(tmp_path / "out"), "kind": "adapter"},
    })  # fmt: skip
    assert made.kind == "adapter"
