"""One row a method: how a test asks for it, its slow twin, and which common properties it does not have, and why.

tests/merger/methods/test_table.py runs every method of METHODS over every case and property; a method without a row, or
a property that neither holds nor has a reason, fails there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tests import reference as plain
from tests import reference_consensus as consensus
from tests import reference_gram as gram
from tests import reference_sparse as sparse
from tests import reference_spectral as spectral
from tests import reference_statistics as measured

F64 = npt.NDArray[np.float64]

MODULE: Final = "model.layers.0.w"
WEIGHT: Final = f"{MODULE}.weight"
PROPERTIES: Final = ("scale", "order", "itself", "gauge", "cut")
"""scale   deltas (and base) times c give the merged delta times c
order   the sources in another order give the same
itself  one source at weight 1 is that source
gauge   B·G and G⁻¹·A give the same as B and A
cut     any tiles, any extents, any memory give the same"""


@dataclass(frozen=True)
class Case:
    """A base and deltas B·A of small whole numbers times a power of two: every product and sum is exact."""

    name: str
    base: F64
    pairs: tuple[tuple[F64, F64], ...]
    """A (rank, cols) and B (rows, rank)."""
    weights: tuple[float, ...]
    statistics: tuple[F64, ...] = ()

    @property
    def deltas(self) -> list[F64]:
        return [b @ a for a, b in self.pairs]

    @property
    def models(self) -> list[F64]:
        return [self.base + x for x in self.deltas]

    def first(self, count: int) -> Case:
        return replace(self, pairs=self.pairs[:count], weights=self.weights[:count], statistics=self.statistics[:count])

    def ordered(self, order: Sequence[int]) -> Case:
        return replace(
            self, pairs=tuple(self.pairs[i] for i in order), weights=tuple(self.weights[i] for i in order),
            statistics=tuple(self.statistics[i] for i in order),
        )  # fmt: skip

    def scaled(self, factor: float) -> Case:
        return replace(self, base=self.base * factor, pairs=tuple((a, b * factor) for a, b in self.pairs))

    def turned(self) -> Case:
        """Other factors of the same deltas, in whole numbers too."""
        made = []
        for a, b in self.pairs:
            g = np.eye(len(a)) + np.triu(np.ones((len(a), len(a))), 1)
            made.append((np.rint(np.linalg.solve(g, a)), b @ g))
        return replace(self, pairs=tuple(made))


Twin = Callable[[Case], F64]


@dataclass(frozen=True)
class Row:
    """What a test must know of one method."""

    twin: Twin
    """The merged weight, base included."""
    shared: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, float] = field(default_factory=dict)
    weighted: bool = True
    count: int | None = None
    """How many sources it takes, where that is fixed."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """A property that it does not have, or a case that says nothing of it → why."""
    measure: Callable[[np.random.Generator, int, int], F64] | None = None
    tolerance: float = 2e-5
    """Of the largest value."""


def cases(measure: Callable[[np.random.Generator, int, int], F64] | None = None) -> Iterator[Case]:
    """Random and adversarial inputs."""

    def made(name: str, rows: int = 12, cols: int = 7, ranks: Sequence[int] = (2, 3, 2), seed: int = 0) -> Case:
        g = np.random.default_rng(seed)
        base = g.integers(-40, 40, (rows, cols)) / 8
        pairs = tuple(
            (g.integers(-3, 4, (r, cols)).astype(np.float64), g.integers(-3, 4, (rows, r)) / 4) for r in ranks
        )
        drawn = tuple(np.zeros(0) if measure is None else measure(g, rows, cols) for _ in ranks)
        return Case(name, base, pairs, (1.0, 0.5, 2.0)[: len(ranks)], drawn)

    yield made("random")
    yield made("one source", ranks=(3,), seed=1)
    yield made("one row", rows=1, seed=2)
    yield made("one column", cols=1, seed=3)
    yield made("one element", rows=1, cols=1, ranks=(1, 1, 1), seed=4)
    yield replace(made("huge", seed=5).scaled(2.0**40), name="huge")
    yield replace(made("tiny", seed=6).scaled(2.0**-40), name="tiny")
    usual = made("zeros", seed=7)
    yield replace(usual, pairs=tuple((a, 0 * b) for a, b in usual.pairs))
    (a, b), *others = usual.pairs
    yield replace(usual, name="one of zeros", pairs=((a, 0 * b), *others))
    yield replace(usual, name="equal sources", pairs=((a, b),) * 3)
    signs = np.random.default_rng(8).choice([-1.0, 1.0], (3, 19))
    ones = tuple((row[None, :7], row[7:, None] / 2) for row in signs)
    yield replace(usual, name="equal magnitudes", pairs=ones)
    yield replace(usual, name="a negative weight", weights=(1.0, -0.5, 2.0))
    yield replace(usual, name="a weight of zero", weights=(1.0, 0.0, 2.0))


# ---- twins that are a few of the others' blocks ----------------------------------------------------------------------


def _key(i: int) -> int:
    return plain.key_of(0, i, WEIGHT, "delta")


def _delta(merge: Callable[[Case], F64]) -> Twin:
    return lambda case: case.base + merge(case)


def _nearswap(case: Case) -> F64:
    (d,) = case.deltas
    found: F64 = case.base + np.clip(d, -0.5, 0.5)
    return found


def _breadcrumbs(case: Case, *, elects: bool) -> F64:
    ready = [sparse.band(x, 0.5, 0.1) for x in case.deltas]
    return plain.elected(ready, case.weights, normalize=False) if elects else plain.summed(ready, case.weights)


def _della(case: Case, *, elects: bool) -> F64:
    ready = [sparse.magprune(x, 0.5, 0.15, _key(i), plain.hash32) for i, x in enumerate(case.deltas)]
    return plain.elected(ready, case.weights, normalize=True) if elects else plain.summed(ready, case.weights)


def _dare(case: Case, *, elects: bool) -> F64:
    keys = [_key(i) for i in range(len(case.pairs))]
    densities = [0.5] * len(keys)
    return plain.dare(case.base, case.deltas, case.weights, densities, keys, elects=elects, rescale="inverse")


def _clean(x: F64) -> F64:
    """Where a source has nothing it casts no vote: what is left of a rounding is zero."""
    found: F64 = np.where(np.abs(x) <= 2.0**-23 * np.linalg.norm(x), 0.0, x)
    return found


def _in_core(case: Case, *, drops: bool) -> F64:
    left, right, cores = plain.cores(case.pairs)
    cores = [_clean(m) for m in cores]
    if drops:
        ready = [plain.drop(m.reshape(-1), 0.5, _key(i)).reshape(m.shape) / 0.5 for i, m in enumerate(cores)]
    else:
        ready = [plain.trim(m, 0.5) for m in cores]
    merged = plain.elected(ready, case.weights, by="unweighted", divisor="count")
    found: F64 = left @ merged @ right.T
    return found


def _knots(case: Case, *, drops: bool) -> F64:
    u, s, parts = spectral.joint_svd(case.deltas)
    parts = [_clean(v) if x.any() else 0 * v for v, x in zip(parts, case.deltas, strict=True)]
    if drops:
        ready = [plain.drop(v.reshape(-1), 0.5, _key(i)).reshape(v.shape) / 0.5 for i, v in enumerate(parts)]
    else:
        ready = [plain.trim(v, 0.5) for v in parts]
    rows = plain.elected(ready, case.weights, by="unweighted", divisor="count")
    found: F64 = u @ (s[:, None] * rows)
    return found


def _core_side(case: Case) -> int:
    """The smaller side of the core of all sources."""
    rank = sum(len(a) for a, _ in case.pairs)
    return min(rank, len(case.base), len(case.base.T))


def _gram(g: np.random.Generator, rows: int, cols: int) -> F64:
    x = g.integers(-3, 4, (4 * cols + 3, cols)).astype(np.float64)
    found: F64 = x.T @ x
    return found


def _diagonal(g: np.random.Generator, rows: int, cols: int) -> F64:
    found: F64 = g.integers(0, 50, (rows, cols)) / 8
    return found


# ---- the rows --------------------------------------------------------------------------------------------------------

_DROPS: Final = {"order": "what is dropped hangs on a source's position"}
_COORDINATES: Final = {
    "equal magnitudes": "equal elements in the core are told apart by roundings",
    "equal sources": "equal elements in the core are told apart by roundings",
}  # fmt: skip
_NEGATIVE: Final = {"a negative weight": "a share below zero is refused"}
_HALF: Final = {"density": 0.5}
_ONE: Final = "it merges a base and one model"
_MANY: Final = "it merges two sources or more"
_ISO: Final = "every direction gets the mean size, so that one source does not stay itself"

ROWS: Final[dict[str, Row]] = {
    "linear": Row(lambda c: plain.linear(c.models, c.weights)),
    "task_arithmetic": Row(lambda c: plain.task_arithmetic(c.base, c.deltas, c.weights)),
    "cat": Row(lambda c: plain.task_arithmetic(c.base, c.deltas, c.weights)),
    "svd": Row(lambda c: plain.task_arithmetic(c.base, c.deltas, c.weights)),
    "ties": Row(lambda c: plain.ties(c.base, c.deltas, c.weights, [0.5] * len(c.pairs)), _HALF,
                lacks={"itself": "a trim cuts; at density 1 it is itself, as test_models.py shows"}),
    "dare_linear": Row(lambda c: _dare(c, elects=False), {**_HALF, "rescale": "inverse"},
                       lacks={**_DROPS, "itself": "elements are dropped"}),
    "dare_ties": Row(lambda c: _dare(c, elects=True), {**_HALF, "rescale": "inverse"},
                     lacks={**_DROPS, "itself": "elements are dropped"}),
    "magnitude_prune": Row(lambda c: plain.magnitude_prune(c.base, c.deltas, c.weights, [0.5] * len(c.pairs)), _HALF,
                           lacks={"itself": "a trim cuts; at density 1 it is itself, as test_models.py shows"}),
    "passthrough": Row(lambda c: c.models[0], weighted=False, count=1, lacks={"order": "it takes one source"}),
    "slerp": Row(lambda c: plain.slerp(c.base, c.models[0], 0.25), {"t": 0.25}, weighted=False, count=1,
                 lacks={"order": _ONE, "itself": "t is between the two"}),
    "nearswap": Row(_nearswap, {"t": 0.5}, weighted=False, count=1,
                    lacks={"order": _ONE, "itself": "a weight moves by t at the most", "scale": "t is absolute"}),
    "nuslerp": Row(_delta(lambda c: gram.nuslerp(c.deltas[0], c.deltas[1], c.weights)), count=2,
                   lacks={"itself": _MANY}),
    "multislerp": Row(_delta(lambda c: gram.multislerp(c.deltas, c.weights)),
                      lacks={"tiny": "eps is absolute", "scale": "eps is absolute"}),
    "karcher": Row(lambda c: gram.karcher(c.models), weighted=False, lacks={"tiny": "tol is absolute: norms below it "
                   "count as zero", "scale": "tol is absolute"}),
    "model_stock": Row(lambda c: gram.model_stock(c.base, c.deltas), weighted=False,
                       lacks={"itself": _MANY, "one source": _MANY, "tiny": "products of norms count as 1e-6 at least",
                              "scale": "products of norms count as 1e-6 at least"}),
    "sce": Row(_delta(lambda c: consensus.sce(c.deltas)), weighted=False,
               lacks={"scale": "mean squares below 1e-6 tell no difference"}),
    "ram": Row(_delta(lambda c: consensus.ram(c.deltas)), weighted=False, lacks={"scale": "epsilon is absolute"}),
    "ramplus_tl": Row(_delta(lambda c: consensus.ramplus(c.deltas)), weighted=False,
                      lacks={"scale": "epsilon is absolute",
                             "itself": "what one source alone changed is made stronger"}),
    "magmax": Row(_delta(lambda c: consensus.magmax(c.deltas, c.weights)),
                  lacks={"order": "of equal changes the first source's is taken"}),
    "consensus_ta": Row(_delta(lambda c: consensus.consensus_ta(c.deltas, c.weights, [0.4] * len(c.pairs), 2)),
                        lacks={"itself": _MANY, "one source": _MANY}),
    "pcb": Row(_delta(lambda c: consensus.pcb(c.deltas)), {"scope": "tensor"}, weighted=False,
               lacks={"itself": "a source's elements compete with each other",
                      "scale": "the tanh of a product of deltas is near 1 where they are large"}),
    "arcee_fusion": Row(lambda c: sparse.arcee_fusion(c.base.astype(np.float32), c.models[0].astype(np.float32))[0],
                        weighted=False, count=1,
                        lacks={"order": _ONE, "itself": "only what changed most is taken",
                               "scale": "rows are compared by their softmax",
                               "huge": "a softmax of huge rows has nothing between 0 and 1"}),
    "breadcrumbs": Row(_delta(lambda c: _breadcrumbs(c, elects=False)), {**_HALF, "gamma": 0.1},
                       lacks={"itself": "a band is cut out"}),
    "breadcrumbs_ties": Row(_delta(lambda c: _breadcrumbs(c, elects=True)), {**_HALF, "gamma": 0.1},
                            lacks={"itself": "a band is cut out"}),
    "della": Row(_delta(lambda c: _della(c, elects=True)), {**_HALF, "rescale": "none"},
                 lacks={**_DROPS, "itself": "elements are dropped"}),
    "della_linear": Row(_delta(lambda c: _della(c, elects=False)), {**_HALF, "rescale": "none"},
                        lacks={**_DROPS, "itself": "elements are dropped"}),
    "tsv_m": Row(_delta(lambda c: spectral.tsv_m(c.deltas, c.weights))),
    "iso_c": Row(_delta(lambda c: spectral.iso_c(c.deltas, c.weights)), lacks={"itself": _ISO}),
    "iso_cts": Row(_delta(lambda c: spectral.iso_cts(c.deltas, c.weights)), lacks={"itself": _ISO}),
    "boost": Row(_delta(lambda c: spectral.boost(c.deltas, c.weights, 0.4)), {"beta": 0.4},
                 lacks={"itself": "small singular values are lifted"}),
    "wudi": Row(_delta(lambda c: spectral.wudi(c.deltas, c.weights))),
    "core_ties": Row(_delta(lambda c: _in_core(c, drops=False)), _HALF,
                     lacks={**_COORDINATES, "itself": "a trim cuts"}),
    "core_dare_ties": Row(_delta(lambda c: _in_core(c, drops=True)), _HALF,
                          lacks={**_DROPS, **_COORDINATES, "itself": "elements are dropped"}),
    "core_tsv": Row(_delta(lambda c: spectral.tsv_m(c.deltas, c.weights, side=_core_side(c)))),
    "core_iso": Row(_delta(lambda c: spectral.iso_c(c.deltas, c.weights)), lacks={"itself": _ISO}),
    "knots_ties": Row(_delta(lambda c: _knots(c, drops=False)), _HALF, lacks={**_COORDINATES, "itself": "a trim cuts"}),
    "knots_dare": Row(_delta(lambda c: _knots(c, drops=True)), _HALF,
                      lacks={**_DROPS, **_COORDINATES, "itself": "elements are dropped"}),
    "nan": Row(_delta(lambda c: plain.summed(c.deltas, spectral.nan_weights(c.deltas, c.weights)))),
    "lines": Row(_delta(lambda c: 0.75 * plain.summed(c.deltas, c.weights)), {"alpha": 0.25, "beta": 0.5},  # l = L - 1
                 lacks={"itself": "alpha scales"}),
    "svc": Row(_delta(lambda c: spectral.svc(plain.summed(c.deltas, c.weights), c.deltas, c.weights))),
    "fisher": Row(lambda c: measured.fisher(c.models, c.statistics, c.weights), measure=_diagonal, lacks=_NEGATIVE),
    "regmean": Row(lambda c: measured.regmean(c.models, c.statistics, c.weights), measure=_gram, lacks=_NEGATIVE),
    "star": Row(_delta(lambda c: spectral.star(c.deltas, c.weights, 0.6)), {"eta": 0.6},
                lacks={**_NEGATIVE, "itself": "the smallest directions are cut"}),
}  # fmt: skip
