"""Sources that no file holds: any range by itself, the same bits, and a law."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger import api
from merger.errors import SourceChangedError, SourceError
from merger.generated import GivenStore, RandomStore, RandomTensor, add_random, normal_quantile, random_catalog
from merger.made import MadeStore, made_catalog, unmade, with_made
from merger.planning.nouns import MergePlan, Source
from merger.storage import LocalStore
from merger.storage.base import RangeRead, Store
from tests import reference
from tests.conformance.folders import model

TENSOR = RandomTensor(0x1234_5678_9ABC_DEF0, "normal", 0.5, 300_000)


def read(store: Store, name: str, start: int, count: int, pin: str | None = None) -> bytes:
    buffer = bytearray(count)
    store.read_into(name, [RangeRead(start, memoryview(buffer))], pin=pin)
    return bytes(buffer)


# ---- random numbers --------------------------------------------------------------------------------------------------


@given(st.floats(2.0**-33, 1 - 2.0**-33))
def test_quantiles_are_those_of_the_normal_distribution(p: float) -> None:
    found = float(normal_quantile(np.array([p]))[0])
    assert found == pytest.approx(NormalDist().inv_cdf(p), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_numbers_are_a_hash_of_their_place(distribution: Literal["normal", "uniform"]) -> None:
    tensor = RandomTensor(TENSOR.key, distribution, 0.5, 5000)
    shares = [(reference.hash32(i, tensor.key) + 0.5) / 2**32 for i in range(5000)]
    wanted = [0.5 * (NormalDist().inv_cdf(p) if distribution == "normal" else 2 * p - 1) for p in shares]
    np.testing.assert_allclose(tensor.values(0, 5000), wanted, rtol=1e-6, atol=1e-7)


@given(st.integers(0, 299_000), st.integers(0, 1000))
def test_any_range_is_what_it_is_in_the_whole(first: int, count: int) -> None:
    np.testing.assert_array_equal(TENSOR.values(first, count), WHOLE[first : first + count])


WHOLE = TENSOR.values(0, TENSOR.numel)


def test_the_law() -> None:
    assert abs(float(WHOLE.mean())) < 5 * 0.5 / 300_000**0.5
    assert float(WHOLE.std()) == pytest.approx(0.5, rel=0.01)
    fourth = float(((WHOLE.astype(np.float64) / 0.5) ** 4).mean())
    assert fourth == pytest.approx(3.0, rel=0.05)


def test_a_store_reads_across_its_chunks_and_refuses_what_is_not_there() -> None:
    store = RandomStore({"x": TENSOR})
    pin = store.stat("x").pin
    assert store.stat("x").size == 4 * TENSOR.numel
    assert read(store, "x", 0, 4 * TENSOR.numel, pin) == WHOLE.tobytes()
    assert read(pickle.loads(pickle.dumps(store)), "x", 400, 80, pin) == WHOLE[100:120].tobytes()
    with pytest.raises(SourceError):
        read(store, "x", 4 * TENSOR.numel - 4, 8)
    with pytest.raises(SourceError):
        read(store, "y", 0, 4)
    with pytest.raises(SourceChangedError):
        read(store, "x", 0, 4, "random:normal:1.0:0:1")


def test_what_decides_the_numbers_is_in_the_pin() -> None:
    pins = set()
    for key, distribution, scale in ((1, "normal", 1.0), (2, "normal", 1.0), (1, "uniform", 1.0), (1, "normal", 2.0)):
        catalog = random_catalog(0)
        add_random(
            catalog, "x", (3, 4), RandomTensor(key, "normal" if distribution == "normal" else "uniform", scale, 12)
        )
        assert catalog.tensors["x"].spec.shape == (3, 4)
        pins.add(catalog.pins["x"])
    assert len(pins) == 4


# ---- numbers that are given, and outputs that are planned ------------------------------------------------------------


def test_numbers_that_are_not_computed_yet_are_not_read() -> None:
    store = GivenStore("gates", "gates:1", {"g": 4})
    assert store.stat("g").size == 4
    with pytest.raises(SourceError, match="not computed yet"):
        read(store, "g", 0, 4)
    filled = GivenStore("gates", "gates:1", {"g": 4}, {"g": b"abcd"})
    assert read(filled, "g", 1, 2, "gates:1") == b"bc"
    with pytest.raises(SourceChangedError):
        read(filled, "g", 1, 2, "gates:2")


def planned(folder: Path, names: Sequence[str] = ("a", "b")) -> MergePlan:
    for seed, name in enumerate(names):
        model(folder / name, seed)
    models = [{"model": str(folder / name), "parameters": {"weight": 1.0}} for name in names]
    return api.plan({"merge_method": "linear", "models": models}, folder / "out")


def test_a_planned_output_is_a_source_of_headers_and_configs_alone(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    catalog = made_catalog("mixed", plan)
    store = catalog.store
    assert isinstance(store, MadeStore)
    assert catalog.reference == store.uri == "merge://mixed"
    assert catalog.tensors.keys() == {task.name for task in plan.tasks}
    assert catalog.config["model_type"] == "llama"
    size = store.stat("tokenizer.json").size
    assert read(store, "tokenizer.json", 0, size) == (tmp_path / "a" / "tokenizer.json").read_bytes()
    first = next(iter(catalog.tensors.values()))
    with pytest.raises(SourceError, match="not made yet"):
        read(store, "model.safetensors", first.start, 4)
    with pytest.raises(SourceChangedError):
        read(store, "config.json", 0, 4, "merge:another:config.json")


def test_pins_do_not_say_where_it_lies(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    catalog = made_catalog("mixed", plan)
    api.run_planned(plan)
    reading = MergePlan(sources=(Source("mixed", catalog),), outputs=(), tasks=())
    assert unmade(reading) == {"mixed"}
    moved = with_made(reading, {"mixed": LocalStore(str(tmp_path / "out"))})
    assert unmade(moved) == set()
    assert moved.digest == reading.digest
    tensor = catalog.tensors["model.norm.weight"]
    file = (tmp_path / "out" / "model.safetensors").read_bytes()
    found = read(
        moved.sources[0].catalog.store, "model.safetensors", tensor.start, 8, catalog.pins["model.safetensors"]
    )
    assert found == file[tensor.start : tensor.start + 8]
