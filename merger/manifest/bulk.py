"""A bulk written out as its merges: entries over defaults, times the matrix. Pure: whoever calls it has looked up what
`each` and `manifest:` name (merger/bulk.py).

    {name}         the entry's name
    {date}         the day of the run, in the schedule's time zone
    {each}         the adapter found, in a bulk with `each`
    {a.b[0].c}     a value of the merge itself, the matrix's for example
    {fingerprint}  the start of the plan's digest; only in output.path, and filled in when the merge is planned
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from merger.errors import ManifestError, Problem
from merger.manifest.documents import Document, join_path, set_value, split_path
from merger.manifest.grammar import BulkManifest, Manifest
from merger.manifest.load import load_merge
from merger.manifest.references import Reference

FINGERPRINT: Final = "{fingerprint}"
_PLACEHOLDER: Final = re.compile(r"\{([^{}]*)\}")
_FILLED: Final = frozenset(
    {"path", "commit_message", "adapter", "model", "base_model", "initial", "statistics", "source_model"}
)
"""Keys whose text may hold placeholders."""
_SOURCES: Final = ("adapters", "models", "slices", "modules")
_METHODS: Final = ("merge_method", "combination_type", "combine")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._+-]+")
_SHOWN: Final = 3
"""Names in a message about many merges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkMerge:
    """One merge of a bulk."""

    label: str
    """Its name, and behind it what the matrix chose: no two merges of a bulk have the same."""
    name: str
    share: float
    manifest: Manifest
    chosen: Mapping[str, Any]
    """Of the matrix: dotted keys to values."""


@dataclass(frozen=True, slots=True)
class Found:
    """An adapter below the place that `each` names."""

    name: str
    """Its path below that place, with `--` for `/`."""
    reference: Reference


@dataclass(frozen=True, slots=True)
class _Draft:
    name: str
    share: float
    document: Document
    each: str | None = None


def expand_bulk(
    document: Document,
    bulk: BulkManifest,
    *,
    date: str,
    found: Sequence[Found] = (),
    manifests: Mapping[str, Document] | None = None,
    strict: bool = False,
    cwd: str | Path | None = None,
) -> tuple[BulkMerge, ...]:
    """Every merge that a bulk stands for, in written order.

    `found` is what lies below `each`; `manifests` holds what the entries' `manifest:` name, by reference. Raises
    ManifestError with everything that is wrong with any merge, what several have in common once.
    """
    merges: list[BulkMerge] = []
    problems: list[tuple[str, Problem]] = []
    defaults = _part(document, "defaults")
    for draft in _drafts(document, bulk, defaults, found, manifests or {}):
        for chosen in _combinations(bulk.matrix):
            label = "-".join([draft.name, *(_chosen_text(bulk.matrix[key], chosen[key]) for key in chosen)])
            try:
                manifest = _load(draft, chosen, document, date, strict, cwd)
            except ManifestError as error:
                problems += [(label, problem) for problem in error.problems]
                continue
            merges.append(
                BulkMerge(label=label, name=draft.name, share=draft.share, manifest=manifest, chosen=chosen)
            )  # fmt: skip
    problems += _unnamed_outputs(merges)
    problems += refuse_clashes([(m.label, str(m.manifest.output.path)) for m in merges if m.manifest.output.path])
    problems += _equal_labels(merges)
    if problems:
        raise ManifestError(gather_problems(problems))
    return tuple(merges)


def gather_problems(found: Sequence[tuple[str, Problem]]) -> list[Problem]:
    """(merge, problem) as problems that name their merges; what several merges have in common is said once."""
    labels: dict[Problem, list[str]] = {}
    for label, problem in found:
        labels.setdefault(problem, []).append(label)
    return [
        replace(problem, where=f"{_several(names)}: {problem.where}" if problem.where else _several(names))
        for problem, names in labels.items()
    ]


