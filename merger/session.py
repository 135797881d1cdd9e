"""One merge at its output: what is there already, its lease and journal, and its publication.

    Session.open      what the output is now: this merge, nothing, the beginning of one; raises where it is another's
    take              takes the lease; where ranks follow from the data, `settle` comes next
    begin             makes files ready; what an earlier run left of this merge counts
    record, finish    receipts become durable; all of them become an output
    refuse, close     an end without one

Whoever runs the plan (here or on Ray, alone or in a bulk) does so between `start` and `finish`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merger.destination import Destination, OutputSettings, open_destination
from merger.errors import ManifestError, PlanError, RaymergeError, RefusedError
from merger.journal import RESULT_FILE, STATE_FOLDER, Journal, check_output, output_state, read_result, sweep_litter
from merger.manifest import parse_reference
from merger.methods.compose import method_label
from merger.output import begin, finish, plan_document, surviving
from merger.planning.build import check_machine
from merger.planning.nouns import MergePlan
from merger.planning.settle import settle
from merger.receipts import Receipt
from merger.report import MergeReport
from merger.run_files import Diary, stop_file
from merger.storage import LocalStore, Store
from merger.storage.base import Sink
from merger.versions import fingerprint, point_to_latest


@dataclass(slots=True)
class Session:
    """One merge at its output."""

    planned: MergePlan
    """With the path that it is really written to."""
    destinations: list[Destination]
    restart: bool = False
    pointer: Destination | None = None
    """Where latest.json lies, for an output that keeps its versions."""
    done: MergeReport | None = None
    """The report of this very merge, where it is there already."""
    receipts: dict[int, Receipt] = field(default_factory=dict)
    """What is done of it, in this run or an earlier one."""
    resumed: int = 0
    read_before: int = 0
    """Bytes that finding ranks read."""
    has_begun: bool = False
    """Whether anything of it is done, in this run or an earlier one."""
    refused: bool = False
    """Whether it ended by leaving the output as it was found."""
    _diary: Diary | None = None
    _journal: Journal | None = None
    _fresh: str | None = None
    """A folder that is not there before this run."""
    _started: float = 0.0

    @classmethod
    def open(cls, planned: MergePlan, *, restart: bool = False, run_dir: str | None = None) -> Session:
        """Look at the output of a plan without problems. Writes nothing.

        Raises PlanError, ManifestError (codes `no-output`, `conflict`), and what the place itself refuses.
        """
        if planned.problems:
            raise PlanError(planned.problems)
        if not planned.outputs or not planned.outputs[0].path:
            raise ManifestError.of(
                "no-output", "no output is named", where="output.path", fix="give OUT or output.path"
            )  # fmt: skip
        exists = output_options(planned).get("exists", "refuse")
        settings = output_settings(planned)
        pointer: Destination | None = None
        if exists == "version":
            place = planned.outputs[0].path
            if parse_reference(place, bare="local").kind == "hub":
                raise ManifestError.of(
                    "conflict", "a repository keeps its versions itself", where="output.exists",
                    why="each merge is a commit, and its branch names the latest", fix="write exists: replace",
                )  # fmt: skip
            pointer = open_destination(place, run_dir=run_dir, settings=settings)
            planned = versioned(planned)
        destinations = [open_destination(o.path, run_dir=run_dir, settings=settings) for o in planned.outputs]
        session = cls(planned, destinations, restart, pointer)
        if restart or exists == "replace":
            _refuse_own_sources(planned, destinations)
        if not restart:
            session.done = finished_report(planned, destinations[0])
        return session

    @property
    def sinks(self) -> list[Sink]:
        return [destination.sink for destination in self.destinations]

    def is_held(self) -> bool:
        """Whether the output is this run's: no other took it over. Asks the place."""
        return self._journal is not None and self._journal.lease.is_held()

    @property
    def epoch(self) -> int:
        """The number of this run's lease; 0 before it has one."""
        return 0 if self._journal is None else self._journal.lease.epoch

    @property
    def diary(self) -> Diary:
        """What this run says of itself, from the moment it has the output."""
        assert self._diary is not None
        return self._diary

    def conclude_done(self) -> MergeReport:
        """The report of a merge that was done already; latest.json names it now."""
        assert self.done is not None
        sweep_litter(self.destinations[0].state, self.destinations[0].content)
        self._point(self.done)
        return self.done

    def check(self, memory: int) -> None:
        """Raise PlanError where one worker's `memory` bytes, or what is free at the output, are too little."""
        # What is laid out at bounds will be smaller: its room is looked at when its ranks are known.
        free = None if self.planned.unsettled else self.free_bytes()
        problems = check_machine(self.planned, memory=max(0, memory), free_bytes=free)
        if problems:
            raise PlanError(problems)

    def free_bytes(self) -> int | None:
        """Free bytes, counting what an unfinished run reserved already and what `restart` will remove."""
        store = self.destinations[0].state
        free = store.free_bytes()
        if free is None:
            return None
        names = [name for name in store.list_files() if name.startswith(f"{STATE_FOLDER}/")]
        content = self.destinations[0].content
        if self.restart and output_state(content, store) == "finished":
            names = [RESULT_FILE, *(str(file["name"]) for file in read_result(content)["files"])]
        present = set(store.list_files())
        return free + sum(store.stat(name).size for name in names if name in present)

    def check_place(self) -> None:
        """Raise what `take` would where the output is another's, before any work: nothing is written."""
        place = self.destinations[0]
        check_output(
            place.state, place.content, plan_document(self.planned), restart=self.restart, replace=self._replacing
        )  # fmt: skip

    @property
    def _replacing(self) -> bool:
        return output_options(self.planned).get("exists") == "replace"

    def resolve(self) -> None:
        """Find out where the sources' files are fetched from, for all workers."""
        for source in self.planned.sources:
            source.catalog.store.resolve(sorted({stored.file for stored in source.catalog.tensors.values()}))

    def start(self) -> None:
        """`take` and `begin`: for a plan that is settled."""
        self.take()
        self.begin()

    def take(self) -> None:
        """Take the output: probe it, and take its lease.

        Raises OutputExistsError, InfrastructureError (code `lease-held`), and what the place refuses.
        """
        for sink in self.sinks:
            sink.probe()
        self.resolve()
        self._started = time.monotonic()
        first = self.destinations[0]
        if isinstance(first.content, LocalStore) and not os.path.exists(first.content.root):
            self._fresh = first.content.root
        self._journal = Journal.open(
            first.state, plan_document(self.planned), content=first.content, sink=first.sink, restart=self.restart,
            replace=self._replacing,
        )  # fmt: skip
        self._diary = Diary(first.state, {"plan_digest": self.planned.identity}, is_held=self.is_held)
        self._diary.log(f"begun on {socket.gethostname()}")

    def durable(self) -> list[Receipt]:
        """What the journal holds of this plan."""
        assert self._journal is not None
        found = list(self._journal.receipts().values())
        self.has_begun |= bool(found)
        return found

    def append(self, receipts: Iterable[Receipt]) -> None:
        """Make receipts durable that no output consists of: those of what is measured first."""
        assert self._journal is not None
        found = list(receipts)
        self.has_begun |= bool(found)
        self._journal.append(found)

    def settle(self, ranks: Mapping[tuple[int, int], int], read_bytes: int) -> None:
        """Go on with the plan that the found ranks make; finding them read so many bytes. Raises PlanError where the
        output has no room for it."""
        assert self._journal is not None
        self.read_before = read_bytes
        self.planned = settle(self.planned, ranks)
        self._journal.turn_to(self.planned.digest)
        problems = check_machine(self.planned, memory=1 << 62, free_bytes=self.free_bytes())
        if problems:
            raise PlanError(problems)

    def begin(self) -> None:
        """Make the files ready, and count what an earlier run did. Raises what the place refuses."""
        assert self._journal is not None
        try:
            begin(self.planned, self.sinks)
            kept = surviving(self.planned, self.sinks, self._journal.receipts().values())
        except RefusedError:
            self.refuse()
            raise
        except BaseException:  # whatever ends the run, a stop too, the lease is given back
            self.close()
            raise
        self.receipts = {receipt.unit: receipt for receipt in kept if 0 <= receipt.unit < len(self.planned.units)}
        self.resumed = len(self.receipts)
        self.has_begun |= bool(self.receipts)

    def record(self, receipts: Iterable[Receipt]) -> None:
        """Make receipts durable."""
        found = list(receipts)
        for receipt in found:
            self.receipts.setdefault(receipt.unit, replace(receipt, statistics=()))
        assert self._journal is not None
        self.has_begun |= bool(found)  # also where they cannot be recorded: the units are done
        self._journal.append(found)

    def finish(self, *, workers: str, fingerprint: Mapping[str, str] | None = None) -> MergeReport:
        """Publish the output; the diary's lines, and how many events there were of each kind, are kept in its report.
        The lease is given back whether this succeeds or not. `fingerprint` is that of workers with GPUs.

        Raises MergeFailedError (codes `incomplete`, …), OutputExistsError where another run won, InfrastructureError.
        """
        try:
            (report, *_) = finish(
                self.planned, self.sinks, self.receipts, self._journal, seconds=time.monotonic() - self._started,
                resumed=self.resumed, workers=workers, message=commit_message(self.planned),
                log=self.diary.lines, events=self.diary.events.counts, fingerprint=fingerprint,
                read_before=self.read_before,
            )  # fmt: skip
        except BaseException:  # whatever ended it, a stop too, the lease is given back
            with contextlib.suppress(RaymergeError):  # what ended the run is told, not that this failed as well
                self.close()
            raise
        self._journal = None
        self._point(report)
        return report

    def refuse(self) -> None:
        """It cannot be done after all, and nothing of it is: leave the output as it was found."""
        self.refused = True
        for output, sink in zip(self.planned.outputs, self.sinks, strict=True):
            sink.abandon([file.name for file in output.files])
        if self._journal is not None:
            self._journal.remove()
            self._journal = None
        if self._fresh is not None:
            with contextlib.suppress(OSError):
                os.rmdir(self._fresh)

    def close(self) -> None:
        """Give the lease back and keep what is done: the same command resumes."""
        if self._journal is not None:
            with contextlib.suppress(RaymergeError):  # it was meant for this run, and lease numbers may come again
                self.destinations[0].state.remove(stop_file(self.epoch))
            journal, self._journal = self._journal, None  # once, whether the place takes it or not
            journal.close()

    def _point(self, report: MergeReport) -> None:
        if self.pointer is not None:
            point_to_latest(self.pointer, self.planned, report)


