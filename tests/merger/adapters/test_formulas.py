"""Formulas against their float64 twins, whole and by any rows."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merger.adapters.declare import Change, Formula, LowRank, View, transposed
from merger.adapters.formulas import FORMULAS, apply_formula

Array = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def twin() -> ModuleType:
    return importlib.import_module("tests.reference_adapters")


seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 9)


def drawn(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_rows(kind: str, weight: Array, cut: int, tensors: dict[str, Array], **numbers: Any) -> Array:
    """The formula over two runs of rows."""
    given_tensors = {role: torch.from_numpy(value) for role, value in tensors.items()}
    parts = [(first, last) for first, last in ((0, cut), (cut, len(weight))) if last > first]
    made = [
        apply_formula(kind, torch.from_numpy(weight[first:last].copy()), first, given_tensors, numbers).numpy()
        for first, last in parts
    ]
    return np.concatenate(made)


def assert_close(ours: Array, theirs: npt.NDArray[np.float64], tolerance: float = 3e-6) -> None:
    assert ours.shape == theirs.shape
    assert float(np.abs(ours - theirs).max(initial=0.0)) <= tolerance * max(1.0, float(np.abs(theirs).max(initial=0.0)))


@given(seeds, sizes, sizes, st.data())
def test_magnitude(twin: ModuleType, seed: int, rows: int, cols: int, data: st.DataObject) -> None:
    weight, m = drawn(seed, rows, cols), drawn(seed + 1, rows)
    cut = data.draw(st.integers(0, rows))
    expected = twin.dora(weight.astype(float), np.zeros((rows, cols)), m.astype(float))
    assert_close(by_rows("magnitude", weight, cut, {"m": m}), expected, 1e-5)
    flipped = by_rows("magnitude", np.ascontiguousarray(weight.T), cols, {"m": m}, transposed=True)
    assert_close(np.ascontiguousarray(flipped.T), expected, 1e-5)


@given(seeds, sizes, sizes, st.integers(1, 3), st.data())
def test_scale(twin: ModuleType, seed: int, rows: int, cols: int, kernel: int, data: st.DataObject) -> None:
    weight = drawn(seed, rows, cols * kernel)
    cut = data.draw(st.integers(0, rows))
    inputs, outputs = drawn(seed + 1, cols), drawn(seed + 2, rows)
    assert_close(
        by_rows("scale", weight, cut, {"l": inputs}, axis="in"), twin.ia3(weight.astype(float), inputs, inputs=True)
    )
    assert_close(
        by_rows("scale", weight, cut, {"l": outputs}, axis="out"), twin.ia3(weight.astype(float), outputs, inputs=False)
    )


@given(seeds, sizes, sizes, st.integers(1, 4), st.data())
def test_loha(twin: ModuleType, seed: int, rows: int, cols: int, rank: int, data: st.DataObject) -> None:
    parts = {
        "hada_w1_a": drawn(seed, rows, rank), "hada_w1_b": drawn(seed + 1, rank, cols),
        "hada_w2_a": drawn(seed + 2, rows, rank), "hada_w2_b": drawn(seed + 3, rank, cols),
    }  # fmt: skip
    cut = data.draw(st.integers(0, rows))
    made = by_rows("loha", np.zeros((rows, cols), np.float32), cut, parts, scaling=0.7)
    assert_close(made, twin.loha(*(value.astype(float) for value in parts.values()), 0.7), 1e-5)


@given(seeds, sizes, sizes, sizes, sizes, st.data())
def test_lokr(twin: ModuleType, seed: int, p: int, q: int, c: int, d: int, data: st.DataObject) -> None:
    w1, w2 = drawn(seed, p, q), drawn(seed + 1, c, d)
    cut = data.draw(st.integers(0, p * c))
    made = by_rows("lokr", np.zeros((p * c, q * d), np.float32), cut, {"lokr_w1": w1, "lokr_w2": w2}, scaling=0.7)
    assert_close(made, twin.lokr(w1.astype(float), w2.astype(float), 0.7))


@given(seeds, sizes, sizes, st.integers(1, 4), st.integers(1, 4), st.data())
def test_locon(twin: ModuleType, seed: int, rows: int, cols: int, p: int, q: int, data: st.DataObject) -> None:
    up, mid, down = drawn(seed, rows, p, 1, 1), drawn(seed + 1, p, q, 3, 2), drawn(seed + 2, q, cols, 1, 1)
    cut = data.draw(st.integers(0, rows))
    parts = {"lora_B": up, "lora_mid": mid, "lora_A": down}
    made = by_rows("locon", np.zeros((rows, cols * 6), np.float32), cut, parts, scaling=0.7)
    u, m, d = up[..., 0, 0].astype(float), mid.reshape(p, q, 6).astype(float), down[..., 0, 0].astype(float)
    assert_close(made, twin.locon(u, m, d, 0.7), 1e-5)


@given(seeds, sizes, st.integers(1, 4), st.integers(2, 5), st.booleans(), st.data())
def test_turn(
    twin: ModuleType, seed: int, rows: int, blocks: int, size: int, shared: bool, data: st.DataObject
) -> None:  # fmt: skip
    weight = drawn(seed, rows, blocks * size)
    triangles = 0.05 * drawn(seed + 1, 1 if shared else blocks, size * (size - 1) // 2)
    cut = data.draw(st.integers(0, rows))
    expected = twin.oft(weight.astype(float), triangles.astype(float), size)
    exact = by_rows("turn", weight, cut, {"q": triangles}, block=size, neumann=False, terms=5)
    assert_close(exact, expected, 1e-5)
    # I + 2Q + 2Q² + … is the series of the turn by −Q, so that many terms of it are that turn.
    opposite = twin.oft(weight.astype(float), -triangles.astype(float), size)
    series = by_rows("turn", weight, cut, {"q": triangles}, block=size, neumann=True, terms=30)
    assert_close(series, opposite, 1e-5)


@given(seeds, st.integers(1, 4), st.integers(1, 3), sizes, sizes, st.booleans(), st.data())
def test_experts(
    twin: ModuleType, seed: int, experts: int, rank: int, rows: int, cols: int, swapped: bool, data: st.DataObject
) -> None:
    a, b = drawn(seed, experts * rank, cols), drawn(seed + 1, rows, rank * experts)
    deltas = twin.expert_deltas(a.astype(float), b.astype(float), experts, rank, 0.7)
    expected = np.stack([(d.T if swapped else d).reshape(-1) for d in deltas])
    cut = data.draw(st.integers(0, experts))
    numbers = {"experts": experts, "rank": rank, "scaling": 0.7, "swapped": swapped, "expert_major": False}
    made = by_rows("experts", np.zeros((experts, rows * cols), np.float32), cut, {"a": a, "b": b}, **numbers)
    assert_close(made, expected, 1e-5)


@given(seeds, st.integers(2, 9), st.integers(2, 9), st.integers(1, 2))
def test_what_an_initialisation_took(twin: ModuleType, seed: int, rows: int, cols: int, rank: int) -> None:
    weight = drawn(seed, rows, cols)
    made = by_rows("pissa", weight, rows, {}, rank=rank, scaling=0.7, dtype="F32")
    assert_close(made, twin.without_best(weight.astype(float), rank), 1e-5)
    q, r = np.linalg.qr(weight.astype(float))
    made = by_rows("olora", weight, rows, {}, rank=rank, scaling=0.7, dtype="F32")
    assert_close(made, weight - 0.7 * q[:, :rank] @ r[:rank], 1e-5)


@given(seeds, sizes, sizes, st.data())
def test_rows(seed: int, rows: int, cols: int, data: st.DataObject) -> None:
    weight = drawn(seed, rows, cols)
    indices = tuple(data.draw(st.lists(st.integers(0, rows - 1), unique=True)))
    own = drawn(seed + 1, len(indices), cols)
    made = by_rows("rows", weight, data.draw(st.integers(0, rows)), {"rows": own}, indices=indices)
    for row in range(rows):
        assert np.array_equal(made[row], own[indices.index(row)] if row in indices else weight[row])


@given(seeds, sizes, st.data())
def test_add(seed: int, rows: int, data: st.DataObject) -> None:
    value = drawn(seed, rows)
    made = by_rows(
        "add", np.zeros((rows, 1), np.float32), data.draw(st.integers(0, rows)), {"value": value}, scaling=0.5
    )
    assert np.array_equal(made, (np.float32(0.5) * value)[:, None])


def test_every_formula_has_a_test() -> None:
    tried = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    elsewhere = {"pissa", "olora", "peft", "ones", "expert"}  # theirs have other names, in other files
    assert set(FORMULAS) <= tried | elsewhere


def test_a_change_transposed_twice_is_itself() -> None:
    pair = LowRank("a", "b", 1.0, 2, View(rows=(0, 2, 1)), View(cols=(0, 4, 2)))
    change = Change(target="x.weight", shape=(3, 4), steps=(pair, Formula("magnitude", (("m", "m"),))))
    once = transposed(change)
    assert once.shape == (4, 3)
    assert once.steps[1] == Formula("magnitude", (("m", "m"),), (("transposed", True),), whole=True)
    twice = transposed(once)
    assert twice.steps[0] == change.steps[0]
    assert twice.shape == change.shape
