"""YAML text → plain data that remembers its lines. Hostile text is refused here, before anything interprets it.

The dialect is PyYAML's safe YAML 1.1, which mergekit reads too, with these differences: a key written twice is an
error (PyYAML keeps the last one in silence), dates stay text (a branch may be named 2024-01-01), and text beyond 1 MiB,
deeper than 64 levels or, with its aliases written out, larger than 100 000 values is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from merger.errors import ManifestError, Problem

MAX_BYTES: Final = 2**20
MAX_DEPTH: Final = 64
MAX_VALUES: Final = 100_000

_TIMESTAMP: Final = "tag:yaml.org,2002:timestamp"
_MERGE: Final = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """The safe loader, without dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(slots=True)
class Document:
    """One YAML document: plain data of its own (nothing aliased, so it may be edited), and where its keys stand."""

    data: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)
    """Path of a value → `file:line`, or the override that set it."""

    def where(self, path: str) -> str:
        """The path, followed by the place of the nearest thing above it that has one."""
        at = path
        while True:
            if at in self.places:
                return f"{path} ({self.places[at]})" if path else self.places[at]
            if not at:
                return path
            at = at[: max(at.rfind("."), at.rfind("["), 0)]


def join_path(path: str, key: object) -> str:
    """`adapters[1]` and `parameters` → `adapters[1].parameters`."""
    if isinstance(key, int) and not isinstance(key, bool):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else str(key)


def read_documents(source: str | Path | bytes | Mapping[str, object], *, name: str = "") -> list[Document]:
    """Read YAML from a path, from text (a str with a line break, or bytes), or take a mapping as it is.

    Raises ManifestError(code `bad-yaml`).
    """
    if isinstance(source, Mapping):
        return [Document(_copy_mapping(source))]
    if isinstance(source, str) and is_manifest_text(source):
        source = source.encode("utf-8", "surrogatepass")
    if not isinstance(source, bytes):
        name = name or str(source)
        source = _read_file(Path(source))
    if len(source) > MAX_BYTES:
        raise ManifestError.of("bad-yaml", f"the manifest is larger than {MAX_BYTES} bytes", where=name, fix="split it")
    try:
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError.of("bad-yaml", "the manifest is not UTF-8 text", where=name, why=str(error)) from None
    return list(_parse(text, name))


def is_manifest_text(source: str) -> bool:
    """Whether this is a manifest itself, not the name of one."""
    return "\n" in source or source.lstrip().startswith("{")


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ManifestError.of(
            "bad-yaml", "the manifest cannot be read", where=str(path), why=reason or "", fix="check the path"
        ) from None


def _parse(text: str, name: str) -> Iterator[Document]:
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        while loader.check_node():
            node = loader.get_node()
            walk = _Walk(name)
            walk.visit(node, "", 0)
            if walk.problems:
                raise ManifestError(walk.problems)
            data = loader.construct_document(node)
            if data is None:  # an empty document, such as what stands before a leading ---
                continue
            line = f"{_at(name)}{node.start_mark.line + 1}" if node is not None else name
            if not isinstance(data, dict):
                raise ManifestError.of("bad-yaml", "a manifest is a mapping of keys to values", where=line)
            yield Document(_copy_mapping(data), {**walk.places, "": line})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{_at(name)}{mark.line + 1}" if mark is not None else name
        why = str(getattr(error, "problem", None) or error)
        raise ManifestError.of("bad-yaml", "this is not valid YAML", where=where, why=why) from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise ManifestError.of("bad-yaml", "this is not valid YAML", where=name, why=str(error)) from None
    finally:
        if loader is not None:
            loader.dispose()


def _at(name: str) -> str:
    return f"{name}:" if name else "line "


