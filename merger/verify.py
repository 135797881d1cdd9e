"""Whether an output still is what its raymerge.json says: every byte digested again, and some merged again."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from merger.api import plan, run_planned
from merger.destination import open_destination
from merger.errors import MergeFailedError, Problem, SourceError
from merger.gates import HiddenStates, fill_gates
from merger.intermediates import made_first
from merger.journal import output_state, read_result
from merger.methods.plugin import load_installed, plugins_of
from merger.planning.nouns import MergePlan
from merger.planning.settle import settle_by_name
from merger.report import REPORT_FILE, REPORTS, content_digest
from merger.storage.base import RangeRead, Store, read_whole
from merger.versions import latest_of


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification looked at."""

    path: str
    extents: int
    replayed: int
    content_digest: str

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path, "extents": self.extents, "replayed": self.replayed,
            "content_digest": self.content_digest,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        yield f"verified {self.path}: {self.extents} extents digested, {self.replayed} merged again"
        yield f"content digest {self.content_digest}"


def read_report(output: str) -> dict[str, Any]:
    """raymerge.json without its extents, with the report's figures. Raises SourceError where there is no merge."""
    store, result = _open(output)
    document = {key: value for key, value in result.items() if key != "extents"}
    document["extents"] = len(result["extents"])
    try:
        document["report"] = json.loads(read_whole(store, REPORT_FILE, limit=256 << 20))
    except (SourceError, ValueError):
        document["report"] = {}
    return document


def _open(output: str) -> tuple[Store, dict[str, Any]]:
    store = open_destination(latest_of(output)).content
    state = output_state(store)
    if state != "finished":
        raise SourceError.of(
            "no-merge", f"there is no finished merge at {output} (it is {state})", where=output,
            fix="run the merge again: it resumes" if state == "unfinished" else "check the path",
        )  # fmt: skip
    return store, read_result(store)


def verify_output(output: str, *, replay: int | None = 0, hidden: HiddenStates | None = None) -> Verification:
    """Digest every file of a finished output, check coverage, and merge `replay` extents again (None: all).

    `hidden` does the forward pass where gates of experts were made by one.

    Raises MergeFailedError(code `verify-mismatch`) naming every extent that differs, SourceError where there is no
    finished merge.
    """
    store, result = _open(output)
    extents = [(str(f), int(s), int(e), str(d)) for f, s, e, d in result["extents"]]
    problems = _check_files(store, result, extents)
    for file, start, end, sha256 in extents:
        found = _digest(store, file, start, end)
        if found != sha256:
            problems.append(
                _mismatch(output, file, start, end, "its bytes have another digest than raymerge.json says")
            )
    if content_digest(extents) != result["content_digest"]:
        problems.append(Problem("verify-mismatch", "the content digest does not follow from the extents", output))
    replayed = 0
    if not problems and replay != 0:
        replayed, different = _replay(output, result, extents, replay, hidden)
        problems += different
    if problems:
        raise MergeFailedError(problems)
    return Verification(output, len(extents), replayed, str(result["content_digest"]))


def _mismatch(output: str, file: str, start: int, end: int, why: str) -> Problem:
    return Problem(
        "verify-mismatch", f"{file}, bytes {start} to {end}, are not what was written", output, why,
        "merge again with --restart",
    )  # fmt: skip


def _digest(store: Store, file: str, start: int, end: int) -> str:
    buffer = bytearray(end - start)
    if buffer:
        try:
            store.read_into(file, [RangeRead(start, memoryview(buffer))])
        except SourceError:
            return "unreadable"
    return hashlib.sha256(buffer).hexdigest()


