"""Reads the catalogs that a manifest needs: `read_inputs`. Configs and headers only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from merger.catalog import Catalog, read_catalog
from merger.errors import InfrastructureError, Problem, RaymergeError, RefusedError
from merger.manifest import Manifest, Reference, parse_reference
from merger.planning.build import output_kind
from merger.planning.inputs import Inputs, model_references
from merger.planning.tokens import tokenizer_wish
from merger.vocabulary import Vocabulary, read_vocabulary, vocabulary_difference


@dataclass(slots=True)
class _Reading:
    """Catalogs and problems so far."""

    catalogs: dict[str, Catalog] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    ahead: dict[str, Future[Catalog]] = field(default_factory=dict)

    def fetch(self, wanted: Iterable[tuple[Reference, Literal["adapter", "model"]]]) -> None:
        """Begin to read remote sources, all at once: each costs some round trips."""
        chosen = {str(r): (r, kind) for r, kind in wanted if r.kind in ("hub", "s3")}
        if len(chosen) > 1:
            with ThreadPoolExecutor(min(16, len(chosen)), "raymerge-catalog") as threads:
                self.ahead = {key: threads.submit(read_catalog, *one) for key, one in chosen.items()}

    def read(self, reference: Reference, kind: Literal["adapter", "model"]) -> Catalog | None:
        key = str(reference)
        if key not in self.catalogs:
            ahead = self.ahead.get(key)
            try:
                self.catalogs[key] = read_catalog(reference, kind) if ahead is None else ahead.result()
            except RefusedError as error:
                self.problems += [p for p in error.problems if p not in self.problems]
                return None
            self.problems += self.catalogs[key].problems
        return self.catalogs[key]

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


def read_inputs(manifest: Manifest) -> Inputs:
    """Every catalog, and what the base is. Problems are collected, not raised."""
    reading = _Reading()
    reading.fetch(_named(manifest))
    for entry in manifest.adapters or ():
        reading.read(entry.adapter, "adapter")
        if entry.initial is not None:
            reading.read(entry.initial, "adapter")
    for model in model_references(manifest):
        if output_kind(manifest) == "model" or manifest.base_model is None:
            reading.read(model.model, "model")
        for adapter in model.adapters:
            reading.read(adapter, "adapter")
    adapters = [c for c in reading.catalogs.values() if c.kind == "adapter"]
    base, name, base_adapters = _base(manifest, reading, adapters)
    wish = tokenizer_wish(manifest)
    merged = [key for key, catalog in reading.catalogs.items() if catalog.kind == "model"]
    if wish is not None and wish.source not in ("union", "base", *merged):
        reading.read(parse_reference(wish.source), "model")
    vocabularies = _vocabularies(reading, needed=wish is not None)
    different = vocabulary_difference([vocabularies[key] for key in merged if key in vocabularies])
    if different is not None and wish is None:
        reading.warnings.append(different)
    return Inputs(
        catalogs=reading.catalogs, base=base, base_adapters=base_adapters, base_name=name, vocabularies=vocabularies,
        problems=tuple(reading.problems), warnings=tuple(reading.warnings),
    )  # fmt: skip


def _vocabularies(reading: _Reading, *, needed: bool) -> dict[str, Vocabulary]:
    """What the models' tokenizers say. One that cannot be read is copied or left, and decides a number only where the
    manifest asks for it."""
    found = {}
    for key, catalog in reading.catalogs.items():
        if catalog.kind != "model":
            continue
        try:
            vocabulary = read_vocabulary(key, catalog)
        except RefusedError as error:
            if needed:
                reading.problems += error.problems
            continue
        if vocabulary is not None:
            found[key] = vocabulary
    return found


def _named(manifest: Manifest) -> Iterator[tuple[Reference, Literal["adapter", "model"]]]:
    """Every source that a manifest names itself."""
    for entry in manifest.adapters or ():
        yield entry.adapter, "adapter"
        if entry.initial is not None:
            yield entry.initial, "adapter"
    for model in model_references(manifest):
        if output_kind(manifest) == "model" or manifest.base_model is None:
            yield model.model, "model"
        for adapter in model.adapters:
            yield adapter, "adapter"
    if manifest.base_model is not None:
        yield manifest.base_model.model, "model"
        for adapter in manifest.base_model.adapters:
            yield adapter, "adapter"


def _base(
    manifest: Manifest, reading: _Reading, adapters: Iterable[Catalog]
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
        if manifest.adapters is None or output_kind(manifest) == "adapter":
            return None, names[0], ()
        reference = _named_base(names[0], named, reading)
        if reference is None or reading.read(reference, "model") is None:
            return None, names[0], ()
        return str(reference), names[0], ()
    for adapter in given.adapters:
        reading.read(adapter, "adapter")
    place = str(given.model) if given.model.kind == "s3" else given.model.root
    key = str(given.model)
    optional = output_kind(manifest) == "adapter" and given.model.kind in ("hub", "s3")
    read = reading.look_at(given.model) if optional else reading.read(given.model, "model")
    label = place
    if given.model.kind != "hub" and len(names) == 1:
        label = names[0]  # a folder or a bucket is a place where the same base lies
    _report_difference(place, named, reading)
    return (key if read is not None else None), label, tuple(str(a) for a in given.adapters)


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
