"""What a run says of itself while it is under way, beside its journal, and what others may say to it.

    .raymerge/status.json    how far it is, or how it ended; written every few seconds
    .raymerge/log.txt        its lines so far
    .raymerge/events.jsonl   what happened, as data: the first events and the last ones, so that it stays small
    .raymerge/stop-N.json    a request to the run with lease N to stop, left by `raymerge stop`

Whoever reaches the output can read them, with or without the cluster. They go with the rest of `.raymerge/` when the
output is finished; the log, and how many events there were of each kind, are then in raymerge-report.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from merger.destination import open_destination
from merger.errors import RaymergeError, SourceError
from merger.events import Event, EventLog, shown
from merger.journal import INTERMEDIATES, STATE_FOLDER, holder_of, output_state, read_result
from merger.report import REPORT_FILE
from merger.run import Progress, ProgressListener, Stop
from merger.storage.base import Store, WritableStore, read_whole
from merger.tensors import format_size
from merger.versions import latest_of

STATUS_FILE: Final = f"{STATE_FOLDER}/status.json"
LOG_FILE: Final = f"{STATE_FOLDER}/log.txt"
EVENTS_FILE: Final = f"{STATE_FOLDER}/events.jsonl"
LINES: Final = 2000
"""Lines of a log that are kept: its end. A run of days writes more."""
WRITE_SECONDS: Final = 5.0
"""Between two writings."""
LOOK_SECONDS: Final = 0.5
"""Between two looks for a request to stop, where a look is no request to a server."""
FIRST_SECONDS: Final = 1.0
"""Before the first of either: many runs are over by then."""
STOP_SIGNAL: Final = 15
_LIMIT: Final = 16 << 20


class Diary:
    """What a run says of itself at its output. Kept in memory; written when it is told to."""

    def __init__(self, store: WritableStore, about: Mapping[str, Any], *, is_held: Callable[[], bool]) -> None:
        """`is_held`: whether the output is this run's still. One that lost it says nothing more there."""
        self._store = store
        self._is_held = is_held
        self._about = {**about, **submitted_as()}
        self._progress: Progress | None = None
        self._lines: deque[str] = deque(maxlen=LINES)
        self.events = EventLog()
        self._lock = threading.Lock()

    def listen(self, listener: ProgressListener | None = None) -> ProgressListener:
        """The same listener, heard here too."""

        def heard(progress: Progress) -> None:
            self._progress = progress
            if listener is not None:
                listener(progress)

        return heard

    @property
    def lines(self) -> list[str]:
        with self._lock:
            return list(self._lines)

    def log(self, line: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self._lock:
            self._lines.append(f"{stamp} {shown(line)}")

    def announce(self, event: Event) -> None:
        """Keep an event, and a line of it."""
        with self._lock:
            self.events.add(event)
        self.log(event.text)

    def go_on(self, **about: Any) -> None:
        """The run is under way; `about` is said of it as well."""
        at = self._progress
        if at is not None:
            self.log(
                f"stage {at.stage}/{at.stages}: {at.units_done}/{at.units} units, read {format_size(at.bytes_read)}"
                f", wrote {format_size(at.bytes_written)}"
            )
        self._write("running", **about)

    def end(self, error: BaseException | None, *, stopped: bool) -> None:
        """How the run ended, other than with an output. Said while it has its lease."""
        problems = error.problems if isinstance(error, RaymergeError) else ()
        for problem in problems:
            self.log(f"{problem.code}: {problem.what}")
        told = [problem.as_json() for problem in problems]
        self._write("stopped" if stopped else "failed", told)

    def _write(self, state: str, problems: Sequence[Mapping[str, str]] = (), **about: Any) -> None:
        at = self._progress
        status = {
            **self._about, **about, "state": state, "host": socket.gethostname(), "updated": time.time(),
            "units_done": 0 if at is None else at.units_done, "units": 0 if at is None else at.units,
            "bytes_read": 0 if at is None else at.bytes_read, "bytes_written": 0 if at is None else at.bytes_written,
            "events": dict(self.events.counts), "problems": list(problems),
        }  # fmt: skip
        with self._lock:
            happened = "".join(f"{line}\n" for line in self.events.lines())
        with contextlib.suppress(RaymergeError, OSError):  # a run does not fail because nobody can watch it
            if not self._is_held():
                return
            self._store.put(STATUS_FILE, json.dumps(status, indent=1).encode())
            self._store.put(LOG_FILE, ("\n".join(self.lines) + "\n").encode())
            if happened:
                self._store.put(EVENTS_FILE, happened.encode())


class RunFiles:
    """Writes a run's diary every few seconds, on a thread of its own, and passes a request to stop on."""

    def __init__(self, diary: Diary, store: WritableStore, epoch: int, stop: Stop | None) -> None:
        self._diary = diary
        self._store = store
        self._epoch = epoch
        self._stop = stop
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="raymerge-status", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if error is not None:
            self._diary.end(error, stopped=self._stop is not None and self._stop.requested)

    def _keep(self) -> None:
        pause = WRITE_SECONDS if self._store.remote else LOOK_SECONDS
        wait, written = FIRST_SECONDS, -WRITE_SECONDS
        while not self._ended.wait(wait):
            wait = pause
            if time.monotonic() - written >= WRITE_SECONDS:
                self._diary.go_on()
                written = time.monotonic()
            self._look_for_a_stop()

    def _look_for_a_stop(self) -> None:
        with contextlib.suppress(RaymergeError):
            if self._stop is not None and not self._stop.requested and is_asked_to_stop(self._store, self._epoch):
                self._diary.log("asked to stop")
                self._stop.set(STOP_SIGNAL)


def submitted_as() -> dict[str, str]:
    """The submission id of the Ray job that this process is the driver of, if it is one's."""
    try:
        told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
        name = (told.get("metadata") or {}).get("job_submission_id")
    except (ValueError, AttributeError):
        return {}
    return {"submission_id": str(name)} if name else {}


def stop_file(epoch: int) -> str:
    """Where a request to stop lies that is meant for the holder of a lease, and for no later one."""
    return f"{STATE_FOLDER}/stop-{epoch:06d}.json"


def is_asked_to_stop(store: Store, epoch: int) -> bool:
    """Whether the run with this lease was asked to stop."""
    return stop_file(epoch) in store.list_files()


# ---- for those who look on ------------------------------------------------------------------------------------------


def read_status(output: str, *, run_dir: str | None = None) -> dict[str, Any]:
    """How far the merge at an output is: `state` is absent, foreign, finished, running, stopped, failed, or interrupted
    (its driver died; the same command resumes). Raises what reading the place raises."""
    output = latest_of(output)
    place = open_destination(output, run_dir=run_dir)
    state = output_state(place.content, place.state)
    if state != "unfinished":
        document: dict[str, Any] = {"output": output, "state": state}
        if state == "finished":
            result = read_result(place.content)
            document |= {key: result.get(key) for key in ("plan_digest", "content_digest")}
        return document
    at_work = _at_work(place.state)
    if at_work is None:
        found = next((status for store in _stores(place.state) if (status := _json(store, STATUS_FILE))), {})
        told = found.pop("state", "interrupted")
        told = told if told in ("failed", "stopped") else "interrupted"
        return {"output": output, "state": told, **found, "driver": None}
    where, holder = at_work
    found = _json(where, STATUS_FILE)
    if where is not place.state:
        found["making"] = where.uri.rpartition("/")[2]
    return {"output": output, **found, "state": "running", "driver": holder}


def read_log(output: str, *, run_dir: str | None = None) -> str:
    """The lines of the merge at an output, under way, ended or finished. Raises SourceError where it has none."""
    place = open_destination(latest_of(output), run_dir=run_dir)
    text = _first(place.state, LOG_FILE)
    if text is not None:
        return text
    lines = _json(place.content, REPORT_FILE).get("log")
    if not isinstance(lines, list):
        raise SourceError.of(
            "no-log", "there is no log at this output", where=output, why="no run has begun there",
            fix="check the path",
        )  # fmt: skip
    return "".join(f"{line}\n" for line in lines)


def read_events(output: str, *, run_dir: str | None = None) -> list[dict[str, Any]]:
    """What happened in the unfinished run at an output, oldest first. Raises SourceError where nothing is known."""
    place = open_destination(output, run_dir=run_dir)
    text = _first(place.state, EVENTS_FILE)
    if text is None:
        raise SourceError.of(
            "no-events", "no events are kept at this output", where=output,
            why="they are kept while a run is unfinished; a report has their numbers", fix="see `raymerge report`",
        )  # fmt: skip
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def ask_to_stop(output: str, *, run_dir: str | None = None) -> bool:
    """Ask the run at an output to stop. Returns whether one is at work there."""
    place = open_destination(output, run_dir=run_dir)
    at_work = _at_work(place.state)
    if at_work is None:
        return False
    where, holder = at_work
    where.put(stop_file(holder["epoch"]), json.dumps({"host": socket.gethostname(), "asked": time.time()}).encode())
    return True


def _at_work(state: WritableStore) -> tuple[WritableStore, dict[str, Any]] | None:
    """Where a run is at work, and who it is: at this output, or at an intermediate that is made for it first."""
    return next(((store, holder) for store in _stores(state) if (holder := holder_of(store)) is not None), None)


def _stores(state: WritableStore) -> Iterator[WritableStore]:
    """The state of an output, and of the intermediates that lie in it."""
    yield state
    prefix = f"{INTERMEDIATES}/"
    made = {name.removeprefix(prefix).partition("/")[0] for name in state.list_files() if name.startswith(prefix)}
    for name in sorted(made):
        yield from _stores(open_destination(f"{state.uri}/{prefix}{name}").state)


def _first(state: WritableStore, name: str) -> str | None:
    """A file of the run at an output, or of one at an intermediate that is made for it; None where there is none."""
    for store in _stores(state):
        with contextlib.suppress(SourceError):
            return read_whole(store, name, limit=_LIMIT).decode("utf-8", "replace")
    return None


def _json(store: Store, name: str) -> dict[str, Any]:
    with contextlib.suppress(SourceError, ValueError):
        found = json.loads(read_whole(store, name, limit=_LIMIT))
        if isinstance(found, dict):
            return found
    return {}
