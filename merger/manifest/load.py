"""From what a user wrote to a checked Manifest: read, override, check, parse. All that is wrong is reported at once.

Nothing here looks at a source; that is the catalog's and the planner's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from merger.errors import ManifestError, Problem, nearest
from merger.manifest.checks import Findings, check_bulk, check_manifest
from merger.manifest.documents import Document, apply_override, join_path, read_documents
from merger.manifest.grammar import BulkManifest, Manifest
from merger.manifest.later import find_later
from merger.manifest.node import Node
from merger.manifest.parameters import ParameterValueError
from merger.manifest.references import holds_secret
from merger.manifest.several import join_documents, link_documents

_N = TypeVar("_N", bound=Node)

_WORDS = {
    "model_type": "a mapping", "dict_type": "a mapping", "mapping_type": "a mapping", "tuple_type": "a list",
    "string_type": "text", "int_type": "a whole number", "bool_type": "true or false", "float_type": "a number",
    "float_parsing": "a number",
}  # fmt: skip
_ENTRY = {"adapters": "write - adapter: org/name", "models": "write - model: org/name"}
_BOUNDS = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})


def load_manifest(
    source: str | Path | bytes | Mapping[str, object],
    *,
    overrides: Sequence[str] = (),
    strict: bool = False,
    name: str = "",
    cwd: str | Path | None = None,
) -> Manifest:
    """Load one merge. Several documents of which each leads to one are one merge (several.py).

    `source` is a path, YAML (bytes, or a str with a line break), or a mapping; `name` is what messages call bytes.
    `overrides` are `a.b[0].c=YAML`, applied in order; `strict` makes errors of keys that have no effect; relative paths
    start at `cwd`. Raises ManifestError with every problem found, each with its path.
    """
    documents = read_documents(source, name=name)
    if not documents:
        raise ManifestError.of("missing-key", "the manifest is empty", where=name or _name_of(source))
    for document in documents:
        if is_bulk(document.data) and len(documents) > 1:
            raise ManifestError.of(
                "conflict", f"it holds {len(documents)} documents, and one is a bulk", where=document.where(""),
                why="a bulk lists its merges itself", fix="split the file",
            )  # fmt: skip
        if is_bulk(document.data):
            raise ManifestError.of(
                "conflict", "this manifest holds several merges", where=document.where(""),
                why="`merges` and `each` make it a bulk", fix="run it with `raymerge bulk`",
            )  # fmt: skip
    return load_merge(join_documents(documents), overrides=overrides, strict=strict, cwd=cwd)


def load_documents(
    source: str | Path | bytes | Mapping[str, object],
    *,
    overrides: Sequence[str] = (),
    strict: bool = False,
    name: str = "",
    cwd: str | Path | None = None,
    site: str | Path | None = None,
) -> tuple[Manifest | BulkManifest, ...]:
    """Load every document of a file; a document with `merges` or `each` is a bulk. Overrides go to each of them.

    `site` is a file whose `cluster:` and `kubernetes:` go over the manifest's, mapping by mapping.
    """
    loaded: list[Manifest | BulkManifest] = []
    problems: list[Problem] = []
    over = None if site is None else read_site(site)
    for document in read_documents(source, name=name):
        if over is not None:
            lay_over(document, over)
        try:
            if is_bulk(document.data):
                loaded.append(load_bulk_grammar(document, overrides=overrides, cwd=cwd))
            else:
                loaded.append(load_merge(document, overrides=overrides, strict=strict, cwd=cwd))
        except ManifestError as error:
            problems += error.problems
    if problems:
        raise ManifestError(problems)
    return tuple(loaded)


SITE_KEYS = ("cluster", "kubernetes")


def read_site(path: str | Path) -> Document:
    """Placement alone. Raises ManifestError where the file says anything else."""
    documents = read_documents(path)
    if len(documents) != 1:
        raise ManifestError.of("bad-value", f"it holds {len(documents)} documents", where=str(path), fix="keep one")
    foreign = [key for key in documents[0].data if key not in SITE_KEYS]
    if foreign:
        raise ManifestError(
            [
                Problem("unknown-key", f"{key!r} is no key of a site", documents[0].where(key), "a site says where a "
                        "merge runs, a manifest what it is", f"keep {' and '.join(SITE_KEYS)}")
                for key in foreign
            ]
        )  # fmt: skip
    return documents[0]


def lay_over(document: Document, site: Document) -> None:
    """Put a site's values over the document's: mappings are joined, all else is replaced."""
    for key in SITE_KEYS:
        if key in site.data:
            document.data[key] = _joined(document.data.get(key), site.data[key])
    document.places.update({path: place for path, place in site.places.items() if path})


def _joined(below: Any, above: Any) -> Any:
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    return {**below, **{key: _joined(below.get(key), value) for key, value in above.items()}}


def is_bulk(data: Mapping[str, Any]) -> bool:
    """Whether a document holds several merges."""
    return "merges" in data or "each" in data


def load_merge(
    document: Document, *, overrides: Sequence[str] = (), strict: bool = False, cwd: str | Path | None = None
) -> Manifest:
    """One document as a merge. Raises ManifestError."""
    names = _named_documents(document)
    _override(document, overrides)
    for name in _named_documents(document) - names:
        near = nearest(name, sorted(names))
        raise ManifestError.of(
            "bad-value", f"there is no document {name!r}", where=f"documents.{name} (--set)",
            why="a document cannot be made by setting one of its keys", fix=f"did you mean {near}?" if near else "",
        )  # fmt: skip
    problems: list[Problem] = []
    warnings: list[Problem] = []
    loaded: dict[str, Manifest] = {}
    for name, inner in link_documents(document).items():
        try:
            loaded[name] = _load_one(inner, strict, cwd)
            warnings += loaded[name].warnings
        except ManifestError as error:
            problems += error.problems
    try:
        manifest = _load_one(document, strict, cwd)
    except ManifestError as error:
        raise ManifestError(list(dict.fromkeys([*problems, *error.problems]))) from None
    if problems:
        raise ManifestError(problems)
    return manifest.model_copy(update={"documents": loaded, "warnings": (*warnings, *manifest.warnings)})


def _named_documents(document: Document) -> set[str]:
    documents = document.data.get("documents")
    return set(documents) if isinstance(documents, Mapping) else set()


def _load_one(document: Document, strict: bool, cwd: str | Path | None) -> Manifest:
    """One document without those that it names."""
    later = find_later(document.data, document.where)
    findings = check_manifest(document.data, where=document.where, strict=strict)
    manifest = _parse(Manifest, document, findings, later, cwd)
    return manifest.model_copy(update={"warnings": tuple(findings.warnings)})


def load_bulk_grammar(
    document: Document, *, overrides: Sequence[str] = (), cwd: str | Path | None = None
) -> BulkManifest:
    """One document as a bulk that is not expanded yet. Raises ManifestError."""
    _override(document, overrides)
    return _parse(BulkManifest, document, check_bulk(document.data, where=document.where), [], cwd)


def _override(document: Document, overrides: Sequence[str]) -> None:
    problems: list[Problem] = []
    for override in overrides:
        try:
            apply_override(document, override)
        except ManifestError as error:
            problems += error.problems
    if problems:
        raise ManifestError(problems)


def _parse(model: type[_N], document: Document, findings: Findings, later: list[Problem], cwd: str | Path | None) -> _N:
    """The typed value, or everything that is wrong: the checks' findings first, one problem a place."""
    parsed: _N | None = None
    problems = [*findings.problems, *later]
    try:
        parsed = model.model_validate(document.data, context={"cwd": cwd})
    except ValidationError as error:
        found = list(_problems_of(error, document))
        places = {p.where for p in problems}
        problems += [p for p in found if p.where not in places]
    if problems or parsed is None:
        raise ManifestError(list(dict.fromkeys(problems)))
    return parsed


