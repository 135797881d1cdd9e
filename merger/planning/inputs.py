"""What a manifest merges, in one normal form: `Inputs` from catalogs, `MergeInput` from the manifest's four forms.

Pure: the catalogs were read before (merger/catalog.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from merger.catalog import Catalog
from merger.errors import Problem
from merger.manifest import AdapterEntry, Manifest, ModelReference, ParameterValue, Reference
from merger.planning.nouns import Source
from merger.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Every catalog a manifest needs, by the canonical text of its reference."""

    catalogs: Mapping[str, Catalog]
    statistics: Mapping[str, Catalog] = field(default_factory=dict)
    """What was measured of sources, by the canonical text of its reference."""
    base: str | None = None
    """The base that deltas are relative to, where it was read."""
    base_adapters: tuple[str, ...] = ()
    """Adapters on the base itself (`base_model: B+a`)."""
    base_name: str | None = None
    """What the base is called, also where it need not be read."""
    vocabularies: Mapping[str, Vocabulary] = field(default_factory=dict)
    """Of models that have a tokenizer.json."""
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeInput:
    """One thing that is merged: a model with any adapters on it."""

    label: str
    model: int | None
    """Source index of the model; None where a merged adapter needs none."""
    adapters: tuple[int, ...]
    parameters: Mapping[str, ParameterValue]
    position: int
    """Index in the manifest."""
    is_adapter: bool
    """Whether it is an entry of `adapters:`."""
    first_layer: int = 0
    """Layer that becomes the first of the output's slice."""
    initial: int | None = None
    """Source index of the adapter before training, where the manifest names it."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    statistics: int | None = None
    """Source index of what was measured of it."""

    def takes(self, module: str) -> bool:
        """Whether this entry's include and exclude patterns let a module through."""

        def matches(patterns: Sequence[str]) -> bool:
            return any(fnmatchcase(module, p) or p in module for p in patterns)

        return (not self.include or matches(self.include)) and not matches(self.exclude)


@dataclass(slots=True)
class SourceTable:
    """The plan's sources, each catalog once."""

    inputs: Inputs
    sources: list[Source] = field(default_factory=list)
    _index: dict[str, int] = field(default_factory=dict)

    def index(self, reference: str, label: str = "") -> int:
        """Index of a reference's source, added at its first use."""
        if reference not in self._index:
            self._index[reference] = len(self.sources)
            self.sources.append(Source(label or reference, self.inputs.catalogs[reference], reference))
        return self._index[reference]

    def statistics(self, reference: Reference | None) -> int | None:
        """Index of what was measured of a source; a place may hold a model and its statistics."""
        if reference is None:
            return None
        key = f"statistics {reference}"
        if key not in self._index:
            self._index[key] = len(self.sources)
            self.sources.append(Source(str(reference), self.inputs.statistics[str(reference)]))
        return self._index[key]

    def catalog(self, index: int) -> Catalog:
        return self.sources[index].catalog


def adapter_input(table: SourceTable, entry: AdapterEntry, position: int, base: int | None) -> MergeInput:
    """An entry of `adapters:`."""
    reference = str(entry.adapter)
    adapter = table.index(reference, entry.name or reference)
    initial = None if entry.initial is None else table.index(str(entry.initial))
    return MergeInput(
        label=entry.name or reference, model=base, adapters=(adapter,),
        parameters=entry.parameters, position=position, is_adapter=True, initial=initial, include=entry.include,
        exclude=entry.exclude, statistics=table.statistics(entry.statistics),
    )  # fmt: skip


def model_input(
    table: SourceTable, model: ModelReference, parameters: Mapping[str, ParameterValue], position: int,
    first_layer: int = 0, statistics: Reference | None = None,
) -> MergeInput:  # fmt: skip
    """An entry of `models:` or a source of a slice, with the adapters written after `+`."""
    return MergeInput(
        label=str(model), model=table.index(str(model.model)),
        adapters=tuple(table.index(str(a)) for a in model.adapters), parameters=parameters, position=position,
        is_adapter=False, first_layer=first_layer, statistics=table.statistics(statistics),
    )  # fmt: skip


def statistics_references(manifest: Manifest) -> list[Reference]:
    """Every place of statistics that a manifest names."""
    found = [adapter.statistics for adapter in manifest.adapters or ()]
    found += [entry.statistics for entry in manifest.models or ()]
    slices = list(manifest.slices or ())
    for module in (manifest.modules or {}).values():
        found += [entry.statistics for entry in module.models or ()]
        slices += module.slices or ()
    found += [source.statistics for part in slices for source in part.sources]
    return [reference for reference in found if reference is not None]


def stays_adapter(manifest: Manifest, model: ModelReference) -> bool:
    """Whether a model of a merge into an adapter is one adapter on the base, whose factors are all that is needed."""
    base = manifest.base_model
    return len(model.adapters) == 1 and base is not None and str(model.model) == str(base.model)


def model_references(manifest: Manifest) -> list[ModelReference]:
    """Every model that a manifest names as a source, in its order."""
    found = [entry.model for entry in manifest.models or ()]
    found += [expert.source_model for expert in (*(manifest.experts or ()), *(manifest.shared_experts or ()))]
    slices = list(manifest.slices or ())
    for module in (manifest.modules or {}).values():
        found += [entry.model for entry in module.models or ()]
        slices += module.slices or ()
    for part in slices:
        found += [source.model for source in part.sources]
        if part.base_model is not None:
            found.append(part.base_model)
    return found
