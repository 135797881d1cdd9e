"""Every compiled kernel equals plain torch bit for bit, and numpy; nothing is fused, nothing that is NaN gets lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from merger.kernels.dispatch import CompiledKernels, Kernels, PlainKernels, kernels_for

F32 = npt.NDArray[np.float32]

SIZES = (0, 1, 7, 8, 9, 65537)
KINDS = ("normal", "zeros", "equal", "denormal", "huge", "tiny", "mixed")
COMPILED, PLAIN = CompiledKernels(), PlainKernels()


def make(kind: str, size: int, seed: int = 0) -> F32:
    """Finite values of one awkward kind."""
    g = np.random.default_rng([seed, size, KINDS.index(kind)])
    x = g.standard_normal(size).astype(np.float32)
    if kind == "zeros":
        return np.where(x > 0, np.float32(0.0), np.float32(-0.0))
    if kind == "equal":
        return np.where(x > 0, np.float32(0.125), np.float32(-0.125))
    if kind == "denormal":
        return g.integers(0, 1 << 23, size).astype(np.uint32).view(np.float32) * np.sign(x)
    if kind == "huge":
        return np.clip(x, -1, 1) * np.float32(1e38)
    if kind == "tiny":
        return x * np.float32(1.2e-38)
    if kind == "mixed":
        pools = np.concatenate([make(k, size, seed + 1) for k in KINDS if k != "mixed"])
        return g.permutation(pools)[:size] if size else x
    return x


def bits(x: Tensor) -> npt.NDArray[Any]:
    """Bits, with every NaN the same."""
    values = x.cpu().numpy()
    if values.dtype == np.float32:
        return np.where(np.isnan(values), np.uint32(0x7FC00000), values.view(np.uint32))
    return values


CASES = [
    *(
        pytest.param(kind, size, "cpu", id=f"{kind}-{size}")
        for kind, size in itertools.product(KINDS, SIZES)
        if size < 65537 or kind == "mixed"  # "mixed" is of all kinds
    ),
    *(pytest.param("mixed", size, "cuda", id=f"cuda-{size}", marks=pytest.mark.gpu) for size in SIZES),
]


def both(call: Callable[[Kernels, Callable[[F32], Tensor]], Any], device: str = "cpu") -> None:
    """Run a call on both implementations, each with tensors of its own, and compare what they changed and returned."""
    outcomes = []
    for kernels, place in ((COMPILED, "cpu"), (PLAIN, device)):
        made: list[Tensor] = []

        def tensor(values: npt.NDArray[Any], place: str = place, made: list[Tensor] = made) -> Tensor:
            made.append(torch.from_numpy(np.array(values)).to(place))
            return made[-1]

        returned = call(kernels, tensor)
        outcomes.append((returned, [bits(t) for t in made]))
    (value, tensors), (other_value, other_tensors) = outcomes
    assert value == other_value
    for ours, theirs in zip(tensors, other_tensors, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind, size, device", CASES)
def test_elementwise_kernels_are_plain_torch(kind: str, size: int, device: str) -> None:
    x, y = make(kind, size), make(kind, size, 3)

    def with_factor(f: float) -> None:
        both(lambda k, t: k.scale(t(x), f), device)
        both(lambda k, t: k.accumulate(t(x), f, t(y)), device)
        both(lambda k, t: k.scale_and_add(t(x), f, t(y)), device)
        both(lambda k, t: k.combine_two(t(x), t(y), f, 1 - f, t(x * 0)), device)

    for factor in (0.3, -1.7, 1.0, 0.0, 3.3e-39):
        with_factor(factor)

    def with_divisor(d: float) -> None:
        both(lambda k, t: k.divide(t(x), d), device)

    for divisor in (0.3, -1.7, 3.0, 0.07):
        with_divisor(divisor)
    both(lambda k, t: k.subtract(t(x), t(y)), device)
    both(lambda k, t: k.add(t(x), t(y)), device)
    both(lambda k, t: k.largest(t(x)), device)


@pytest.mark.parametrize("kind, size, device", CASES)
def test_sums_are_plain_torch(kind: str, size: int, device: str) -> None:
    x, y = make(kind, size), make(kind, size, 3)
    if device == "cpu":
        both(lambda k, t: k.dot(t(x), t(y)))
        both(lambda k, t: k.sum_abs(t(x)))
    wide = x.astype(np.float64), y.astype(np.float64)
    got = COMPILED.dot(torch.from_numpy(x), torch.from_numpy(y))
    scale = float(np.abs(wide[0] * wide[1]).sum())
    assert abs(got - float((wide[0] * wide[1]).sum())) <= 1e-12 * scale
    assert COMPILED.sum_abs(torch.from_numpy(x)) == pytest.approx(float(np.abs(wide[0]).sum()), rel=1e-12, abs=0)


@pytest.mark.parametrize("kind, size, device", CASES)
def test_counts_and_trims_are_plain_torch_and_numpy(kind: str, size: int, device: str) -> None:
    x = make(kind, size)
    magnitudes = x.view(np.uint32) & 0x7FFFFFFF
    both(lambda k, t: k.count_high(t(x), t(np.ones(1 << 16, np.int64))), device)
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    COMPILED.count_high(torch.from_numpy(x), counts)
    np.testing.assert_array_equal(counts.numpy(), np.bincount(magnitudes >> 15, minlength=1 << 16))
    prefixes = sorted({0, 1 << 15, *(int(m) >> 15 for m in magnitudes[:3])})

    def with_prefix(p: int) -> None:
        both(lambda k, t: k.count_low(t(x), p, t(np.zeros(1 << 15, np.int64))), device)

    def with_threshold(h: int, a: int) -> None:
        both(lambda k, t: k.trim(t(x), h, a), device)

    for prefix in prefixes:
        with_prefix(prefix)
        low = torch.zeros(1 << 15, dtype=torch.int64)
        COMPILED.count_low(torch.from_numpy(x), prefix, low)
        inside = magnitudes[magnitudes >> 15 == prefix] & 0x7FFF
        np.testing.assert_array_equal(low.numpy(), np.bincount(inside, minlength=1 << 15))
    thresholds = {0, 0x7FFFFFFF, *(int(m) for m in magnitudes[:3])}
    for threshold, allowance in itertools.product(sorted(thresholds), (0, 1, 3, 10**6)):
        with_threshold(threshold, allowance)
        got = torch.from_numpy(x.copy())
        used = COMPILED.trim(got, threshold, allowance)
        equal = np.flatnonzero(magnitudes == threshold)
        keep = magnitudes > threshold
        keep[equal[:allowance]] = True
        assert used == min(len(equal), allowance)
        np.testing.assert_array_equal(got.numpy().view(np.uint32), np.where(keep, x.view(np.uint32), 0))


@pytest.mark.parametrize("kind, size, device", CASES)
def test_combines_are_plain_torch(kind: str, size: int, device: str) -> None:
    def with_weights(x: F32, w: F32) -> None:
        both(lambda k, t: k.weighted_sum(t(x), t(w), t(x[0])), device)

    for sources in (1, 2, 4):
        x = np.stack([make(kind, size, s) for s in range(sources)])
        for weights in ([1.0, -0.5, 0.3, 2.0], [0.0, 1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]):
            w = np.array(weights[:sources], np.float32)
            with_weights(x, w)
            for (weighted, frequency), divide in itertools.product(
                [(True, False), (False, False), (False, True)], (0, 1, 2)
            ):
                outcomes = []
                for kernels, place in ((COMPILED, "cpu"), (PLAIN, device)):
                    out = torch.full((size,), 7.0, device=place)
                    kernels.elect(
                        torch.from_numpy(x).to(place), torch.from_numpy(w).to(place), weighted=weighted,
                        frequency=frequency, divide=divide, scratch=torch.empty(2, size, device=place), out=out,
                    )  # fmt: skip
                    outcomes.append(bits(out))
                np.testing.assert_array_equal(outcomes[0], outcomes[1])


@given(data=st.data())
def test_elect_is_its_twin(twins: Any, data: st.DataObject) -> None:
    sources, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    values = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0])
    x = np.array(data.draw(st.lists(st.lists(values, min_size=size, max_size=size), min_size=sources,
                                    max_size=sources)), np.float32)  # fmt: skip
    w = np.array(data.draw(st.lists(values, min_size=sources, max_size=sources)), np.float32)
    by = data.draw(st.sampled_from(["weighted", "unweighted", "frequency"]))
    divide = data.draw(st.sampled_from([0, 1, 2]))
    out = torch.empty(size)
    COMPILED.elect(
        torch.from_numpy(x), torch.from_numpy(w), weighted=by == "weighted", frequency=by == "frequency",
        divide=divide, scratch=torch.empty(2, size), out=out,
    )  # fmt: skip
    expected = twins.elected(
        list(x.astype(np.float64)), w.tolist(), by=by, divisor="weights" if divide == 1 else "count",
        normalize=divide != 0,
    )  # fmt: skip
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6, atol=0)


# ---- what must not be lost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [COMPILED, PLAIN], ids=["compiled", "plain"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nothing_hides_what_is_no_number(kernels: Kernels, bad: float) -> None:
    x = torch.tensor([1.0, bad, -2.0])
    for allowance in (0, 1):
        trimmed = x.clone()
        kernels.trim(trimmed, int(np.float32(1.5).view(np.uint32)), allowance)
        assert not trimmed.isfinite()[1]
    dropped = x.clone()
    kernels.drop(dropped, 0, 5, 0)
    assert not dropped.isfinite()[1]
    assert dropped[::2].view(torch.int32).tolist() == [0, 0]
    for (weighted, frequency), divide, other in itertools.product(
        [(True, False), (False, False), (False, True)], (0, 1, 2), (-bad, 1.0, -1.0)
    ):
        out = torch.empty(3)
        kernels.elect(
            torch.stack([x, torch.tensor([1.0, other, -2.0]), torch.tensor([-3.0, -1.0, -2.0])]), torch.ones(3),
            weighted=weighted, frequency=frequency, divide=divide, scratch=torch.empty(2, 3), out=out,
        )  # fmt: skip
        assert not out.isfinite()[1]
        assert out.isfinite()[::2].all()


@pytest.mark.parametrize("kernels", [COMPILED, PLAIN], ids=["compiled", "plain"])
def test_largest_puts_infinity_and_nan_on_top(kernels: Kernels) -> None:
    big = np.float32(3.4e38)
    for above, bound in ((np.inf, 0x7F800000), (-np.inf, 0x7F800000), (np.nan, 0x7F800001), (-np.nan, 0x7F800001)):
        for at in (0, 1, 8, 15):
            x = np.full(16, big)
            x[at] = above
            assert kernels.largest(torch.from_numpy(x)) >= bound
    assert kernels.largest(torch.tensor([-big, 1.0])) == int(big.view(np.uint32))
    assert kernels.largest(torch.tensor([-0.0, 0.0])) == 0
    assert kernels.largest(torch.tensor([])) == 0


@pytest.mark.parametrize("kernels", [COMPILED, PLAIN], ids=["compiled", "plain"])
def test_nothing_is_fused(kernels: Kernels) -> None:
    # (1 + 2⁻¹²)² = 1 + 2⁻¹¹ + 2⁻²⁴ rounds to 1 + 2⁻¹¹, a tie that goes to even; fused with −(1 + 2⁻¹¹), 2⁻²⁴ is left.
    size = 37  # vector body and scalar tail
    x = torch.full((size,), 1 + 2**-12)
    rounded = torch.full((size,), -(1 + 2**-11))
    factor = 1 + 2**-12

    out = rounded.clone()
    kernels.accumulate(x, factor, out)
    assert (out == 0).all()

    out = x.clone()
    kernels.scale_and_add(rounded, factor, out)
    assert (out == 0).all()

    out = torch.empty(size)
    kernels.combine_two(x, rounded, factor, 1.0, out)
    assert (out == 0).all()
    kernels.combine_two(rounded, x, 1.0, factor, out)
    assert (out == 0).all()

    kernels.weighted_sum(torch.stack([rounded, x]), torch.tensor([1.0, factor]), out)
    assert (out == 0).all()

    # elect: Σ w·d is a tie at zero, which elects +; fused it would be positive all the same, so look at the sum. Both
    # agree (all positive): w₀d₀ + w₁d₁ = 1 + (1 + 2⁻¹¹), not its fused neighbour.
    y = torch.full((size,), 2.0**-24)
    kernels.elect(
        torch.stack([y, x]), torch.tensor([1.0, factor]), weighted=True, frequency=False, divide=0,
        scratch=torch.empty(2, size), out=out,
    )  # fmt: skip
    assert (out == float(np.float32(np.float32(2.0**-24) + np.float32(1 + 2**-11)))).all()
    # And the ballot: −(1 + 2⁻¹¹) + fl((1 + 2⁻¹²)²) is exactly zero, + is elected, and only x agrees. Minus a little:
    kernels.elect(
        torch.stack([rounded, x, torch.full((size,), -(2.0**-26))]), torch.tensor([1.0, factor, 1.0]), weighted=True,
        frequency=False, divide=0, scratch=torch.empty(2, size), out=out,
    )  # fmt: skip
    assert (out < 0).all()


def test_products_are_float64_sums_of_exact_products() -> None:
    x = torch.full((9,), 1 + 2**-23)
    assert COMPILED.dot(x, x) == 9 * (1 + 2**-23) ** 2


def test_each_device_has_its_kernels() -> None:
    assert isinstance(kernels_for(torch.device("cpu")), CompiledKernels)
    assert isinstance(kernels_for(torch.device("meta")), PlainKernels)


@given(
    x=st.lists(st.integers(0, 2**32 - 1).filter(lambda b: b & 0x7FFFFFFF <= 0x7F800000), max_size=40),
    y=st.integers(0, 2**32 - 1),
    factor=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
@example(x=[0x80000000, 1, 0x7F800000], y=0x80000001, factor=-0.0)
def test_any_bits(x: list[int], y: int, factor: float) -> None:
    a = np.array(x, np.uint32).view(np.float32)
    b = np.roll(a, 1) if y % 2 else np.full(len(x), np.uint32(y & 0x7F7FFFFF), np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        both(lambda k, t: k.accumulate(t(a), factor, t(b)))
        both(lambda k, t: k.scale_and_add(t(a), factor, t(b)))
        both(lambda k, t: k.trim(t(a), y & 0x7FFFFFFF, 2))
        both(lambda k, t: k.drop(t(a), y, y * 3 % 2**64, y))
        both(lambda k, t: k.largest(t(a)))