def _several(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def refuse_clashes(paths: Sequence[tuple[str, str]]) -> list[tuple[str, Problem]]:
    """(merge, problem) for outputs that are the same place, or lie one inside the other."""
    problems = []
    known: dict[str, str] = {}
    for label, path in paths:
        if path in known:
            problems.append((label, _clash("is", path, known[path], "both would be written to one place")))
        known.setdefault(path, label)
    for label, path in paths:
        parts = path.split("/")
        for length in range(len(parts) - 1, 0, -1):
            above = "/".join(parts[:length])
            if above in known:
                problems.append((label, _clash("lies inside", path, known[above], "each output owns its whole folder")))
                break
    return problems


def _clash(how: str, path: str, other: str, why: str) -> Problem:
    return Problem(
        "conflict", f"the output {path} {how} that of {other}", "output.path", why,
        "tell them apart with {name} or with a key of the matrix, such as {parameters.density}",
    )  # fmt: skip


def _unnamed_outputs(merges: Sequence[BulkMerge]) -> list[tuple[str, Problem]]:
    problem = Problem(
        "no-output", "no output is named", "output.path", "nothing is written to a place that nobody chose",
        "write defaults: {output: {path: …/{name}}}",
    )  # fmt: skip
    return [(merge.label, problem) for merge in merges if merge.manifest.output.path is None]


def _equal_labels(merges: Sequence[BulkMerge]) -> list[tuple[str, Problem]]:
    seen: set[str] = set()
    twice = dict.fromkeys(m.label for m in merges if m.label in seen or seen.add(m.label))  # type: ignore[func-returns-value] # set.add
    problem = Problem(
        "conflict", "several merges have this name", "merges", "tables and {name} tell merges apart by it",
        "give each entry a `name` of its own",
    )  # fmt: skip
    return [(label, problem) for label in twice]


# ---- entries over defaults ------------------------------------------------------------------------------------------


def _drafts(
    document: Document, bulk: BulkManifest, defaults: Document, found: Sequence[Found],
    manifests: Mapping[str, Document],
) -> Iterator[_Draft]:  # fmt: skip
    if bulk.each is not None:
        given = {"adapters": [{"adapter": "{each}"}]}
        if not any(key in defaults.data for key in _SOURCES):
            defaults = _overlay(defaults, Document(given, {"adapters": document.where("each")}))
        elif not any("{each}" in text for text in _texts(defaults.data)):
            raise ManifestError.of(
                "missing-key", "nothing says where the adapters that are found go", where=document.where("defaults"),
                why="`defaults` names sources of its own", fix='write adapter: "{each}" in one of their entries',
            )  # fmt: skip
        for adapter in found:
            yield _Draft(adapter.name, 1.0, defaults, str(adapter.reference))
        return
    for index, entry in enumerate(bulk.merges or ()):
        if entry.manifest is not None:
            own = manifests[str(entry.manifest)]
            name = entry.name or _stem(str(entry.manifest))
        else:
            path = f"merges[{index}]"
            own = _part(document, f"{path}.inline" if "inline" in document.data["merges"][index] else path)
            own = Document({k: own.data[k] for k in own.data if k not in ("name", "share")}, own.places)
            name = entry.name or f"merge-{index + 1}"
        yield _Draft(name, entry.share, _overlay(defaults, own))


def _stem(reference: str) -> str:
    return reference.rpartition("/")[2].rpartition(".")[0] or reference.rpartition("/")[2]


def _part(document: Document, path: str) -> Document:
    """What stands at a path of a document, as a document."""
    at: Any = document.data
    for step in split_path(path) or ():
        at = at.get(step) if isinstance(at, Mapping) else at[step]
        if at is None:
            at = {}
    prefix = f"{path}."
    places = {p.removeprefix(prefix): place for p, place in document.places.items() if p.startswith(prefix)}
    if path in document.places or "" in document.places:
        places[""] = document.places.get(path, document.places.get("", ""))
    return Document(dict(at), places)


def _overlay(below: Document, above: Document) -> Document:
    """The keys of `above` over those of `below`, mappings key by key. Sources and methods, of which a merge has one
    kind, replace those of another kind."""
    data = dict(below.data)
    for kinds in (_SOURCES, _METHODS):
        if any(above.data.get(key) is not None for key in kinds):
            data = {key: value for key, value in data.items() if key not in kinds}
    places = dict(below.places)

    def lay(at: dict[str, Any], given: Mapping[str, Any], path: str) -> dict[str, Any]:
        for key, value in given.items():
            here = join_path(path, key)
            under = at.get(key)
            if isinstance(value, Mapping) and isinstance(under, Mapping):
                at[key] = lay(dict(under), value, here)
                continue
            for known in [p for p in places if p == here or p.startswith((f"{here}.", f"{here}["))]:
                del places[known]
            at[key] = value
        return at

    merged = lay(data, above.data, "")
    return Document(_copied(merged), {**places, **above.places})


def _copied(value: Any) -> Any:
    """Plain data of its own: merges of a bulk are edited one by one."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


# ---- the matrix and the placeholders --------------------------------------------------------------------------------


def _combinations(matrix: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in product(*matrix.values()):
        yield dict(zip(matrix, values, strict=True))


def _chosen_text(values: Sequence[Any], value: Any) -> str:
    """A value of the matrix in a label; what is no plain value goes by its position."""
    return _value_text(value) or f"v{list(values).index(value) + 1}"


def _value_text(value: Any) -> str:
    """A plain value as part of a path; empty where it is none."""
    if isinstance(value, bool):
        return str(value).lower()
    return _UNSAFE.sub("-", str(value)).strip("-") if isinstance(value, str | int | float) else ""


def _load(
    draft: _Draft, chosen: Mapping[str, Any], bulk: Document, date: str, strict: bool, cwd: str | Path | None
) -> Manifest:
    document = Document(_copied(draft.document.data), dict(draft.document.places))
    problems: list[Problem] = []
    for key, value in chosen.items():
        try:
            set_value(document, key, value, bulk.where(f"matrix.{key}"))
        except ManifestError as error:
            problems += error.problems
    known = {"name": draft.name, "date": date, **({"each": draft.each} if draft.each is not None else {})}

    def fill(text: str, path: str) -> str:
        def value_of(match: re.Match[str]) -> str:
            key = match[1]
            if key in known:
                return known[key]
            if key == "fingerprint" and path == "output.path":
                return FINGERPRINT
            steps = split_path(key)
            at: Any = document.data
            for step in steps or ():
                if isinstance(at, list):
                    at = at[step] if isinstance(step, int) and step < len(at) else None
                else:
                    at = at.get(step) if isinstance(at, Mapping) else None
            shown = _value_text(at) if steps else ""
            if not shown:
                problems.append(_unknown(match[0], document.where(path)))
            return shown

        return _PLACEHOLDER.sub(value_of, text)

    data = _filled(document.data, "", fill)
    if problems:
        raise ManifestError(list(dict.fromkeys(problems)))
    return load_merge(Document(data, document.places), strict=strict, cwd=cwd)


def _filled(value: Any, path: str, fill: Callable[[str, str], str], *, open_: bool = False) -> Any:
    """The same with the placeholders filled in, under the keys that may have them."""
    if isinstance(value, Mapping):
        return {
            key: _filled(item, join_path(path, key), fill, open_=open_ or key in _FILLED)
            for key, item in value.items()
        }  # fmt: skip
    if isinstance(value, list):
        return [_filled(item, join_path(path, index), fill, open_=open_) for index, item in enumerate(value)]
    return fill(value, path) if open_ and isinstance(value, str) else value


def _unknown(text: str, where: str) -> Problem:
    return Problem(
        "bad-value", f"{text} stands for nothing here", where,
        "it is {name}, {date}, {each} where there is one, a key of this merge with a plain value, or, in output.path, "
        "{fingerprint}",
        "write {name}, or a dotted key such as {parameters.density}",
    )  # fmt: skip
