"""Many merges from one manifest: `load_bulk` reads and expands it, `plan_bulk` plans them all from headers.

Every source is looked at once, whatever the number of merges that name it. Merges that read the same tensors in the
same way are gathered (merger/sweep.py), to be read once. Running them is merger/bulk_run.py.
"""

from __future__ import annotations

import datetime as dt
import os
import posixpath
import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from merger.documents import bytes_beside, plan_documents, plans_of
from merger.errors import InfrastructureError, ManifestError, Problem, RaymergeError, RefusedError, SourceError
from merger.inputs import Shelf, named_sources
from merger.manifest import BulkManifest, BulkMerge, Found, Reference, expand_bulk, parse_reference
from merger.manifest.bulk import FINGERPRINT, refuse_clashes
from merger.manifest.documents import MAX_BYTES, Document, is_manifest_text, read_documents
from merger.manifest.load import is_bulk, load_bulk_grammar
from merger.manifest.several import join_documents
from merger.methods.plugin import load_installed
from merger.planning.build import write_bytes
from merger.planning.nouns import MergePlan
from merger.planning.summary import passes, plan_json, read_bytes
from merger.storage import LocalStore, open_source, read_whole
from merger.sweep import likeness
from merger.tensors import format_size
from merger.versions import fingerprint

DEFAULT_ACTIVE: Final = 4
"""Merges under way at once, where the manifest does not say: enough that some write while others begin and end."""
_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")

BulkSource = str | Path | Mapping[str, object]
"""A manifest's reference or YAML text, or plain data."""


