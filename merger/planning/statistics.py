"""Which of the statistics that a user brought along goes with which tensor: `Statistics`. Pure.

Tensors go by the names of the source's own weights (of an adapter: of the base's weights that it changes). A diagonal
has the shape of its tensor; a Gram matrix is (columns, columns) of its matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from merger.catalog import StoredTensor
from merger.errors import PlanError, Problem
from merger.methods import MethodSpec
from merger.methods.rounds import Call
from merger.planning.inputs import MergeInput, SourceTable
from merger.planning.nouns import DenseTerm, Entry

_READ: Final = ("F16", "BF16", "F32")
_SHOWN: Final = 5


@dataclass(slots=True)
class Statistics:
    """Gives the entries of one tensor after another their statistics, and says at the end what was not used."""

    spec: MethodSpec
    table: SourceTable
    attached: int = 0
    """Tensors that have them."""
    averaged: list[str] = field(default_factory=list)
    """Matrices that lack them and are merged as a mean."""

    def attach(
        self, call: Call, shape: tuple[int, ...], sources: Sequence[tuple[MergeInput, str]], entries: tuple[Entry, ...],
        *, transposed: bool = False,
    ) -> tuple[Call, tuple[Entry, ...]]:  # fmt: skip
        """The call and the entries of a tensor, with `sources` by the names it has there. Without statistics of it the
        call is a plain mean where that is allowed.

        Raises PlanError: `missing-statistics`, `shape-mismatch`, `dtype-mismatch`, `weights-cancel`, `not-yet`.
        """
        if self.spec.statistics == "none":
            return call, entries
        if not any(call.weights):
            raise PlanError.of(
                "weights-cancel", "the weights of a tensor sum to zero", where="parameters.weight",
                why=f"{self.spec.name} divides by them", fix="give one source a weight above 0",
            )  # fmt: skip
        held = [self._held(source, name) for source, name in sources]
        lacking = [source.label for (source, _), stored in zip(sources, held, strict=True) if stored is None]
        if len(lacking) == len(held):
            return self._plain(call, shape, sources), entries
        if lacking:
            having = [source.label for (source, _), stored in zip(sources, held, strict=True) if stored is not None]
            raise PlanError.of(
                "missing-statistics", f"some sources have no statistics of {sources[0][1]}",
                where=f"those of {', '.join(having)} hold it, those of {', '.join(lacking)} do not",
                why="what one source lacks cannot be weighed against what another has",
                fix="measure the same tensors of every source",
            )  # fmt: skip
        if transposed and self.spec.statistics == "gram":
            raise PlanError.of(
                "not-yet", f"{sources[0][1]} is stored transposed (Conv1D), which {self.spec.name} cannot merge yet",
                where=self.table.catalog(sources[0][0].statistics or 0).reference,
                why="a Gram matrix of its inputs stands on its other side", fix="leave it out of the statistics",
            )  # fmt: skip
        made = []
        for (source, name), stored, entry in zip(sources, held, entries, strict=True):
            assert stored is not None
            assert source.statistics is not None
            self._check(source.statistics, name, shape, stored)
            made.append(replace(entry, statistic=DenseTerm(source.statistics, name)))
        self.attached += 1
        return call, tuple(made)

    def _held(self, source: MergeInput, name: str) -> StoredTensor | None:
        return None if source.statistics is None else self.table.catalog(source.statistics).tensors.get(name)

    def _plain(self, call: Call, shape: tuple[int, ...], sources: Sequence[tuple[MergeInput, str]]) -> Call:
        name = sources[0][1]
        if call.option("missing") == "refuse":
            raise PlanError.of(
                "missing-statistics", f"no source has statistics of {name}",
                where=", ".join(
                    self.table.catalog(s.statistics).reference for s, _ in sources if s.statistics is not None
                ),
                why=f"{self.spec.name} weighs every tensor by what was measured of it",
                fix="measure it too, or write parameters: {missing: mean} to take the weighted mean of such tensors",
            )  # fmt: skip
        if len(shape) > 1:
            self.averaged.append(name)
        return replace(call, combine="mean", normalize=True, num_rounds=0)

    def _check(self, index: int, name: str, shape: tuple[int, ...], stored: StoredTensor) -> None:
        where, found = self.table.catalog(index).reference, stored.spec
        gram = self.spec.statistics == "gram"
        if gram and len(shape) != 2:
            raise PlanError.of(
                "shape-mismatch", f"{name} is no matrix, and there is a Gram matrix of it", where=where,
                why="only a matrix has rows that are multiplied by inputs", fix="leave it out of the statistics",
            )  # fmt: skip
        expected = (shape[1], shape[1]) if gram else shape
        if found.shape != expected:
            raise PlanError.of(
                "shape-mismatch",
                f"the statistics of {name} are {_times(found.shape)}, and {_times(expected)} is needed",
                where=where,
                why="a Gram matrix is inputs × inputs, for the tensor's last dimension" if gram
                else "there is one figure for each element",
                fix="measure this very model",
            )  # fmt: skip
        if found.dtype.code not in _READ:
            raise PlanError.of(
                "dtype-mismatch", f"the statistics of {name} are stored as {found.dtype}", where=where,
                why=f"they are read in {', '.join(_READ)}, and nothing is cast down unasked",
                fix="save them as float32",
            )  # fmt: skip

    def problems(self, known: Sequence[tuple[MergeInput, frozenset[str] | None]]) -> list[Problem]:
        """What the statistics hold and no source has, given the names that each source has (None: not known)."""
        if self.spec.statistics == "none":
            return []
        found = []
        for source, names in known:
            if source.statistics is None or names is None:
                continue
            catalog = self.table.catalog(source.statistics)
            lost = sorted(set(catalog.tensors) - names)
            if lost:
                found.append(
                    Problem(
                        "no-such-tensor",
                        f"{len(lost)} of {len(catalog.tensors)} statistics are of tensors that {source.label} has not",
                        f"{catalog.reference}: {', '.join(lost[:_SHOWN])}{', …' if len(lost) > _SHOWN else ''}",
                        f"it has, for example, {', '.join(sorted(names)[:3])}",
                        "name them as the weights are named, and leave out what is not there",
                    )
                )  # fmt: skip
        if not found and not self.attached:
            found.append(
                Problem(
                    "missing-statistics", "no tensor that is merged has statistics", "statistics",
                    "all would be plain means", "check the names in the files, or use linear",
                )
            )  # fmt: skip
        return list(dict.fromkeys(found))

    def warnings(self) -> list[Problem]:
        """What is said of tensors without statistics, beside vectors, which have no Gram matrix."""
        if not self.averaged:
            return []
        return [
            Problem(
                "averaged", f"{len(self.averaged)} matrices have no statistics and are merged as their weighted mean",
                ", ".join(self.averaged[:_SHOWN]) + (", …" if len(self.averaged) > _SHOWN else ""),
                "embeddings, for example, have no Gram matrix", "measure them too, if they are linear layers",
            )
        ]  # fmt: skip


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "a scalar"
