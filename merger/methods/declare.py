"""What a merge method is before any arithmetic: its blocks, parameters, rounds and cost. No torch here.

A method is a preset of blocks (design law 4): prepare → combine → finish, all acting in one space. The planner reads
these declarations; merger/methods/blocks.py holds the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from merger.methods.tiles import TileBlock
    from merger.methods.whole import CoreBlock, WholeBlock

Scalar = float | int | bool | str
"""A parameter's value for one tensor, after gradients and filters."""

Space = Literal["weight", "delta", "factors", "core"]
Cut = Literal["elements", "rows", "whole"]
Scope = Literal["source", "global"]
Statistics = Literal["none", "diagonal", "gram"]


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Final = _Required()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSpec:
    """One parameter of a method: its meaning, scope, bounds and default."""

    name: str
    kind: Literal["float", "int", "bool", "choice"]
    scope: Scope
    """`source`: one value a source (falling back to the manifest's `parameters`); `global`: one value a merge."""
    doc: str
    default: Scalar | _Required = REQUIRED
    adapter_default: Scalar | None = None
    """Default for an entry of `adapters:` where it differs."""
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    choices: tuple[str, ...] = ()
    synonyms: Mapping[Scalar, Scalar] | None = None
    """Other spellings of a value, for example mergekit's `rescale: true` for `l1`."""

    def check(self, value: object) -> Scalar:
        """The value, normalised. Raises ValueError that says what is allowed."""
        if self.synonyms is not None and isinstance(value, bool | str) and value in self.synonyms:
            value = self.synonyms[value]
        if self.kind == "choice":
            if value not in self.choices:
                raise ValueError(f"{self.name} is one of {', '.join(self.choices)}, not {value!r}")
            return str(value)
        if self.kind == "bool":
            if isinstance(value, bool):
                return value
            raise ValueError(f"{self.name} is true or false, not {value!r}")
        if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"{self.name} is a number, not {value!r}") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.name} is a number, not {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{self.name} is {value}, which is not a finite number")
        if value < self.low or value > self.high or (self.low_open and value == self.low):
            raise ValueError(f"{self.name} is {value:g}, outside {self.bounds()}")
        if self.kind == "int":
            if value != int(value):
                raise ValueError(f"{self.name} is a whole number, not {value:g}")
            return int(value)
        return float(value)

    def bounds(self) -> str:
        """`(0, 1]`, for people."""
        left = "(" if self.low_open or self.low == -math.inf else "["
        right = ")" if self.high == math.inf else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """A named method: which blocks, in which spaces, at what cost."""

    name: str
    summary: str
    """One line for the table of methods."""
    spaces: tuple[Space, ...]
    """Spaces it may work in; the first is the default for models."""
    prepare: Literal["none", "trim", "drop", "band", "magprune"] = "none"
    combine: Literal["sum", "mean", "elect", "pass", "block"]
    tile: TileBlock | None = None
    """The method's own combine step, streamed."""
    whole: WholeBlock | None = None
    """The method's own combine step on whole tensors of models."""
    core: CoreBlock | None = None
    """The method's own combine step on the exact core of adapters."""
    parameters: tuple[ParameterSpec, ...]
    base: Literal["required", "optional", "member"]
    """`required`: deltas need one; `optional`; `member`: a listed base is one more source."""
    max_sources: int | None = None
    """How many it merges, where that is fixed (a base that is one of them counts)."""
    closed_on_deltas: bool
    """True where the result for base+ΔW is base + a function of the ΔWs alone, so that an adapter can hold it."""
    linear: bool = False
    """True where the result is a linear combination of the ΔWs: concat or the exact low-rank core can hold it."""
    statistics: Statistics = "none"
    """What each source must bring along (`statistics:` in the manifest): a tensor of the same shape for each of its
    tensors, or a matrix (columns, columns) for each of its matrices."""
    depth: bool = False
    """Whether lambda is multiplied by alpha + beta·t, with t = l/(L-1) at layer l of L."""
    flat: bool = False
    """Whether it makes singular values equal: then none of its directions can be told from another by its size."""
    cut: Cut
    """How a tensor may be divided among units."""
    store: Literal["any", "concat", "svd"] = "any"
    """A store that the name itself asks for."""
    paper: str
    bibtex: str = ""
    any_order: bool = False
    """A claim that `check_method` tests: the order of the sources changes no more than the last digits."""
    one_is_itself: bool = False
    """A claim that `check_method` tests: one source at weight 1 gives that source."""

    def parameter(self, name: str) -> ParameterSpec | None:
        return next((p for p in self.parameters if p.name == name), None)