class _Walk:
    """One pass over the node graph as if aliases were written out: size, depth, duplicate keys, lines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.places: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.reported: set[int] = set()

    def line(self, node: yaml.Node) -> str:
        return f"{_at(self.name)}{node.start_mark.line + 1}"

    def visit(self, node: yaml.Node | None, path: str, depth: int) -> None:
        if node is None:
            return
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise ManifestError.of(
                "bad-yaml",
                "the manifest is too large or too deep",
                where=self.line(node),
                why=f"with its aliases written out it has more than {MAX_VALUES} values or {MAX_DEPTH} levels",
            )
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.places[join_path(path, index)] = self.line(item)
                self.visit(item, join_path(path, index), depth + 1)
        elif isinstance(node, yaml.MappingNode):
            seen: dict[tuple[str, str], yaml.Node] = {}
            for key, value in node.value:
                if key.tag == _MERGE:
                    self.visit(value, path, depth + 1)
                    continue
                at = join_path(path, key.value) if isinstance(key, yaml.ScalarNode) else path
                if isinstance(key, yaml.ScalarNode):
                    same = (key.tag, key.value)
                    if same in seen and id(key) not in self.reported:
                        self.reported.add(id(key))
                        self.problems.append(
                            Problem(
                                "bad-yaml",
                                f"the key {key.value!r} is written twice",
                                f"{at} ({self.line(key)})",
                                f"it stands at {self.line(seen[same])} already, and only one of them can count",
                                "remove one of them",
                            )
                        )
                    seen.setdefault(same, key)
                    self.places[at] = self.line(key)
                self.visit(value, at, depth + 1)


def _copy_mapping(data: Mapping[Any, Any]) -> dict[str, Any]:
    budget = [MAX_VALUES]

    def copy(value: Any, path: str, depth: int) -> Any:
        budget[0] -= 1
        if budget[0] < 0 or depth > MAX_DEPTH:
            raise ManifestError.of("bad-yaml", "the manifest is too large or too deep", where=path)
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise ManifestError.of(
                        "bad-yaml",
                        f"the key {key!r} is no text",
                        where=join_path(path, str(key)),
                        why="YAML reads on, off, yes, no and numbers as values",
                        fix="put it in quotes",
                    )
            return {key: copy(item, join_path(path, key), depth + 1) for key, item in value.items()}
        if isinstance(value, str | int | float | None):
            return value
        if isinstance(value, Sequence) and not isinstance(value, bytes):
            return [copy(item, join_path(path, i), depth + 1) for i, item in enumerate(value)]
        raise ManifestError.of("bad-yaml", f"a {type(value).__name__} is no value of a manifest", where=path)

    return dict(copy(data, "", 0))


_STEP: Final = re.compile(r"(?:^|\.)([^.\[\]=]+)|\[(\d+)\]")


def apply_override(document: Document, override: str) -> None:
    """`a.b[0].c=YAML`: set one value, making mappings on the way; a list must already hold the index.

    Raises ManifestError naming the step that does not fit.
    """
    path, equals, text = override.partition("=")
    steps = split_path(path)
    if not equals or steps is None:
        raise ManifestError.of(
            "bad-value", f"{override!r} sets nothing", where="--set", fix="write a.b[0].c=VALUE, the value as YAML"
        )
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        walk = _Walk("--set")
        walk.visit(node, path, 0)
        if walk.problems:
            raise ManifestError(walk.problems)
        data = loader.construct_document(node) if node is not None else None
        value = _copy_mapping({path: data})[path]
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        why = str(getattr(error, "problem", None) or error)
        raise ManifestError.of("bad-yaml", "the value is not valid YAML", where=f"--set {path}", why=why) from None
    _set(document.data, steps, value, f"--set {path}")
    _replace_place(document, path, "--set")


def split_path(path: str) -> list[str | int] | None:
    """`a.b[0].c` → its steps, the first of them a key; None where it is no such path."""
    steps: list[str | int] = []
    position = 0
    while position < len(path) and (step := _STEP.match(path, position)):
        steps.append(step[1] if step[1] is not None else int(step[2]))
        position = step.end()
    return steps if steps and position == len(path) and not isinstance(steps[0], int) else None


def set_value(document: Document, path: str, value: Any, place: str) -> None:
    """Set one value, as an override does; `place` is where it was written. Raises ManifestError."""
    steps = split_path(path)
    if steps is None:
        raise ManifestError.of("bad-value", f"{path!r} is no key", where=place, fix="write a.b[0].c")
    _set(document.data, steps, _copy_mapping({"": value})[""], place)
    _replace_place(document, path, place)


def _replace_place(document: Document, path: str, place: str) -> None:
    for below in [p for p in document.places if p == path or p.startswith((f"{path}.", f"{path}["))]:
        del document.places[below]
    document.places[path] = place


def _set(data: dict[str, Any], steps: Sequence[str | int], value: Any, where: str) -> None:
    at: Any = data
    so_far = ""
    for i, step in enumerate(steps):
        last = i + 1 == len(steps)
        following = steps[i + 1] if not last else None
        if isinstance(step, int):
            if not isinstance(at, list) or step >= len(at):
                found = f"it has {len(at)} entries" if isinstance(at, list) else f"it is {_describe(at)}"
                raise ManifestError.of(
                    "bad-value",
                    f"{so_far or 'the manifest'} has no entry {step}",
                    where=where,
                    why=found,
                    fix="entries count from 0, and only those that exist can be set",
                )
        elif not isinstance(at, dict):
            raise ManifestError.of(
                "bad-value",
                f"{so_far} has no key {step!r}",
                where=where,
                why=f"it is {_describe(at)}",
                fix=f"write {so_far}[0].{step}" if isinstance(at, list) else "set the whole of it",
            )
        so_far = join_path(so_far, step)
        if last:
            at[step] = value
        elif isinstance(step, str) and at.get(step) is None and isinstance(following, str):
            at[step] = at = {}
        else:
            at = at.get(step) if isinstance(step, str) else at[step]


def _describe(value: object) -> str:
    if value is None:
        return "absent"
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else f"the value {value!r}"
