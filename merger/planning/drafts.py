"""What a model's planner makes before files are laid out: segments of its sources, a draft of each output tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from merger.manifest import ParameterValue
from merger.methods.rounds import Call
from merger.planning.inputs import MergeInput, SourceTable
from merger.planning.layout import Layout
from merger.planning.memory import extent_rows, tile_rows
from merger.planning.modules import WHOLE, Module
from merger.planning.nouns import DenseTerm, Entry, Operand, Place, StoreSpec, Task
from merger.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive layers of the output and where each source's layers begin; the whole model is one segment."""

    inputs: tuple[MergeInput, ...]
    base: MergeInput | None
    shared: tuple[Mapping[str, ParameterValue], ...]
    first_layer: int
    num_layers: int
    module: Module = WHOLE


@dataclass(frozen=True, slots=True)
class CodedPlace:
    """One part of an output tensor that is written as codes."""

    role: str
    spec: TensorSpec
    rows: int
    row_bytes: int
    covers: int
    """Rows of the result that one row of it is for; 0: all."""


@dataclass(frozen=True, slots=True)
class Draft:
    """One output tensor before it has a place."""

    spec: TensorSpec
    task: Task
    store: StoreSpec
    call: Call
    space: Literal["delta", "core"] = "delta"
    coded: tuple[CodedPlace, ...] = ()
    """Where it is written as codes: its parts, in the place of `spec`."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What lies in the output's files."""
        return tuple(part.spec for part in self.coded) if self.coded else (self.spec,)


def copied(table: SourceTable, name: str, shape: tuple[int, ...], operands: Sequence[Operand]) -> Draft:
    """Bytes untouched; several sources (buffers) must be equal."""
    first = operands[0][0]
    assert isinstance(first, DenseTerm)
    dtype = table.catalog(first.source).stored(first.tensor).spec.dtype
    spec = TensorSpec(name, dtype, shape)
    call = Call(method="copy", combine="equal", weights=(1.0,) * len(operands))
    store = StoreSpec("copy")
    tile = tile_rows(spec.cols, products=False)
    row_bytes = max(1, spec.nbytes // max(1, spec.rows))
    task = Task(
        name=name, rows=spec.rows if dtype.bits % 8 == 0 else 1, cols=spec.cols, base=None,
        entries=tuple(Entry(o[:1]) for o in operands), results=(), tile_rows=tile,
        extent_rows=extent_rows(tile, row_bytes), fused=False,
    )  # fmt: skip
    return Draft(spec, task, store, call)


def places_of(layout: Layout, tensor: Draft) -> tuple[Place, ...]:
    """Where a tensor goes, or each of its parts."""
    if not tensor.coded:
        return (_place(layout, tensor),)
    return tuple(
        replace(layout.place(part.spec.name, part.role), rows=part.rows, row_bytes=part.row_bytes, covers=part.covers)
        for part in tensor.coded
    )


def _place(layout: Layout, tensor: Draft) -> Place:
    """A tensor's place, cut into the rows of its task."""
    place = layout.place(tensor.spec.name)
    if tensor.store.kind == "copy" or place.rows == tensor.task.rows:
        return place
    return replace(place, rows=tensor.task.rows, row_bytes=tensor.task.cols * tensor.spec.dtype.itemsize)
