"""Reads the catalogs that a manifest needs: `read_inputs`. Configs and headers only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from merger.adapters.declare import WHOLE_MODULES
from merger.catalog import Catalog, read_catalog, read_statistics
from merger.errors import InfrastructureError, Problem, RaymergeError, RefusedError
from merger.manifest import Manifest, ModelReference, Reference, parse_reference
from merger.planning.build import output_kind
from merger.planning.inputs import Inputs, model_references, statistics_references, stays_adapter
from merger.planning.tokens import tokenizer_wish
from merger.vocabulary import (
    Vocabulary,
    changes_tokens,
    holds_copies,
    read_adapter_vocabulary,
    read_vocabulary,
    vocabulary_difference,
)

SourceKind = Literal["adapter", "model", "tensors"]


class Shelf:
    """Catalogs that were read, for all the merges that need them: what one of them found, or met, holds for all."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, SourceKind], Future[Catalog]] = {}

    def fetch(self, wanted: Iterable[tuple[Reference, SourceKind]]) -> None:
        """Read remote sources, all at once: each costs some round trips."""
        chosen = {(str(r), kind): r for r, kind in wanted if r.kind in ("hub", "s3")}
        chosen = {key: reference for key, reference in chosen.items() if key not in self._read}
        if len(chosen) > 1:
            with ThreadPoolExecutor(min(16, len(chosen)), "raymerge-catalog") as threads:
                for key, reference in chosen.items():
                    self._read[key] = threads.submit(read_catalog, reference, key[1])

    def read(self, reference: Reference, kind: SourceKind) -> Catalog:
        """The catalog of a source. Raises what reading it raised, again and again."""
        key = (str(reference), kind)
        if key not in self._read:
            future: Future[Catalog] = Future()
            self._read[key] = future
            try:
                future.set_result(read_catalog(reference, kind))
            except BaseException as error:
                future.set_exception(error)
                raise
        return self._read[key].result()


@dataclass(slots=True)
class _Reading:
    """Catalogs and problems so far."""

    shelf: Shelf
    catalogs: dict[str, Catalog] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    statistics: dict[str, Catalog] = field(default_factory=dict)
    made: Mapping[str, Catalog] = field(default_factory=dict)

    def read(self, reference: Reference, kind: SourceKind) -> Catalog | None:
        key = str(reference)
        if key not in self.catalogs and key in self.made:
            if self.made[key].kind != kind:
                self.problems.append(_other_kind(key, self.made[key].kind, kind))
                return None
            self.catalogs[key] = self.made[key]
            self.problems += self.catalogs[key].problems
        if key not in self.catalogs:
            try:
                self.catalogs[key] = self.shelf.read(reference, kind)
            except RefusedError as error:
                self.problems += [p for p in error.problems if p not in self.problems]
                return None
            if kind == "adapter":  # those of a model matter where its weights do: see ModelPlanner
                self.problems += self.catalogs[key].problems
        return self.catalogs[key]

    def read_statistics(self, reference: Reference) -> None:
        if str(reference) in self.statistics:
            return
        try:
            found = self.statistics[str(reference)] = read_statistics(reference)
            self.problems += found.problems
        except RefusedError as error:
            self.problems += [p for p in error.problems if p not in self.problems]

    def look_at(self, base: Reference) -> Catalog | None:
        """The base of adapters that stay adapters: checked against where it can be read, not needed where it is closed
        to us or not there."""
        before = len(self.problems)
        try:
            found = self.read(base, "model")
        except InfrastructureError as error:
            found = None
            self.problems += error.problems
        reasons, self.problems[before:] = self.problems[before:], []
        if found is None or reasons:
            self.catalogs.pop(str(base), None)
            self.warnings.append(
                Problem(
                    "base-not-read", "the base was not looked at, so the adapters are not checked against it",
                    str(base), "; ".join(problem.what for problem in reasons),
                    "give access to the base, or check the adapters' target modules yourself",
                )
            )  # fmt: skip
            return None
        return found


def _other_kind(key: str, made: str, wanted: str) -> Problem:
    return Problem(
        "wrong-kind", f"{key} makes {_ARTICLES[made]}, and {_ARTICLES[wanted]} is expected here", key, "",
        "list an adapter under adapters:, and write output.kind where it is not that of the sources",
    )  # fmt: skip


_ARTICLES: Final = {"adapter": "an adapter", "model": "a model", "tensors": "a file of tensors"}


