"""The drop mask is a pure function of where an element is: its twin in Python integers, its statistics, its seams."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merger.kernels.dispatch import CompiledKernels, Kernels, PlainKernels
from merger.kernels.hashing import element_key, keep_limit

KERNELS: dict[str, Kernels] = {"compiled": CompiledKernels(), "plain": PlainKernels()}
EVERY = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())


def mask(kernels: Kernels, size: int, key: int, limit: int, first: int = 0) -> npt.NDArray[np.bool_]:
    x = torch.ones(size)
    kernels.drop(x, first, key, limit)
    return x.numpy() > 0


@EVERY
@pytest.mark.parametrize("first", [0, 1, 2**32 - 5, 2**32, 2**32 + 1, 2**40 + 12345, 2**53])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_it_is_its_twin(twins: Any, kernels: Kernels, first: int, density: float) -> None:
    for key in (0, 1, 2**32, 2**64 - 1, element_key(0, 0, "model.layers.0.w", "delta")):
        found = mask(kernels, 33, key, keep_limit(density), first)
        np.testing.assert_array_equal(found, twins.keep_mask(33, density, key, first))


@given(key=st.integers(0, 2**64 - 1), first=st.integers(0, 2**48), density=st.floats(0, 1))
def test_any_key_and_place(twins: Any, key: int, first: int, density: float) -> None:
    expected = twins.keep_mask(9, density, key, first)
    for kernels in KERNELS.values():
        np.testing.assert_array_equal(mask(kernels, 9, key, keep_limit(density), first), expected)


def test_keys_are_their_twin(twins: Any) -> None:
    for seed, position, tensor, factor in itertools.product((0, 7), (0, 3), ("a", "model.ü"), ("delta", "A", "B")):
        assert element_key(seed, position, tensor, factor) == twins.key_of(seed, position, tensor, factor)


def test_any_cut_is_the_whole() -> None:
    whole = mask(KERNELS["compiled"], 1000, 99, 2**31, first=2**32 - 500)
    for cut in (1, 7, 64, 999):
        parts = [
            mask(KERNELS["compiled"], min(cut, 1000 - at), 99, 2**31, first=2**32 - 500 + at)
            for at in range(0, 1000, cut)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("first", [0, 2**32 - 100_000, 2**35])
def test_it_is_uniform(first: int) -> None:
    n = 200_000
    for key in (0, 1, element_key(0, 1, "w", "delta")):
        for density in (0.01, 0.1, 0.5, 0.9):
            share = mask(KERNELS["compiled"], n, key, keep_limit(density), first).mean()
            assert abs(share - density) < 5 * np.sqrt(density * (1 - density) / n)


def test_neighbours_and_keys_are_independent() -> None:
    n, limit = 200_000, 2**31
    bound = 5 / np.sqrt(n)

    def signs(key: int, first: int = 0) -> npt.NDArray[np.float64]:
        return mask(KERNELS["compiled"], n, key, limit, first).astype(np.float64) * 2 - 1

    keys = [0, 1, 2, 2**32, 2**32 + 1, *(element_key(s, p, "w", "delta") for s in (0, 1) for p in (0, 1))]
    for a, b in itertools.combinations(keys, 2):
        assert abs((signs(a) * signs(b)).mean()) < bound
    for key in keys:
        x = signs(key)
        for lag in (1, 2, 7, 64, 4096):
            assert abs((x[lag:] * x[:-lag]).mean()) < bound
        # The same low half of the index, another high half: no echo at 2³².
        assert abs((x * signs(key, 2**32)).mean()) < bound


def test_runs_of_256_are_as_many_as_of_a_fair_coin() -> None:
    # χ² over the 256 patterns of eight neighbours: mean 255, deviation √510.
    bits = mask(KERNELS["compiled"], 8 * 50_000, element_key(3, 0, "w", "delta"), 2**31).reshape(-1, 8)
    counts = np.bincount(bits @ (1 << np.arange(8)), minlength=256)
    expected = 50_000 / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * np.sqrt(510)


def test_a_density_of_one_keeps_all_and_of_none_nothing() -> None:
    assert keep_limit(1.0) == 2**32
    assert keep_limit(0.0) == 0
    assert keep_limit(2.0) == 2**32
    assert keep_limit(-1.0) == 0
    for kernels in KERNELS.values():
        assert mask(kernels, 1000, 5, 2**32).all()
        assert not mask(kernels, 1000, 5, 0).any()


def test_a_lower_density_keeps_a_subset() -> None:
    few, many = (mask(KERNELS["compiled"], 5000, 11, keep_limit(d)) for d in (0.2, 0.6))
    assert (many | ~few).all()
