"""Properties that any method must have, tried on random and on hostile inputs: `check_method`. For authors of methods.

A tile block is run here as the engine runs it (rounds over tiles, arrays added in the order of the rows, then the map),
on one process and without files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merger.errors import RaymergeError
from merger.methods.declare import MethodSpec, Scalar
from merger.methods.facts import sample_call
from merger.methods.rounds import Call
from merger.methods.tiles import F32, F64, TensorExtent, Tile

TOLERANCE: Final = 1e-5
"""Of the largest value in or out: sums of another order may differ by this much, and no more."""
_SHOWN: Final = 12


@dataclass(frozen=True, slots=True)
class Case:
    """One input: K sources of one shape (two dimensions, or one for a vector)."""

    name: str
    sources: tuple[F32, ...]
    weights: tuple[float, ...]
    statistics: tuple[F32, ...] = ()
    """What was measured of each, for a method that declares it."""

    @property
    def vector(self) -> bool:
        return self.sources[0].ndim == 1

    def __str__(self) -> str:
        weights = ", ".join(f"{weight:g}" for weight in self.weights)
        return f"{self.name}, {len(self.sources)} of {self.sources[0].shape}, weights {weights}"


def check_method(spec: MethodSpec, *, seed: int = 0, **values: Scalar) -> None:
    """Check that a method's result has the right shape, is finite, comes the same again and for any cut, leaves its
    inputs alone, and keeps what the method claims of order and of one source. An input may be refused.

    Each word and truth of its parameters is tried, the rest are at their defaults or at `values`. Raises AssertionError
    with every property that does not hold; ValueError for a method whose combine step is none of its own.
    """
    if spec.tile is None and spec.whole is None:
        raise ValueError(f"{spec.name} has no block of its own to check")
    sample_call(spec, (1.0,) * (spec.max_sources or 1), values)
    found: list[str] = []
    for chosen in _choices(spec, values):
        for case in _cases(spec, seed):
            try:
                with np.errstate(all="ignore"):  # as in a merge, which looks at what comes of it
                    found += [f"{case}{_said(chosen)}: {what}" for what in _faults(spec, case, chosen)]
            except RaymergeError as error:  # to refuse an input is a method's right
                if error.problems[0].code == "plugin-failed":
                    found.append(f"{case}{_said(chosen)}: {error.problems[0].what}")
            except Exception as error:  # noqa: BLE001 - whatever a block raises is a finding
                found.append(f"{case}{_said(chosen)}: it raised {type(error).__name__}: {error}")
    if found:
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise AssertionError("\n".join([f"{spec.name} fails in {len(found)} cases", *found[:_SHOWN], *more]))


def _said(chosen: Mapping[str, Scalar]) -> str:
    return "".join(f", {name} {value}" for name, value in chosen.items())


def _choices(spec: MethodSpec, values: Mapping[str, Scalar]) -> Iterator[dict[str, Scalar]]:
    """The defaults, then each word and each truth on its own."""
    yield dict(values)
    for p in spec.parameters:
        if p.name in values or p.kind not in ("choice", "bool"):
            continue
        for value in p.choices if p.kind == "choice" else (True, False):
            if value != p.default:
                yield {**values, p.name: value}


def _cases(spec: MethodSpec, seed: int) -> Iterator[Case]:
    g = np.random.default_rng(seed)
    most = spec.max_sources

    def made(name: str, shape: tuple[int, ...], count: int = 3, scale: float = 1.0) -> Case:
        k = most or count
        weights = tuple(float(w) for w in (1.0, 0.5, 2.0, 0.25, 1.5)[:k])
        sources = tuple((scale * g.standard_normal(shape)).astype(np.float32) for _ in range(k))
        return Case(name, sources, weights, tuple(_measured(spec, g, shape) for _ in range(k)))

    yield made("random", (37, 11))
    yield made("random, two", (64, 5), 2)
    yield made("five sources", (9, 8), 5)
    if most in (None, 1):
        yield made("one source", (21, 6), 1)
    yield made("one row", (1, 40))
    yield made("one column", (40, 1))
    if spec.statistics != "gram":
        yield made("a vector", (29,))
    yield made("one element", (1, 1))
    yield made("huge", (12, 7), scale=1e12)
    yield made("tiny", (12, 7), scale=1e-18)
    plain = made("zeros", (8, 6))
    yield replace(plain, sources=tuple(np.zeros_like(x) for x in plain.sources))
    yield replace(plain, name="one of zeros", sources=(np.zeros_like(plain.sources[0]), *plain.sources[1:]))
    yield replace(plain, name="equal sources", sources=plain.sources[:1] * len(plain.sources))
    yield replace(
        plain,
        name="equal magnitudes",
        sources=tuple(np.where(x < 0, np.float32(-0.5), np.float32(0.5)) for x in plain.sources),
    )
    if (weight := spec.parameter("weight")) is None or weight.low < 0:
        yield replace(plain, name="a negative weight", weights=(-0.5, *plain.weights[1:]))
    yield replace(plain, name="a weight of zero", weights=(0.0, *plain.weights[1:]))


def _measured(spec: MethodSpec, g: np.random.Generator, shape: tuple[int, ...]) -> F32:
    if spec.statistics == "none":
        return np.zeros(0, np.float32)
    if spec.statistics == "diagonal":
        return np.exp(g.standard_normal(shape)).astype(np.float32)
    inputs = g.standard_normal((4 * shape[-1], shape[-1]))
    return (inputs.T @ inputs).astype(np.float32)


def _faults(spec: MethodSpec, case: Case, chosen: Mapping[str, Scalar]) -> Iterator[str]:
    kept = [x.copy() for x in case.sources]
    whole = _run(spec, case, chosen)
    if any(not np.array_equal(x, y) for x, y in zip(kept, case.sources, strict=True)):
        yield "it changed its inputs"
        return
    if not np.isfinite(whole).all():
        yield "its result is not finite"
        return
    if not np.array_equal(whole, _run(spec, case, chosen)):
        yield "a second run gives another result"
    size = max(float(np.abs(whole).max()), *(float(np.abs(x).max()) for x in case.sources), 0.0)

    def differs(other: npt.NDArray[Any]) -> float:
        return float(np.abs(other.astype(np.float64) - whole).max()) / size if size else float(np.abs(other).max())

    if spec.tile is not None:
        for tile_rows, tiles in _cuts(spec, case):
            other = _run(spec, case, chosen, tile_rows=tile_rows, tiles=tiles)
            if differs(other) > TOLERANCE:
                yield (
                    f"tiles of {tile_rows} rows, {tiles} a unit, give another result "
                    f"(by {differs(other):.1e} of the largest value)"
                )
    if spec.any_order and len(case.sources) > 1:
        for order in itertools.islice(itertools.permutations(range(len(case.sources))), 1, 4):
            moved = Case(
                case.name, tuple(case.sources[i] for i in order), tuple(case.weights[i] for i in order),
                tuple(case.statistics[i] for i in order),
            )  # fmt: skip
            if differs(_run(spec, moved, chosen)) > TOLERANCE:
                yield f"the order {order} of its sources gives another result, and it claims that none does"
    if spec.one_is_itself and len(case.sources) == 1:
        alone = _run(spec, replace(case, weights=(1.0,)), chosen)
        if float(np.abs(alone - case.sources[0]).max()) > TOLERANCE * size:
            yield "one source at weight 1 is not itself, and it claims to be"


def _cuts(spec: MethodSpec, case: Case) -> Iterator[tuple[int, int]]:
    """(rows a tile, tiles a unit)."""
    assert spec.tile is not None
    rows = case.sources[0].shape[0]
    if case.vector and spec.tile.whole_rows:
        return
    for tile_rows in sorted({1, 2, 5, rows}):
        yield from ((tile_rows, tiles) for tiles in (1, 3, rows) if tile_rows < rows)


def _run(
    spec: MethodSpec, case: Case, chosen: Mapping[str, Scalar], *, tile_rows: int | None = None, tiles: int = 1 << 30
) -> F32:
    call = sample_call(spec, case.weights, chosen)
    if spec.tile is not None:
        return _run_tiles(spec, call, case, tile_rows or case.sources[0].shape[0], tiles)
    assert spec.whole is not None
    return _run_whole(spec, call, case)


def _run_tiles(spec: MethodSpec, call: Call, case: Case, tile_rows: int, tiles: int) -> F32:
    """The rounds and the map over tiles of so many rows, `tiles` of them a unit."""
    block = spec.tile
    assert block is not None
    shape = case.sources[0].shape
    rows, cols = shape[0], 1 if case.vector else shape[1]
    x_Kn = np.stack([x.reshape(-1) for x in case.sources])
    x_Kn.flags.writeable = False
    s_Kn = np.stack([s.reshape(-1) for s in case.statistics]) if spec.statistics == "diagonal" else None
    length = rows if case.vector else cols
    call = block.fitted(call, tuple(shape))
    call = replace(call, num_rounds=block.rounds(call))
    firsts = range(0, rows, tile_rows)
    extent = TensorExtent(len(x_Kn), rows * cols, length, len(firsts), "tensor")

    def tile(number: int) -> Tile:
        begin, end = firsts[number] * cols, min(rows, firsts[number] + tile_rows) * cols
        return Tile(x_Kn[:, begin:end], None, length, begin, number, None if s_Kn is None else s_Kn[:, begin:end])

    known: list[F64] = []
    for number in range(call.num_rounds):
        merged = block.empty(number, call, extent)
        for start in range(0, len(firsts), tiles):
            found = block.empty(number, call, extent)
            for index in range(start, min(start + tiles, len(firsts))):
                block.measure(number, call, tuple(known), tile(index), found)
            merged += found
        known.append(block.conclude(number, call, tuple(known), merged, extent))
    return np.concatenate([block.apply(call, tuple(known), tile(i)) for i in range(len(firsts))]).reshape(shape)


def _run_whole(spec: MethodSpec, call: Call, case: Case) -> F32:
    import torch

    block = spec.whole
    assert block is not None

    deltas = [torch.from_numpy(x.copy().reshape(len(x), -1)) for x in case.sources]
    before = [d.clone() for d in deltas]
    if spec.statistics == "gram":
        out = block.merge_measured(call, deltas, lambda k: torch.from_numpy(case.statistics[k]))
    else:
        out = block.merge(call, deltas, None, vector=case.vector)
    if any(not torch.equal(a, b) for a, b in zip(before, deltas, strict=True)):
        raise ValueError("it changed its inputs")
    if out.shape != deltas[0].shape:
        raise ValueError(f"its result is {tuple(out.shape)}, its sources {tuple(deltas[0].shape)}")
    merged: F32 = out.float().numpy().reshape(case.sources[0].shape)
    return merged