def read_inputs(manifest: Manifest, shelf: Shelf | None = None, *, made: Mapping[str, Catalog] | None = None) -> Inputs:
    """Every catalog, and what the base is. Problems are collected, not raised.

    `shelf` is what is read already; `made` are the outputs of other documents, by the text of the references that name
    them.
    """
    reading = _Reading(shelf or Shelf(), made=made or {})
    reading.shelf.fetch(named_sources(manifest))
    kind = _model_kind(manifest)
    for entry in manifest.adapters or ():
        reading.read(entry.adapter, "adapter")
        if entry.initial is not None:
            reading.read(entry.initial, "adapter")
    for model in model_references(manifest):
        if _is_read(manifest, model):
            reading.read(model.model, kind)
        for adapter in model.adapters:
            reading.read(adapter, "adapter")
    for reference in statistics_references(manifest):
        reading.read_statistics(reference)
    adapters = [c for c in reading.catalogs.values() if c.kind == "adapter"]
    base, name, base_adapters = _base(manifest, reading, adapters)
    wish = tokenizer_wish(manifest)
    merged = [key for key, catalog in reading.catalogs.items() if catalog.kind in ("model", "adapter")]
    if manifest.experts is not None:
        merged = []  # embeddings and tokenizer are the base's
    if wish is not None and wish.source not in ("union", "base", *merged):
        reading.read(parse_reference(wish.source), "model")
    vocabularies = _vocabularies(reading, base, needed=wish is not None)
    merged.sort(key=lambda key: key != base)
    different = vocabulary_difference([vocabularies[key] for key in merged if key in vocabularies])
    if different is not None and wish is None:
        reading.warnings.append(different)
    return Inputs(
        catalogs=reading.catalogs, statistics=reading.statistics, base=base, base_adapters=base_adapters,
        base_name=name, vocabularies=vocabularies, problems=tuple(reading.problems), warnings=tuple(reading.warnings),
    )  # fmt: skip


def _is_read(manifest: Manifest, model: ModelReference) -> bool:
    """Whether a merge needs the weights of a model; adapters on their base stay adapters without it."""
    return output_kind(manifest) != "adapter" or manifest.base_model is None or not stays_adapter(manifest, model)


def _model_kind(manifest: Manifest) -> Literal["model", "tensors"]:
    """What the entries of `models`, and the base, are."""
    return "tensors" if output_kind(manifest) == "tensors" else "model"


def _vocabularies(reading: _Reading, base: str | None, *, needed: bool) -> dict[str, Vocabulary]:
    """What the tokenizers of models say, and of adapters that change rows of tokens. One that cannot be read is copied
    or left, and decides a number only where the manifest asks for it."""
    found: dict[str, Vocabulary] = {}
    for key, catalog in sorted(reading.catalogs.items(), key=lambda item: item[1].kind == "adapter"):
        if catalog.kind not in ("model", "adapter"):
            continue
        try:
            if catalog.kind == "adapter":
                vocabulary = read_adapter_vocabulary(key, catalog, None if base is None else found.get(base))
            else:
                vocabulary = read_vocabulary(key, catalog)
        except RefusedError as error:
            if needed:
                reading.problems += error.problems
            continue
        if vocabulary is not None:
            found[key] = vocabulary
    return found


def named_sources(manifest: Manifest) -> Iterator[tuple[Reference, SourceKind]]:
    """Every source that a manifest names itself."""
    kind = _model_kind(manifest)
    for entry in manifest.adapters or ():
        yield entry.adapter, "adapter"
        if entry.initial is not None:
            yield entry.initial, "adapter"
    for model in model_references(manifest):
        if _is_read(manifest, model):
            yield model.model, kind
        for adapter in model.adapters:
            yield adapter, "adapter"
    if manifest.base_model is not None:
        yield manifest.base_model.model, kind
        for adapter in manifest.base_model.adapters:
            yield adapter, "adapter"