def _problems_of(error: ValidationError, document: Document, above: str = "") -> Iterable[Problem]:
    """pydantic's errors in our four parts. A list that is short only because an entry of it is wrong is left out."""
    details = error.errors(include_url=False)
    places = [_path_of(detail["loc"], above) for detail in details]
    for detail, path in zip(details, places, strict=True):
        kind, context = detail["type"], detail.get("ctx") or {}
        if kind == "too_short" and any(p.startswith((f"{path}[", f"{path}.")) for p in places):
            continue
        cause = context.get("error")
        if isinstance(cause, ParameterValueError):
            for below, message, is_bounds in cause.places:
                yield Problem("out-of-bounds" if is_bounds else "bad-value", message, document.where(path + below))
        elif kind == "missing":
            yield Problem(
                "missing-key", f"{path.rpartition('.')[2]} is missing", document.where(path), "it has no default"
            )
        elif kind == "extra_forbidden":
            yield Problem("unknown-key", f"{path.rpartition('.')[2]!r} is no key here", document.where(path))
        elif "what" in context:
            code = kind.replace("_", "-")
            yield Problem(code, context["what"], document.where(path), context["why"], context["fix"])
        elif kind == "too_short":
            yield Problem("bad-value", "nothing is listed", document.where(path), fix=_ENTRY.get(path, ""))
        else:
            value = detail["input"]
            hidden = isinstance(value, dict | list) or ".secrets" in path or holds_secret(str(value))
            shown = "" if hidden else f", not {value!r:.60}"
            if kind in _WORDS:
                fix = _ENTRY.get(path.partition("[")[0], "") if isinstance(value, str) else ""
                yield Problem("bad-value", f"{_WORDS[kind]} is expected{shown}", document.where(path), fix=fix)
                continue
            what = detail["msg"][:1].lower() + detail["msg"][1:].replace("Input", "input") + shown
            near = nearest(value, _choices(context)) if isinstance(value, str) else None
            code = "out-of-bounds" if kind in _BOUNDS else "bad-value"
            yield Problem(code, what, document.where(path), fix=f"did you mean {near}?" if near else "")


def _choices(context: Mapping[str, Any]) -> list[str]:
    """The alternatives of a literal, from pydantic's `'a', 'b' or 'c'`."""
    return str(context.get("expected", "")).replace(" or ", ", ").replace("'", "").split(", ")


def _path_of(location: tuple[int | str, ...], above: str) -> str:
    """Our spelling of a pydantic location; the names pydantic gives to the branches of a union are no keys."""
    path = above
    for step in location:
        if not (
            isinstance(step, str) and (step.startswith("literal[") or step in ("TakeFrom", "str", "dict[str,any]"))
        ):
            path = join_path(path, step)
    return path


def _name_of(source: object) -> str:
    return str(source) if isinstance(source, str | Path) and "\n" not in str(source) else ""