def output_options(planned: MergePlan) -> dict[str, Any]:
    """The manifest's `output:` as the plan keeps it."""
    options = planned.manifest.get("output")
    return dict(options) if isinstance(options, dict) else {}


def output_settings(planned: MergePlan) -> OutputSettings:
    """What the manifest says of the place of the output."""
    options = output_options(planned)
    s3 = options.get("s3") or {}
    return OutputSettings(
        options.get("private"),
        s3.get("kms_key_id"),
        s3.get("storage_class"),
        tuple(sorted((s3.get("tags") or {}).items())),
    )


def versioned(planned: MergePlan) -> MergePlan:
    """The same plan with its output at PATH/<fingerprint>."""
    made = planned.outputs[0]
    path = str(parse_reference(made.path, bare="local").child(fingerprint(planned)))
    return replace(planned, outputs=(replace(made, path=path), *planned.outputs[1:]))


def _refuse_own_sources(planned: MergePlan, destinations: Sequence[Destination]) -> None:
    """What is removed to make way is what an earlier merge made there: never what this one reads."""
    for destination in destinations:
        for source in planned.sources:
            for name in source.catalog.pins:
                if _lies_in(source.catalog.store, name, destination.content):
                    raise PlanError.of(
                        "output-is-source", "a source of this merge would be removed", why="the source lies in the "
                        "output's folder, which is cleared first", fix="choose another output",
                        where=f"{destination.uri} (source {source.label})",
                    )  # fmt: skip


def _lies_in(store: Store, name: str, place: Store) -> bool:
    if isinstance(store, LocalStore) and isinstance(place, LocalStore):
        root = os.path.realpath(place.root)
        return os.path.commonpath([root, os.path.realpath(store.path(name))]) == root
    return store.remote and place.remote and f"{store.uri}/{name}".startswith(f"{place.uri}/")


def commit_message(planned: MergePlan) -> str:
    """What a repository's history says of this merge."""
    given = output_options(planned).get("commit_message")
    method = method_label(planned.manifest)
    return str(given) if given else f"Merge of {len(planned.sources)} sources with {method} (raymerge)"


def finished_report(planned: MergePlan, destination: Destination) -> MergeReport | None:
    """The report of an output that holds this very merge already, else None."""
    if output_state(destination.content, destination.state) != "finished":
        return None
    found = read_result(destination.content)
    if found.get("plan_digest") != planned.digest:
        return None
    return MergeReport(
        planned.outputs[0].path, planned.outputs[0].kind, str(found["plan_digest"]), str(found["content_digest"]),
        already_done=True, warnings=planned.warnings, deviations=planned.deviations,
    )  # fmt: skip