@dataclass(frozen=True, slots=True)
class Bulk:
    """A bulk manifest, and the merges that it stands for."""

    manifest: BulkManifest
    merges: tuple[BulkMerge, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMerge:
    """One merge of a bulk, planned or refused."""

    label: str
    share: float
    chosen: Mapping[str, Any]
    plan: MergePlan | None
    """None where it is refused."""
    refused: RaymergeError | None = None

    @property
    def path(self) -> str:
        return self.plan.outputs[0].path if self.plan is not None and self.plan.outputs else ""


@dataclass(frozen=True, slots=True)
class BulkPlan:
    """What a bulk will do."""

    merges: tuple[PlannedMerge, ...]
    sweeps: tuple[tuple[int, ...], ...]
    """The merges that can be run, as indexes; those that read the same stand together."""
    max_active_merges: int = DEFAULT_ACTIVE
    on_failure: Literal["continue", "stop"] = "continue"

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that is wrong with any merge, each with its merge's name."""
        return tuple(
            replace(problem, where=f"{merge.label}: {problem.where}" if problem.where else merge.label)
            for merge in self.merges
            if merge.refused is not None
            for problem in merge.refused.problems
        )

    def plans(self) -> Iterator[MergePlan]:
        """The plans of the merges that can be run."""
        for sweep in self.sweeps:
            for index in sweep:
                plan = self.merges[index].plan
                assert plan is not None
                yield plan

    def every_plan(self) -> Iterator[MergePlan]:
        """The same, with the plans of the documents that these merges read."""
        return (one for plan in self.plans() for one in plans_of(plan).values())

    @property
    def read_bytes(self) -> int:
        """Tensor bytes of one pass over the inputs, a sweep's once."""
        return sum(read_bytes(plan) for plan in self._firsts())

    @property
    def read_bytes_apart(self) -> int:
        """The same if each merge were run by itself."""
        return sum(read_bytes(plan) for plan in self.plans())

    @property
    def write_bytes(self) -> int:
        return sum(write_bytes(plan) for plan in self.plans())

    def _firsts(self) -> Iterator[MergePlan]:
        for sweep in self.sweeps:
            plan = self.merges[sweep[0]].plan
            assert plan is not None
            yield plan


# ---- reading --------------------------------------------------------------------------------------------------------


def manifest_text(source: str) -> bytes | str:
    """What `read_documents` takes: a manifest elsewhere (s3://, hf://, memory://) as its bytes, all else as it is.

    Raises SourceError where there is none.
    """
    if is_manifest_text(source) or "://" not in source or source.startswith("file:"):
        return source
    return fetch_manifest(parse_reference(source))


def fetch_manifest(reference: Reference) -> bytes:
    """A manifest's bytes, wherever it lies. Raises SourceError."""
    return fetch_file(reference, limit=MAX_BYTES)


def fetch_file(reference: Reference, *, limit: int) -> bytes:
    """The bytes of one file, wherever it lies. Raises SourceError where there is none, or one of more than `limit`."""
    if reference.kind == "local":
        folder, name = os.path.split(reference.root)
        above = replace(reference, root=folder or ".")
    elif reference.kind == "memory":
        folder, name = posixpath.split(reference.root)
        above = replace(reference, root=folder)
    else:
        folder, name = posixpath.split(reference.subfolder)
        above = replace(reference, subfolder=folder)
    if not name or not above.root:
        raise SourceError.of(
            "no-such-source", "this reference names no file", where=str(reference), why="one file is read",
            fix="write the file's name behind the folder",
        )  # fmt: skip
    store = open_source(above.kind, above.root, revision=above.revision, subfolder=above.subfolder)
    return read_whole(store, name, limit=limit)


def is_bulk_manifest(source: BulkSource) -> bool:
    """Whether a manifest holds several merges. What cannot be read is left to whoever loads it."""
    try:
        documents = read_documents(manifest_text(source) if isinstance(source, str) else source)
    except RefusedError:
        return False
    return len(documents) == 1 and is_bulk(documents[0].data)


def load_bulk(
    source: BulkSource, *, overrides: Sequence[str] = (), strict: bool = False, cwd: str | Path | None = None,
    date: str | None = None,
) -> Bulk:  # fmt: skip
    """Read a bulk manifest, look up what it names, and expand it. `date` is what {date} stands for; default today.

    Raises ManifestError with everything that is wrong with any merge; SourceError, InfrastructureError.
    """
    load_installed()
    name = str(source) if isinstance(source, str | Path) and not is_manifest_text(str(source)) else ""
    documents = read_documents(manifest_text(source) if isinstance(source, str) else source, name=name)
    if len(documents) != 1 or not is_bulk(documents[0].data):
        raise ManifestError.of(
            "conflict", "this is no bulk manifest", where=name, why="a bulk has `merges` or `each`",
            fix="run a single merge with `raymerge merge`",
        )  # fmt: skip
    (document,) = documents
    bulk = load_bulk_grammar(document, overrides=overrides, cwd=cwd)
    found = find_adapters(bulk.each) if bulk.each is not None else ()
    merges = expand_bulk(
        document, bulk, date=date or _today(bulk), found=found, manifests=_manifests(bulk), strict=strict, cwd=cwd
    )  # fmt: skip
    return Bulk(bulk, merges)


def _today(bulk: BulkManifest) -> str:
    name = "UTC" if bulk.schedule is None else bulk.schedule.timezone
    try:
        zone = zoneinfo.ZoneInfo(name)
    except (ValueError, OSError):
        raise ManifestError.of(
            "bad-value", f"{name!r} is no time zone", where="schedule.timezone", why="this machine knows none such",
            fix="write a name such as Europe/Berlin, or UTC",
        ) from None  # fmt: skip
    return dt.datetime.now(zone).date().isoformat()


def _manifests(bulk: BulkManifest) -> dict[str, Document]:
    """What the entries' `manifest:` name, by reference."""
    found: dict[str, Document] = {}
    problems: list[Problem] = []
    for reference in dict.fromkeys(entry.manifest for entry in bulk.merges or () if entry.manifest is not None):
        try:
            documents = read_documents(fetch_manifest(reference), name=str(reference))
            if not documents or any(is_bulk(document.data) for document in documents):
                problems.append(
                    Problem("conflict", "this is not one merge", str(reference), "an entry of a bulk is one merge",
                            "write its merges as entries of this bulk")
                )  # fmt: skip
                continue
            found[str(reference)] = join_documents(documents)
        except RefusedError as error:
            problems += error.problems
    if problems:
        raise ManifestError(problems)
    return found


def find_adapters(place: Reference) -> tuple[Found, ...]:
    """Every adapter in a folder below `place`, by name; what lies inside an adapter's own folder (its checkpoints)
    counts as part of it. Raises SourceError where there is none."""
    store = open_source(place.kind, place.root, revision=place.revision, subfolder=place.subfolder)
    names = set(store.list_files())
    folders = sorted(
        posixpath.dirname(name)
        for name in names
        if posixpath.basename(name) == "adapter_config.json"
        and any(posixpath.join(posixpath.dirname(name), weights) in names for weights in _WEIGHTS)
    )
    chosen: list[str] = []
    for folder in folders:
        if folder and not any(folder.startswith(f"{above}/") for above in chosen):
            chosen.append(folder)
    if not chosen:
        raise SourceError.of(
            "no-such-source", "no adapter lies below this place", where=f"each: {place}",
            why="an adapter is a folder with adapter_config.json and its weights",
            fix="name the folder that the adapters' folders lie in",
        )  # fmt: skip
    return tuple(Found(folder.replace("/", "--"), place.child(folder)) for folder in chosen)


# ---- planning -------------------------------------------------------------------------------------------------------


def plan_bulk(bulk: Bulk, *, device: Literal["cpu", "cuda"] = "cpu") -> BulkPlan:
    """Plan every merge of a bulk, from headers alone. What is wrong with a merge is in its `refused`.

    Raises ManifestError where outputs clash once {fingerprint} is filled in.
    """
    shelf = Shelf()
    shelf.fetch(named for merge in bulk.merges for named in named_sources(merge.manifest))
    planned = tuple(_plan_one(merge, shelf, device) for merge in bulk.merges)
    clashes = refuse_clashes([(merge.label, merge.path) for merge in planned if merge.plan is not None])
    if clashes:
        raise ManifestError([replace(problem, where=f"{label}: {problem.where}") for label, problem in clashes])
    planned = _within_the_disk(planned)
    alike: dict[str, list[int]] = {}
    for index, merge in enumerate(planned):
        if merge.plan is not None:
            # What takes several steps goes by itself: its own units are not all that has to be done.
            alike.setdefault(f"{index}" if merge.plan.takes_steps else likeness(merge.plan), []).append(index)
    return BulkPlan(
        planned, tuple(tuple(group) for group in alike.values()),
        bulk.manifest.max_active_merges or DEFAULT_ACTIVE, bulk.manifest.on_failure,
    )  # fmt: skip


def _plan_one(merge: BulkMerge, shelf: Shelf, device: Literal["cpu", "cuda"]) -> PlannedMerge:
    path = str(merge.manifest.output.path or "")
    plan: MergePlan | None = None
    refused: RaymergeError | None = None
    try:
        made = plan_documents(merge.manifest, path, device, shelf)
        if made.problems:
            refused = RefusedError(made.problems)
        else:
            (output,) = made.outputs
            plan = replace(made, outputs=(replace(output, path=path.replace(FINGERPRINT, fingerprint(made))),))
    except (RefusedError, InfrastructureError) as error:
        refused = error
    return PlannedMerge(label=merge.label, share=merge.share, chosen=merge.chosen, plan=plan, refused=refused)


def _within_the_disk(merges: tuple[PlannedMerge, ...]) -> tuple[PlannedMerge, ...]:
    """Refuse what goes beyond the free space of a local disk, outputs that are there already not counted."""
    left: dict[int, int] = {}
    found = []
    for merge in merges:
        if (
            merge.plan is None
            or parse_reference(merge.path, bare="local").kind != "local"
            or os.path.exists(merge.path)
        ):
            found.append(merge)
            continue
        above = Path(merge.path)
        while not above.exists():
            above = above.parent
        disk, free = above.stat().st_dev, LocalStore(str(above)).free_bytes()
        left.setdefault(disk, free or 0)
        left[disk] -= write_bytes(merge.plan) + bytes_beside(merge.plan)
        if left[disk] >= 0:
            found.append(merge)
            continue
        error = RefusedError.of(
            "disk", f"the outputs of this bulk up to this one need {format_size(-left[disk])} more than is free",
            where=merge.path, fix="free space, or choose another place",
        )  # fmt: skip
        found.append(replace(merge, plan=None, refused=error))
    return tuple(found)


# ---- for people and scripts -----------------------------------------------------------------------------------------


def bulk_plan_json(planned: BulkPlan) -> dict[str, Any]:
    """The plan of a bulk as one document."""
    return {
        "version": 1,
        "merges": [
            {
                "name": merge.label, "path": merge.path, "chosen": dict(merge.chosen),
                "plan": None if merge.plan is None else plan_json(merge.plan),
                "problems": [] if merge.refused is None else [p.as_json() for p in merge.refused.problems],
            }
            for merge in planned.merges
        ],
        "sweeps": [[planned.merges[index].label for index in sweep] for sweep in planned.sweeps],
        "read_bytes": planned.read_bytes,
        "read_bytes_apart": planned.read_bytes_apart,
        "write_bytes": planned.write_bytes,
        "problems": [p.as_json() for p in planned.problems],
    }  # fmt: skip


def bulk_plan_lines(planned: BulkPlan) -> Iterator[str]:
    """The plan of a bulk for people."""
    sources = {s.catalog.reference: s.catalog.kind for plan in planned.plans() for s in plan.sources}
    for reference, kind in sources.items():
        yield f"source  {kind:<8} {reference}"
    width = max((len(merge.label) for merge in planned.merges), default=0)
    for merge in planned.merges:
        if merge.plan is None:
            yield f"merge   {merge.label:<{width}}  refused"
        else:
            plan = merge.plan
            size = format_size(write_bytes(plan))
            yield f"merge   {merge.label:<{width}}  {size:>10}  {fingerprint(plan)}  {merge.path}"
    several = [sweep for sweep in planned.sweeps if len(sweep) > 1]
    together = f"; {sum(map(len, several))} of them in {len(several)} sweep(s) that read once" if several else ""
    yield f"merges  {len(planned.merges)}{together}; {planned.max_active_merges} at once"
    times = max((passes(plan) for plan in planned.plans()), default=0)
    apart = planned.read_bytes_apart
    saved = f" (one by one {format_size(apart)})" if apart != planned.read_bytes else ""
    yield (
        f"reads   {format_size(planned.read_bytes)}{saved} in up to {times} pass(es); "
        f"writes {format_size(planned.write_bytes)}"
    )