def _base(
    manifest: Manifest, reading: _Reading, adapters: Sequence[Catalog]
) -> tuple[str | None, str | None, tuple[str, ...]]:
    """(the base's key if it was read, its name, adapters on it)."""
    named = {c.reference: c.base_name for c in adapters if c.base_name is not None}
    names = sorted(set(named.values()))
    given = manifest.base_model
    if given is None:
        if len(names) > 1:
            reading.problems.append(
                Problem(
                    "bases-differ",
                    "the adapters name different bases and the manifest names none",
                    "; ".join(f"{a}: {b}" for a, b in named.items()),
                    "deltas of different bases cannot be added",
                    "add base_model if they are the same model under several names",
                )
            )
            return None, None, ()
        if not names:
            return None, None, ()
        needed = _need_base(adapters) or _needs_rows(manifest, adapters)
        if manifest.adapters is None or (output_kind(manifest) == "adapter" and not needed):
            return None, names[0], ()
        reference = _named_base(names[0], named, reading)
        if reference is not None and reference.kind == "hub":
            revisions = sorted(set(_revisions(adapters).values()))
            if len(revisions) == 1 and revisions[0] != _DEFAULT_BRANCH:
                reference = replace(reference, revision=revisions[0])
            _report_revisions(names[0], reference.revision, adapters, reading)
        if reference is None or reading.read(reference, "model") is None:
            return None, names[0], ()
        return str(reference), names[0], ()
    for adapter in given.adapters:
        reading.read(adapter, "adapter")
    place = str(given.model) if given.model.kind == "s3" else given.model.root
    key = str(given.model)
    extracts = any(not stays_adapter(manifest, model) for model in model_references(manifest))
    optional = output_kind(manifest) == "adapter" and given.model.kind in ("hub", "s3") and not extracts
    optional = optional and not _needs_rows(manifest, adapters)
    read = reading.look_at(given.model) if optional else reading.read(given.model, _model_kind(manifest))
    label = place
    if given.model.kind != "hub" and len(names) == 1:
        label = names[0]  # a folder or a bucket is a place where the same base lies
    _report_difference(place, named, reading)
    if given.model.kind == "hub":
        _report_revisions(place, given.model.revision, adapters, reading)
    return (key if read is not None else None), label, tuple(str(a) for a in given.adapters)


def _need_base(adapters: Sequence[Catalog]) -> bool:
    """Whether a delta of one of these cannot be told without the base. IA3 alone stays IA3."""
    if all(catalog.config.get("peft_type") == "IA3" for catalog in adapters):
        return False
    if len(adapters) > 1 and any(holds_copies(catalog) for catalog in adapters):
        return True
    modules = (module for catalog in adapters for module in catalog.modules.values())
    return any(module.needs_base and module.tuner not in WHOLE_MODULES for module in modules)


def _needs_rows(manifest: Manifest, adapters: Sequence[Catalog]) -> bool:
    """Whether adapters are merged token by token: what they changed in the base's rows is told by these."""
    return tokenizer_wish(manifest) is not None and any(changes_tokens(catalog) for catalog in adapters)


def _named_base(name: str, named: Mapping[str, str], reading: _Reading) -> Reference | None:
    """The base that only adapters name: org/name on the Hub, or a local folder when the adapters are local."""
    local = Path(name).expanduser()
    try:
        if local.is_dir():
            if any(not a.startswith("/") for a in named):
                raise _not_taken(name)
            return parse_reference(str(local.absolute()))
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise _not_taken(name)
        return parse_reference(name)
    except RaymergeError as error:
        reading.problems += error.problems
        return None


def _not_taken(name: str) -> RefusedError:
    return RefusedError.of(
        "no-base", f"the base {name!r}, which the adapters name, is not taken from there", where="base_model",
        why="a base that only an adapter names must be org/name, or a folder when the adapter is local",
        fix="add base_model to the manifest, or --base",
    )  # fmt: skip


_DEFAULT_BRANCH: Final = "main"


def _revisions(adapters: Sequence[Catalog]) -> dict[str, str]:
    """Adapter → the revision of its base that it was trained on, where it says one."""
    return {c.reference: str(c.config["revision"]) for c in adapters if c.base_name and c.config.get("revision")}


def _report_revisions(base: str, revision: str | None, adapters: Sequence[Catalog], reading: _Reading) -> None:
    """Adapters of another revision of this base: their deltas are of other weights."""
    same = {c.reference for c in adapters if c.base_name == base}
    read = revision or _DEFAULT_BRANCH
    other = {a: r for a, r in _revisions(adapters).items() if a in same and r != read}
    if other:
        reading.warnings.append(
            Problem(
                "base-revision-differs",
                f"{base} is taken at {read}, and {len(other)} adapter(s) were trained on "
                f"{', '.join(sorted(set(other.values())))}",
                "; ".join(f"{a}: {r}" for a, r in other.items()),
                "a delta is of the weights that it was trained on",
                f"write base_model: {base}@REVISION, or check that both hold the same weights",
            )
        )  # fmt: skip


def _report_difference(given: str, named: Mapping[str, str], reading: _Reading) -> None:
    other = {a: b for a, b in named.items() if b != given and os.path.realpath(b) != os.path.realpath(given)}
    if not other:
        return
    folder = given.startswith("/")
    reading.warnings.append(
        Problem(
            "base-differs",
            f"base_model is {given}, and {len(other)} adapter(s) {'call their base' if folder else 'name'} "
            f"{', '.join(sorted(set(other.values())))}",
            "; ".join(f"{a}: {b}" for a, b in other.items()),
            "the manifest wins; a folder's name does not tell which model it holds" if folder else "the manifest wins",
            "check that they are the same model",
        )
    )
