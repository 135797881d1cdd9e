"""Two histograms and what is concluded from them give exactly the k-th largest magnitude, whatever the spans."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merger.kernels.dispatch import CompiledKernels
from merger.methods.rounds import (
    HIGH_BINS,
    NOTHING,
    Call,
    Findings,
    conclude,
    empty_statistic,
    kept,
    low_bin,
    rounds_of,
)
from merger.methods.slerp import slerp_factors

KERNELS = CompiledKernels()
F32 = npt.NDArray[np.float32]


def call(densities: tuple[float, ...], *, keep_one: bool = True) -> Call:
    return Call(
        method="ties", prepare="trim", combine="elect", weights=(1.0,) * len(densities), densities=densities,
        keep_one=keep_one,
    )  # fmt: skip


def find(x: F32, call_: Call, cuts: list[int]) -> tuple[Findings, list[npt.NDArray[np.int64]]]:
    """Both rounds over spans of x (sources, n), and the second one's counts of each span."""
    spans = list(zip([0, *cuts], [*cuts, x.shape[1]], strict=True))
    findings = Findings()
    merged = empty_statistic("trim_high", len(x))
    for first, last in spans:
        for k in range(len(x)):
            KERNELS.count_high(torch.from_numpy(x[k, first:last].copy()), torch.from_numpy(merged[k]))
    findings = conclude("trim_high", merged, call_, x.shape[1], findings)
    lows = []
    for first, last in spans:
        low = empty_statistic("trim_low", len(x))
        for k, (prefix, _) in enumerate(findings.prefixes):
            KERNELS.count_low(torch.from_numpy(x[k, first:last].copy()), prefix, torch.from_numpy(low[k]))
        lows.append(low.astype(np.int64))
    total = empty_statistic("trim_low", len(x)) + sum(lows)
    return conclude("trim_low", total, call_, x.shape[1], findings), lows


@given(data=st.data())
def test_the_kth_largest_is_exact(twins: Any, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    pool = data.draw(st.sampled_from(["any", "near", "few"]))
    element = {
        "any": st.integers(0, 2**32 - 1),
        "near": st.integers(0x3F800000, 0x3F800000 + 70000),  # two or three upper halves, many lower ones
        "few": st.sampled_from([0, 0x80000000, 1, 0x3F800000, 0xBF800000, 0x3F800001, 0x7F7FFFFF]),
    }[pool]
    bits = np.array(data.draw(st.lists(element, min_size=n, max_size=n)), np.uint32)
    bits = np.where(bits & 0x7FFFFFFF >= 0x7F800000, np.uint32(0x7F7FFFFF), bits)
    x = bits.view(np.float32)[None, :]
    density = data.draw(st.floats(0, 1))
    keep_one = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    wanted = twins.kept(density, n, keep_one=keep_one)
    assert kept(density, n, keep_one=keep_one) == wanted
    the_call = call((density,), keep_one=keep_one)
    findings, lows = find(x, the_call, cuts)
    ((threshold, quota),) = findings.thresholds
    magnitudes = np.sort(bits & 0x7FFFFFFF)[::-1]
    if wanted == 0:
        assert (threshold, quota) == (NOTHING, 0)
    else:
        assert threshold == magnitudes[wanted - 1]
        assert quota == wanted - int((magnitudes > threshold).sum())
    # Each span alone, told how many equals lie before it, gives its part of the whole.
    parts, before = [], 0
    for first, last, low in zip([0, *cuts], [*cuts, n], lows, strict=True):
        ((bound, left),) = findings.after([before]).thresholds
        part = torch.from_numpy(x[0, first:last].copy())
        KERNELS.trim(part, bound, left)
        column = low_bin(threshold)
        before += 0 if column is None else int(low[0][column])
        parts.append(part.numpy())
    expected = twins.trim(x[0].astype(np.float64), density, keep_one=keep_one)
    np.testing.assert_array_equal(np.concatenate(parts).astype(np.float64), expected)


def test_sources_have_quotas_of_their_own() -> None:
    x = np.stack([np.arange(10), np.ones(10), np.zeros(10)]).astype(np.float32)
    findings, _ = find(x, call((0.3, 0.5, 0.0)), [4])
    seven, one = (int(np.float32(v).view(np.uint32)) for v in (7, 1))
    assert findings.thresholds == ((seven, 1), (one, 5), (NOTHING, 0))
    assert findings.prefixes[2] == (HIGH_BINS, 0)


def test_nan_is_never_below_a_threshold() -> None:
    x = np.array([[1.0, np.nan, np.inf, 2.0]], np.float32)
    findings, _ = find(x, call((0.25,)), [])
    part = torch.from_numpy(x[0].copy())
    KERNELS.trim(part, *findings.thresholds[0])
    assert np.isnan(part.numpy()[1])


@pytest.mark.parametrize(
    "density, numel, keep_one, expected",
    [(0.5, 3, True, 1), (0.1, 3, True, 1), (0.1, 3, False, 0), (0.0, 3, True, 0), (1.0, 3, True, 3), (2.0, 3, True, 3),
     (0.5, 0, True, 0), (1.0, 0, True, 0), (0.29, 100, True, 28)],
)  # fmt: skip
def test_a_density_is_truncated(density: float, numel: int, keep_one: bool, expected: int) -> None:
    # 0.29 · 100 is 28.999…, in mergekit and PEFT too.
    assert kept(density, numel, keep_one=keep_one) == expected


def test_rounds_follow_from_the_call() -> None:
    assert rounds_of(call((1.0, 1.0))) == ()
    assert rounds_of(call((1.0, 0.5))) == ("trim_high", "trim_low")

    def one(**blocks: Any) -> tuple[str, ...]:
        return rounds_of(Call(method="x", weights=(1.0,), densities=(0.5,), **blocks))

    assert one(prepare="drop", combine="sum", rescale="l1") == ("sums",)
    assert one(prepare="drop", combine="sum") == ()
    assert one(prepare="trim", combine="sum", rescale="l1") == ("trim_high", "trim_low", "sums")
    assert rounds_of(Call(method="slerp", combine="block", weights=(1.0, 1.0), num_rounds=1)) == ("block.0",)


def test_sums_below_the_guard_change_nothing() -> None:
    merged = np.array([[4.0, 2.0], [1e-8, 1e-9], [1.0, 0.0]])
    found = conclude("sums", merged, call((0.5, 0.5, 0.5)), 4, Findings())
    assert found.factors == (2.0, 1.0, 1.0)


@given(
    a=st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3),
    b=st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3),
    t=st.floats(0, 1),
)
def test_slerp_factors_are_the_twin(twins: Any, a: list[float], b: list[float], t: float) -> None:
    x, y = np.array(a), np.array(b)
    factor_a, factor_b = slerp_factors((float(x @ x), float(x @ y), float(y @ y)), t)
    cosine = abs(float(x @ y)) / max(1e-30, float(np.sqrt(x @ x) * np.sqrt(y @ y)))
    if abs(cosine - 0.9995) < 1e-9:
        return  # which side of the switch is a matter of the last bit
    np.testing.assert_allclose(factor_a * x + factor_b * y, twins.slerp(x, y, t), rtol=1e-9, atol=1e-9)