def _check_files(store: Store, result: dict[str, Any], extents: list[tuple[str, int, int, str]]) -> list[Problem]:
    problems = []
    covered: dict[str, int] = {}
    for file, start, end, _ in sorted(extents):
        if start != covered.get(file, 0):
            problems.append(Problem("verify-mismatch", f"{file} is not covered at byte {covered.get(file, 0)}", file))
        covered[file] = end
    names = set(store.list_files())
    for entry in result["files"]:
        name, size = str(entry["name"]), int(entry["size"])
        if name not in names:
            problems.append(Problem("verify-mismatch", f"{name} is missing", store.uri))
        elif store.stat(name).size != size or covered.get(name, 0) != size:
            problems.append(Problem("verify-mismatch", f"{name} has not the size it was written with", store.uri))
    known = {str(entry["name"]) for entry in result["files"]} | set(REPORTS) | {"raymerge.json"}
    loadable = [n for n in names - known if n.endswith((".safetensors", ".bin", ".index.json"))]
    problems += [
        Problem("verify-mismatch", f"{name} is no part of the merge, and a loader may take it", store.uri, "",
                "remove it")
        for name in sorted(loadable)
    ]  # fmt: skip
    return problems


def _check_plugins(output: str, result: dict[str, Any]) -> None:
    """Whether the plugins that an output was made with are loaded. Raises SourceError(code `no-plugin`)."""
    for made in result.get("plugins", ()):
        have = {plugin.sha256 for plugin in plugins_of(made["methods"])}
        if made["sha256"] not in have:
            raise SourceError.of(
                "no-plugin", f"this output was made with the plugin {made['name']}", where=output,
                why=f"its SHA-256 is {made['sha256'][:12]}, and "
                + (f"what is loaded is {have.pop()[:12]}" if have else "it is not loaded"),
                fix="give --plugin FILE.py with that very file",
            )  # fmt: skip


def _replay(
    output: str, result: dict[str, Any], extents: list[tuple[str, int, int, str]], count: int | None,
    hidden: HiddenStates | None,
) -> tuple[int, list[Problem]]:  # fmt: skip
    """Merge units again, with the statistics they need, and compare what they yield."""
    load_installed()
    _check_plugins(output, result)
    planned = plan(result["manifest"], output)
    if planned.problems:
        raise SourceError(planned.problems)
    if planned.digest != result["plan_digest"]:
        raise SourceError.of(
            "plan-differs", "the manifest and the sources no longer give the plan that made this output", where=output,
            why="a source changed or moved, or this is another version of raymerge", fix="replay needs both unchanged",
        )  # fmt: skip
    run = functools.partial(run_planned, hidden=hidden)
    with made_first(planned, None, run) as ready:  # what it reads of other documents is merged again, too
        filled = fill_gates(ready, hidden)
        if filled.unsettled:
            filled = settle_by_name(filled, result.get("ranks", {}))  # each unit looks whether its rank is the least
        return _replay_units(filled, output, extents, count)


def _replay_units(
    planned: MergePlan, output: str, extents: list[tuple[str, int, int, str]], count: int | None
) -> tuple[int, list[Problem]]:
    from merger.run import Progression
    from merger.unit import UnitRunner, one_torch_thread

    wanted = {(file, start, end): sha for file, start, end, sha in extents}
    progression = Progression(planned)
    maps = [u.index for u in progression.units if u.round is None]
    if count is not None and count < len(maps):
        maps = sorted(random.Random(0).sample(maps, count))
    chosen = set(maps)
    tasks = {progression.units[i].task for i in chosen}
    if any(r.call.scope == "model" for t in tasks for r in planned.tasks[t].results):
        tasks = set(range(len(planned.tasks)))
    runner = UnitRunner(planned, memory=1 << 30, device=planned.device)
    problems: list[Problem] = []
    replayed = 0

    def discard(output_: int, file: str, offset: int, data: memoryview) -> None:
        del output_, file, offset, data

    with one_torch_thread(planned):
        for stage in range(planned.num_stages):
            for unit in progression.units:
                if unit.stage != stage or (unit.index not in chosen if unit.round is None else unit.task not in tasks):
                    continue
                receipt = runner.run(unit, progression.ledger.findings(unit), discard)
                if unit.round is not None:
                    progression.ledger.add(receipt)
                for e in receipt.extents:
                    replayed += 1
                    if wanted.get((e.file, e.start, e.end)) != e.sha256:
                        problems.append(_mismatch(output, e.file, e.start, e.end, "merging it again gives other bytes"))
            progression.ledger.close_stage(stage, only=tasks)
    return replayed, problems
