"""Where an output goes: what is published there, where the state of an unfinished run lies, and how its files grow."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from merger.errors import ManifestError, OutputExistsError
from merger.manifest import Reference, parse_reference
from merger.storage import LocalStore, MemoryStore
from merger.storage.base import FillableStore, Sink, Store, WritableStore
from merger.storage.filled import FilledSink


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """What a manifest says of the place itself. None of it changes a byte of the content."""

    private: bool | None = None
    """Of a repository that has to be made: private unless False."""
    kms_key_id: str | None = None
    storage_class: str | None = None
    tags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Destination:
    """One place for one output."""

    uri: str
    content: Store
    """What is published."""
    state: WritableStore
    """Where `.raymerge/` lies: beside the content, but for a repository, whose state never enters it."""
    sink: Sink


def open_destination(path: str, *, run_dir: str | None = None, settings: OutputSettings | None = None) -> Destination:
    """The destination that `path` names. Nothing is written.

    Raises OutputExistsError when a file is in the way, ManifestError for what no output can be, and what the place
    itself refuses.
    """
    reference = parse_reference(path, bare="local")
    settings = settings or OutputSettings()
    if reference.kind == "hub":
        return _open_repository(reference, run_dir, settings)
    if reference.kind == "s3":
        return _open_bucket(reference, settings)
    if reference.kind == "local" and Path(reference.root).is_file():
        raise OutputExistsError.of("output-exists", "the output is a file", where=path, fix="name a folder")
    store: FillableStore = MemoryStore(reference.root) if reference.kind == "memory" else LocalStore(reference.root)
    return Destination(store.uri, store, store, FilledSink(store))


def _open_bucket(reference: Reference, settings: OutputSettings) -> Destination:
    from merger.storage.multipart import MultipartSink
    from merger.storage.s3 import S3Settings, S3Store

    placed = S3Settings(settings.kms_key_id, settings.storage_class, settings.tags)
    store = S3Store(reference.root, reference.subfolder, placed)
    state = S3Store(reference.root, reference.subfolder, placed.for_state())
    return Destination(store.uri, store, state, MultipartSink(store, state, placed))


def default_run_dir() -> str:
    """Where the state of runs lies whose output is a repository, when nothing else is said."""
    return os.path.join(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "raymerge")


def _open_repository(reference: Reference, run_dir: str | None, settings: OutputSettings) -> Destination:
    from merger.storage.hub_sink import HubSink, open_hub_output

    slug = str(reference).removeprefix("hf://").replace("/", "--")
    state = parse_reference(run_dir or default_run_dir(), bare="local").child(slug)
    if state.kind == "hub":
        raise ManifestError.of(
            "bad-arguments", "the state of a run cannot live in a repository", where="--run-dir",
            why="a repository keeps every version of what it held", fix="name a folder or s3://bucket/prefix",
        )  # fmt: skip
    staged = open_destination(str(state), settings=settings)
    content = open_hub_output(reference.root, reference.revision, reference.subfolder)
    sink = HubSink(
        staged.sink, staged.content, reference.root, reference.revision, reference.subfolder, private=settings.private
    )
    return Destination(str(reference), content, staged.state, sink)
