"""Several documents in one file, the later naming what an earlier one makes: joined into one manifest.

    name: coder                        documents:
    models: […]                          coder: {models: […]}
    ---                        →       models: [{model: merge://coder}, …]
    models: [{model: coder}, …]

As in mergekit-multi, `name` is what other documents call a document, and it goes before paths and repositories of that
name. The document without a name is the result; where all have names, it is the one that no other names. What is named
by others is an intermediate: not kept, unless it has an `output.path` of its own. What nobody names and nothing keeps
is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from merger.errors import ManifestError, Problem, nearest
from merger.manifest.documents import Document

SCHEME: Final = "merge://"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PLACES: Final = frozenset({
    "model", "base_model", "adapter", "initial", "source_model", "path", "lora", "tokenizer_source", "source", "donor",
})  # fmt: skip
"""Keys whose values name sources."""
_WORDS: Final = frozenset({"base", "union", "none", "auto"})
"""What `tokenizer.source` and its like may say beside a source."""


def join_documents(documents: Sequence[Document]) -> Document:
    """The one document that several stand for. Raises ManifestError with all that is wrong with names and order."""
    if len(documents) == 1:
        return documents[0]
    problems: list[Problem] = []
    named: dict[str, Document] = {}
    unnamed: list[Document] = []
    for document in documents:
        name = document.data.get("name")
        if name is None:
            unnamed.append(document)
        elif not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(_bad_name(name, document.where("name")))
        elif name in named:
            problems.append(
                Problem("conflict", f"two documents are named {name!r}", document.where("name"),
                        f"the other stands at {named[name].where('')}", "give each its own name")
            )  # fmt: skip
        else:
            named[name] = document
    if len(unnamed) > 1:
        problems += [
            Problem("missing-key", "a second document without a name", document.where(""),
                    "the one without a name is the result, and the others are named by it",
                    "name it, or write several merges as a bulk: merges: […]")
            for document in unnamed[1:]
        ]  # fmt: skip
    if problems:
        raise ManifestError(problems)
    used = {name for document in documents for name in _named_in(document.data, named)}
    last = unnamed[0] if unnamed else named[_result(named, used)]
    own = last.data.get("name")
    for name, document in named.items():
        if name not in used and name != own and not _keeps(document):
            problems.append(
                Problem("no-effect", f"no document names {name!r}, and nothing keeps what it makes",
                        document.where("name"), "a document that others name is an intermediate; one that none names "
                        "has to say where it goes", "give it an output.path, or write several merges as a bulk")
            )  # fmt: skip
    if problems:
        raise ManifestError(problems)
    others = {name: document for name, document in named.items() if name != own}
    data = {**last.data, "documents": {name: dict(document.data) for name, document in others.items()}}
    places = dict(last.places)
    for name, document in others.items():
        head = f"documents.{name}"
        places |= {f"{head}.{path}" if path else head: place for path, place in document.places.items()}
    return Document(data, places)


def _result(named: Mapping[str, Document], used: set[str]) -> str:
    """Where all documents have names: the one that no other names, and, of several, that has no place of its own."""
    ends = [name for name in named if name not in used]
    if not ends:
        raise ManifestError(_circle(next(iter(named)), next(iter(named.values())).where("")))
    open_ends = [name for name in ends if not _keeps(named[name])]
    return (open_ends or ends)[-1]


def _keeps(document: Document) -> bool:
    output = document.data.get("output")
    return isinstance(output, Mapping) and output.get("path") is not None


def _bad_name(name: object, where: str) -> Problem:
    return Problem("bad-value", f"{name!r} is no name of a document", where,
                   "others write it where a source stands", "use letters, digits, . _ and -")  # fmt: skip


def _circle(name: str, where: str) -> Problem:
    return Problem("conflict", f"the documents need each other in a circle through {name!r}", where,
                   "each has to be made before what names it", "break the circle")  # fmt: skip


def link_documents(document: Document) -> dict[str, Document]:
    """Take `documents` out of a document: every one with its names resolved, each after those that it names.

    Edits the data of all. Raises ManifestError for circles and for names that no document has.
    """
    nested = document.data.pop("documents", None)
    if nested is None:
        nested = {}
    if not isinstance(nested, dict) or not all(isinstance(data, dict) for data in nested.values()):
        raise ManifestError.of("bad-value", "documents are a mapping of names to manifests",
                               where=document.where("documents"))  # fmt: skip
    problems = [_bad_name(name, document.where("documents")) for name in nested if not _NAME.fullmatch(name)]
    inner = {
        name: Document(data, _below(document.places, f"documents.{name}"), f"documents.{name}")
        for name, data in nested.items()
    }
    for one in (*inner.values(), document):
        _resolve(one.data, inner)
        for path, name in _references(one.data):
            if name not in inner:
                near = nearest(name, inner)
                problems.append(
                    Problem("bad-reference", f"no document is named {name!r}", one.where(path),
                            "merge:// names another document of the same file",
                            f"did you mean {near}?" if near else "")
                )  # fmt: skip
        if "documents" in one.data:
            problems.append(Problem("conflict", "documents within documents", one.where("documents"),
                                    fix="list them all at the top"))  # fmt: skip
    if problems:
        raise ManifestError(problems)
    ordered: dict[str, Document] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ManifestError(_circle(name, inner[name].where("")))
        if name not in ordered:
            for needed in sorted({needed for _, needed in _references(inner[name].data)}):
                visit(needed, (*above, name))
            ordered[name] = inner[name]

    for name in inner:
        visit(name, ())
    return ordered


def documents_named(plain: Mapping[str, Any]) -> set[str]:
    """The documents that a resolved manifest reads."""
    return {name for _, name in _references(plain)}


def _below(places: Mapping[str, str], head: str) -> dict[str, str]:
    return {
        path[len(head) :].lstrip("."): place for path, place in places.items() if (path + ".").startswith(f"{head}.")
    }


def _sources(data: Any, path: str = "", key: str = "") -> Iterator[tuple[str, dict[str, Any] | list[Any], Any]]:
    """(path, container, key) of every text that names a source."""
    if isinstance(data, dict | list):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        for inner, value in list(items):
            word = inner if isinstance(inner, str) else key
            if word in ("output", "documents", "cluster", "kubernetes"):
                continue
            at = f"{path}[{inner}]" if isinstance(inner, int) else f"{path}.{inner}" if path else inner
            if isinstance(value, str) and word in _PLACES:
                yield at, data, inner
            else:
                yield from _sources(value, at, word)


def _resolve(data: dict[str, Any], names: Mapping[str, object]) -> None:
    for _, container, key in _sources(data):
        value: str = container[key]
        if value not in _WORDS:
            container[key] = "+".join(SCHEME + part if part in names else part for part in value.split("+"))


def _references(data: Any) -> Iterator[tuple[str, str]]:
    for path, container, key in _sources(data):
        for part in container[key].split("+"):
            if part.startswith(SCHEME):
                yield path, part.removeprefix(SCHEME)


def _named_in(data: dict[str, Any], names: Mapping[str, object]) -> set[str]:
    parts = {part for _, container, key in _sources(data) for part in container[key].split("+")}
    return {part for part in parts if part in names and part not in _WORDS}
