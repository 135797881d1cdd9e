"""What an adapter does to the tensors of its base, as plain values. No torch, no IO.

    AdapterReading ─ modules (one adapted layer each) and what could not be understood
    AdapterModule  ─ changes, one a tensor of the base
    Change         ─ steps, done one after another to the rows of that tensor

A step either adds something that the adapter's files alone decide, or is a function of the rows it meets. What only
adds is a delta without its base; what does not is a delta once the base is taken away.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal

from merger.errors import Problem

Number = bool | int | float | str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class View:
    """How a stored tensor is taken as a matrix: its first dimension against all others, cut, then transposed."""

    rows: tuple[int, int, int] | None = None
    """(start, stop, step) of the stored rows; None takes all."""
    cols: tuple[int, int, int] | None = None
    transposed: bool = False


WHOLE: Final = View()


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adds scaling · B · diag(D) · A."""

    a: str
    """Stored tensor that is (rank, columns) as `a_view` takes it."""
    b: str
    """Stored tensor that is (rows, rank) as `b_view` takes it."""
    scaling: float
    rank: int
    a_view: View = WHOLE
    b_view: View = WHOLE
    diagonal: str = ""
    """Stored tensor of `rank` elements; empty for none."""
    initial: bool = False
    """Whether the factors are those of the adapter before training, which the manifest names."""


@dataclass(frozen=True, slots=True)
class Formula:
    """Anything else, by its name in merger/adapters/formulas.py: a function of the rows that earlier steps left."""

    kind: str
    tensors: tuple[tuple[str, str], ...] = ()
    """(role, stored tensor)."""
    numbers: tuple[tuple[str, Number], ...] = ()
    adds: bool = False
    """Whether what it gives is added to the rows, which it does not look at."""
    whole: bool = False
    """Whether it needs all rows at once."""


@dataclass(frozen=True, slots=True)
class Saved:
    """The tensor is replaced by one that the adapter holds whole."""

    tensor: str


Step = LowRank | Formula | Saved


def adds(step: Step) -> bool:
    """Whether a step adds what the adapter's files alone decide."""
    return isinstance(step, LowRank) or (isinstance(step, Formula) and step.adds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a module does to one tensor of the base."""

    target: str
    """As the adapter's names say it."""
    steps: tuple[Step, ...]
    shape: tuple[int, int] | None = None
    """(rows, columns) of the matrix that the steps work on; None takes the tensor's own."""
    keeps_tie: bool = False
    """Whether a head that is tied to this tensor follows it."""
    optional: bool = False
    """Whether it is left out where the base has no such tensor (a bias)."""


WHOLE_MODULES: Final = ("modules_to_save", "embeddings")
"""Tuners of modules that are no deltas: several of one need a word of the manifest."""
Layer = Literal["linear", "embedding", "conv", "attention", "experts", "vector", "saved"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterModule:
    """One adapted layer, as PEFT forms its delta: (out, in), an embedding's (dim, vocabulary)."""

    module: str
    """Path of the layer, as the adapter's names say it."""
    tuner: str
    """What kind of adapter it is of, for people: `lora`, `dora`, `ia3` …"""
    layer: Layer
    changes: tuple[Change, ...]
    rank: int = 0
    scaling: float = 1.0
    kernel: tuple[int, ...] = ()
    """Of a convolution: the size of its kernel."""

    @property
    def target(self) -> str:
        return self.changes[0].target

    @property
    def shape(self) -> tuple[int, int] | None:
        return self.changes[0].shape

    @property
    def pairs(self) -> tuple[LowRank, ...]:
        """Its delta as low-rank products; empty where it is none."""
        steps = self.changes[0].steps
        found = tuple(step for step in steps if isinstance(step, LowRank))
        return found if len(self.changes) == 1 and len(found) == len(steps) else ()

    @property
    def needs_base(self) -> bool:
        """Whether its delta cannot be told without the base."""
        return not all(adds(step) for change in self.changes for step in change.steps)


@dataclass(slots=True)
class AdapterReading:
    """What the files of an adapter hold, by the tuner families' own rules."""

    modules: dict[str, AdapterModule] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    landed: set[str] = field(default_factory=set)
    """Stored tensors that a module uses."""

    def refuse(self, what: str, where: str, why: str, fix: str = "") -> None:
        problem = Problem("unsupported-adapter", what, where, why, fix or "leave this adapter out")
        if problem not in self.problems:
            self.problems.append(problem)

    def add(self, module: AdapterModule) -> None:
        self.modules[module.module] = module
        for change in module.changes:
            for step in change.steps:
                self.landed |= stored_tensors(step)


def stored_tensors(step: Step) -> set[str]:
    """The stored tensors that a step reads from the adapter itself."""
    if isinstance(step, LowRank):
        return set() if step.initial else {step.a, step.b, step.diagonal} - {""}
    if isinstance(step, Formula):
        return {name for _, name in step.tensors}
    return {step.tensor}


def transposed(change: Change) -> Change:
    """The same change of a tensor that the base stores transposed."""
    steps: list[Step] = []
    for step in change.steps:
        if isinstance(step, LowRank):
            steps.append(
                replace(step, a=step.b, b=step.a, a_view=_flipped(step.b_view), b_view=_flipped(step.a_view))
            )  # fmt: skip
        elif isinstance(step, Formula):
            numbers = dict(step.numbers)
            numbers["transposed"] = not numbers.get("transposed", False)
            steps.append(replace(step, numbers=tuple(numbers.items()), whole=step.whole or step.kind in _NEED_ROWS))
        else:
            steps.append(step)
    shape = None if change.shape is None else (change.shape[1], change.shape[0])
    return replace(change, steps=tuple(steps), shape=shape)


_NEED_ROWS: Final = frozenset({"magnitude"})
"""Formulas that look at whole rows of PEFT's orientation: transposed, they need whole columns."""


def _flipped(view: View) -> View:
    return replace(view, transposed=not view.transposed)
