"""What an unfinished run remembers: its plan, its lease and the receipts of finished units, all under `.raymerge/`.

    .raymerge/plan.json              which plan this is, and the files it will make
    .raymerge/lease/000001.json      who is at work; the highest number holds it, the next is taken by creating it
    .raymerge/journal/000001-000001.jsonl   receipts, a segment a flush; named by lease and sequence
    .raymerge/parts/…                the output's files while they grow

The journal is trusted for what was done, never for the bytes: a resumed run digests the extents it names again, so that
a power cut or a stray write cannot pass as a result.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from merger.errors import (
    InfrastructureError,
    MergeFailedError,
    OutputExistsError,
    PlanError,
    RaymergeError,
    SourceError,
)
from merger.receipts import Extent, Receipt
from merger.storage.base import Sink, Store, WritableStore, read_whole

STATE_FOLDER: Final = ".raymerge"
RESULT_FILE: Final = "raymerge.json"
INTERMEDIATES: Final = f"{STATE_FOLDER}/intermediates"
"""Outputs that only the merge of this place reads, each an output of its own until this one is finished."""
LEASE_SECONDS: Final = 60.0
RENEW_SECONDS: Final = 15.0
_SMALL: Final = 256 << 20


# ------------------------------------------------------------------- receipts as lines


def receipt_to_json(receipt: Receipt) -> str:
    """One line of the journal."""
    return json.dumps(
        {
            "unit": receipt.unit,
            "extents": [[e.output, e.file, e.start, e.end, e.sha256] for e in receipt.extents],
            "statistics": [_pack(s) for s in receipt.statistics],
            "notes": receipt.notes,
            **({"by_result": receipt.by_result} if receipt.by_result else {}),
            "read_bytes": receipt.read_bytes,
            "seconds": receipt.seconds,
        },
        separators=(",", ":"),
    )


def receipt_from_json(line: str) -> Receipt:
    """The inverse of `receipt_to_json`."""
    data = json.loads(line)
    if not isinstance(data["unit"], int):
        raise TypeError("a receipt's unit is a number")
    return Receipt(
        data["unit"],
        tuple(Extent(*row) for row in data["extents"]),
        tuple(_unpack(s) for s in data["statistics"]),
        data["notes"],
        data["read_bytes"],
        data["seconds"],
        tuple(data.get("by_result", ())),
    )


def _pack(array: np.ndarray[Any, Any]) -> list[Any]:
    data = base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()
    return [array.dtype.str, list(array.shape), data]


def _unpack(packed: list[Any]) -> np.ndarray[Any, Any]:
    dtype, shape, data = packed
    return np.frombuffer(zlib.decompress(base64.b64decode(data)), dtype=dtype).reshape(shape)


# ------------------------------------------------------------------- states of an output


def output_state(content: Store, state: Store | None = None) -> str:
    """`absent`, `unfinished`, `finished` or `foreign`. `state`: where `.raymerge/` lies, if not beside the content.

    What a run that lost its lease left beside a finished output makes it no less finished.
    """
    kept = [name for name in (state or content).list_files() if name.startswith(STATE_FOLDER + "/")]
    if any(_is_of_a_run(name) for name in kept):
        return "unfinished"
    names = [name for name in content.list_files() if not name.startswith(STATE_FOLDER + "/")]
    if RESULT_FILE in names and _is_ours(content):
        return "finished"
    if kept:
        return "unfinished"
    return "foreign" if names else "absent"


def _is_of_a_run(name: str) -> bool:
    """Whether a file of the state says that a run is not over: it has these from its first step to its last."""
    return name == f"{STATE_FOLDER}/plan.json" or name.startswith((f"{STATE_FOLDER}/lease/", f"{INTERMEDIATES}/"))


def sweep_litter(store: WritableStore, content: Store) -> None:
    """Remove what runs that lost their lease left beside a finished output: a last word, pieces that were on their way.

    Nothing is touched where a run is at work or was interrupted."""
    kept = [name for name in store.list_files() if name.startswith(STATE_FOLDER + "/")]
    if kept and output_state(content, store) == "finished":
        for name in kept:
            store.remove(name)


def _is_ours(store: Store) -> bool:
    try:
        return "plan_digest" in read_result(store)
    except SourceError as error:
        _raise_if_closed(error)
        return False
    except ValueError:
        return False


def _raise_if_closed(error: SourceError) -> None:
    """What may not be looked at is not what is not there: another run may stand behind it."""
    if error.problems[0].code not in ("no-such-file", "file-too-large", "truncated"):
        raise error


def read_result(store: Store) -> dict[str, Any]:
    """The raymerge.json of a finished output. Raises ValueError where it is not one."""
    document = json.loads(read_whole(store, RESULT_FILE, limit=_SMALL))
    if not isinstance(document, dict):
        raise ValueError("raymerge.json holds no object")
    return document


# ------------------------------------------------------------------- the lease


def _process_start(pid: int) -> str:
    """When a process started, in the kernel's own ticks; empty where it is gone, a zombie, or unknown."""
    with contextlib.suppress(OSError, IndexError):
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if found[0] in "ZX" else found[19]
    return ""


def _boot() -> str:
    """This boot of this machine, and which process ids we see: containers may share all but the latter."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


@dataclass(slots=True)
class Lease:
    """The right to work on an output. Renewed while the run lives; the highest epoch holds."""

    store: WritableStore
    epoch: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells this lease from a later one of the same number."""
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)
    _renewer: threading.Thread | None = field(default=None, repr=False)

    @classmethod
    def acquire(cls, store: WritableStore) -> Lease:
        """Take the lease, from a dead or silent holder too. Raises InfrastructureError(code `lease-held`)."""
        epochs = _epochs(store)
        if epochs:
            holder = _holder(store, epochs[-1])
            if holder is not None and _alive(holder):
                raise InfrastructureError.of(
                    "lease-held",
                    f"another run is at work on this output: process {holder.get('pid')} on {holder.get('host')}",
                    where=store.uri,
                    why="two runs must not write one output at once",
                    fix="wait for it, or stop it; a run that died frees the output within a minute",
                )
        lease = cls(store, 1 + max([*epochs, *_segment_epochs(store)], default=0))
        try:
            store.put(lease.name, lease.document(), exclusive=True)
        except FileExistsError:
            raise _raced(store) from None
        except MergeFailedError as error:
            raise PlanError(error.problems) from error  # it has not started, and nothing was written
        for old in epochs:
            store.remove(_lease_name(old))
        return lease

    @property
    def name(self) -> str:
        return _lease_name(self.epoch)

    def document(self) -> bytes:
        pid = os.getpid()
        document = {
            "host": socket.gethostname(), "boot": _boot(), "pid": pid, "started": _process_start(pid),
            "renewed": time.time(), "token": self.token,
        }  # fmt: skip
        return json.dumps(document).encode()

    def keep(self) -> None:
        """Renew in the background, whatever the run is busy with, until it is released."""
        self._renewer = threading.Thread(target=self._renew_until_ended, name="raymerge-lease", daemon=True)
        self._renewer.start()

    def _renew_until_ended(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with contextlib.suppress(RaymergeError):  # what is wrong, the run itself meets at its next step
                self.renew()

    def renew(self) -> None:
        """Say that this run lives. Raises InfrastructureError(code `lease-lost`) when another run took over."""
        self.check()
        self.store.put(self.name, self.document())

    def is_held(self) -> bool:
        """Whether it is this run's still."""
        epochs = _epochs(self.store)
        holder = _holder(self.store, self.epoch) if epochs and epochs[-1] == self.epoch else None
        return holder is not None and holder.get("token") == self.token

    def check(self) -> None:
        """Refuse to go on without the lease: the fence before every journal segment and the commit."""
        if not self.is_held():
            raise InfrastructureError.of(
                "lease-lost",
                "another run took this output over",
                where=self.store.uri,
                why="this run was silent for more than a minute",
                fix="let the other run finish",
            )

    def release(self) -> None:
        """Give it back; another run's, which took it over and may bear the same number, stays."""
        self._ended.set()
        if self._renewer is not None:
            self._renewer.join()
        if self.is_held():
            self.store.remove(self.name)


def _raced(store: WritableStore) -> InfrastructureError:
    return InfrastructureError.of(
        "lease-held", "another run took this output at the same moment", where=store.uri,
        why="two runs must not write one output at once", fix="wait for it and run the same command again",
    )  # fmt: skip


def _lease_name(epoch: int) -> str:
    return f"{STATE_FOLDER}/lease/{epoch:06d}.json"


def _epochs(store: Store) -> list[int]:
    prefix = f"{STATE_FOLDER}/lease/"
    names = [n.removeprefix(prefix).removesuffix(".json") for n in store.list_files() if n.startswith(prefix)]
    return sorted(int(n) for n in names if n.isdigit())


def _segment_epochs(store: Store) -> list[int]:
    """The leases that journal segments were written under: a later run writes beside them, never over them."""
    prefix = f"{STATE_FOLDER}/journal/"
    numbers = [n.removeprefix(prefix).partition("-")[0] for n in store.list_files() if n.startswith(prefix)]
    return [int(n) for n in numbers if n.isdigit()]


def _holder(store: Store, epoch: int) -> dict[str, Any] | None:
    try:
        document = json.loads(read_whole(store, _lease_name(epoch), limit=1 << 16))
    except SourceError as error:
        _raise_if_closed(error)
        return None
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def holder_of(store: Store) -> dict[str, Any] | None:
    """Who is at work on an output: the lease, host, process and when it was last heard of; None where nobody is."""
    epochs = _epochs(store)
    holder = _holder(store, epochs[-1]) if epochs else None
    if holder is None or not _alive(holder):
        return None
    return {"epoch": epochs[-1], **{key: holder.get(key) for key in ("host", "pid", "renewed")}}


def _alive(holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname() and holder.get("boot") == _boot():
        pid = holder.get("pid")
        started = _process_start(pid) if isinstance(pid, int) else ""
        return bool(started) and started == holder.get("started")
    renewed = holder.get("renewed")
    return isinstance(renewed, int | float) and time.time() - renewed < LEASE_SECONDS


# ------------------------------------------------------------------- the journal


@dataclass(slots=True)
class Journal:
    """The durable receipts of one run on one output."""

    store: WritableStore
    """Where `.raymerge/` lies."""
    content: Store
    """What is published at the output."""
    lease: Lease
    digest: str
    """The plan's: each segment begins with it, and counts for no other plan."""
    replacing: dict[str, Any] | None = None
    """The finished merge that this one takes the place of, as plan.json records it."""
    _sequence: int = 0

    @classmethod
    def open(
        cls,
        store: WritableStore,
        plan_document: dict[str, Any],
        *,
        content: Store | None = None,
        sink: Sink | None = None,
        restart: bool = False,
        replace: bool = False,
    ) -> Journal:
        """Start or resume a run. `plan_document` has `digest` and `files`.

        `restart` first removes what an earlier merge made or began; with `replace` a finished one stays until this one
        is about to be published (`supplant`). `sink` drops what it keeps of unfinished files.
        Raises OutputExistsError when the output is something else, InfrastructureError when the lease is held.
        """
        content = content or store
        before = _contents(store, content)
        _refuse(content.uri, *before, plan_document, restart=restart, replace=replace)
        lease = Lease.acquire(store)
        try:
            if _contents(store, content) != before:
                raise _raced(store)
            name = f"{STATE_FOLDER}/plan.json"
            known = _read_plan(store) or {}
            # What is to be swept is written down first: a sweep that is cut short is ended by the next run.
            doomed = _named(store, content) if restart else known.get("sweeping")
            if doomed:
                store.put(name, _document({**plan_document, "sweeping": sorted(doomed)}))
                if sink is not None:
                    sink.abandon(sorted(doomed))
                _sweep(store, content, sink, set(doomed), keep={lease.name, name})
            replacing = None if restart else known.get("replacing")
            if replace and before[0] == "finished" and before[1] != plan_document["digest"]:
                replacing = {"pin": content.stat(RESULT_FILE).pin, "files": sorted(_named(store, content))}
            store.put(name, _document({**plan_document, **({"replacing": replacing} if replacing else {})}))
        except BaseException:  # whatever went wrong, the lease is given back
            lease.release()
            raise
        lease.keep()
        return cls(store, content, lease, str(plan_document["digest"]), replacing)

    def supplant(self, sink: Sink) -> None:
        """Take the replaced merge away, what says "finished" first. Once: what this run publishes has the same names.

        Raises OutputExistsError when it is no longer the one that was there when this run began.
        """
        if not self.replacing or self.replacing.get("done"):
            return
        self.lease.check()
        present = set(self.content.list_files())
        if RESULT_FILE in present and self.content.stat(RESULT_FILE).pin != self.replacing["pin"]:
            raise OutputExistsError.of(
                "output-exists", "the merge that was to be replaced was replaced by another run", where=self.store.uri,
                why="its raymerge.json is not the one that was there when this run began",
                fix="look at what is there now, and run the same command again to replace that",
            )  # fmt: skip
        for name in sorted(self.replacing["files"], key=lambda n: (n != RESULT_FILE, n)):
            if name in present:
                sink.remove(name)
        self.replacing = {**self.replacing, "done": True}
        plan = _read_plan(self.store) or {}
        self.store.put(f"{STATE_FOLDER}/plan.json", _document({**plan, "replacing": self.replacing}))

    def turn_to(self, digest: str) -> None:
        """Receipts from now on are those of another plan, into which this one was settled; earlier ones stay."""
        self.digest = digest

    def append(self, receipts: Iterable[Receipt]) -> None:
        """Make receipts durable, in one new segment."""
        lines = [receipt_to_json(receipt) for receipt in receipts]
        if not lines:
            return
        lines.insert(0, json.dumps({"plan": self.digest}))
        self.lease.check()
        self._sequence += 1
        name = f"{STATE_FOLDER}/journal/{self.lease.epoch:06d}-{self._sequence:06d}.jsonl"
        self.store.put(name, ("\n".join(lines) + "\n").encode())

    def receipts(self) -> dict[int, Receipt]:
        """What earlier runs finished, by unit. Lines that were cut short are passed over."""
        found: dict[int, Receipt] = {}
        prefix = f"{STATE_FOLDER}/journal/"
        for name in self.store.list_files():
            if not name.startswith(prefix):
                continue
            head, *lines = read_whole(self.store, name, limit=_SMALL).decode("utf-8", "replace").splitlines() or [""]
            if head != json.dumps({"plan": self.digest}):
                continue
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, AttributeError, zlib.error):
                    receipt = receipt_from_json(line)
                    found[receipt.unit] = receipt
        return found

    def close(self) -> None:
        """Give the lease back and keep the rest, so that the run can be resumed."""
        self.lease.release()
        with contextlib.suppress(RaymergeError):
            sweep_litter(self.store, self.content)

    def remove(self) -> None:
        """Remove all state: the output is finished. The lease goes last."""
        for name in self.store.list_files():
            if name.startswith(STATE_FOLDER + "/") and name != self.lease.name:
                self.store.remove(name)
        self.lease.release()


def _read_plan(store: Store) -> dict[str, Any] | None:
    try:
        document = json.loads(read_whole(store, f"{STATE_FOLDER}/plan.json", limit=_SMALL))
    except SourceError as error:
        _raise_if_closed(error)
        return None
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _document(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=1).encode()


def _contents(store: Store, content: Store) -> tuple[str, str | None]:
    """(state, digest of the merge that is there or begun); leases do not count."""
    plan = _read_plan(store)
    if plan is not None:
        return "unfinished", str(plan.get("digest"))
    names = content.list_files()
    if RESULT_FILE in names and _is_ours(content):
        return "finished", str(read_result(content)["plan_digest"])
    return ("foreign", None) if any(not n.startswith(STATE_FOLDER + "/") for n in names) else ("absent", None)


def check_output(
    store: WritableStore, content: Store, plan_document: dict[str, Any], *, restart: bool, replace: bool
) -> None:
    """Whether a run of this plan may begin here; nothing is touched. Raises OutputExistsError."""
    _refuse(content.uri, *_contents(store, content), plan_document, restart=restart, replace=replace)


def _refuse(
    where: str, state: str, digest: str | None, plan_document: dict[str, Any], *, restart: bool, replace: bool
) -> None:
    """Raise OutputExistsError where this plan may not be run."""
    if state == "foreign":
        raise OutputExistsError.of(
            "output-exists",
            "the output has files that raymerge did not write",
            where=where,
            why="nothing that is there is ever overwritten",
            fix="choose another output, or remove what is there yourself",
        )
    if state == "absent" or restart or digest == plan_document["digest"]:
        return
    if state == "finished" and replace:
        return
    if state == "finished":
        raise OutputExistsError.of(
            "output-exists",
            "the output holds another merge",
            where=where,
            why="its plan has another digest: other sources, parameters or versions",
            fix="choose another output, write output.exists: replace or version, or use --restart to remove it first",
        )
    raise OutputExistsError.of(
        "output-exists",
        "the output holds the beginning of another merge",
        where=where,
        why=f"its plan is {str(digest)[:12]}, this one is {plan_document['digest'][:12]}",
        fix="finish that one, choose another output, or use --restart to drop it",
    )


def _named(store: Store, content: Store) -> set[str]:
    """What plan.json or raymerge.json say raymerge made here."""
    plan = _read_plan(store) or {}
    named = {str(name) for key in ("files", "sweeping") for name in plan.get(key, ())}
    with contextlib.suppress(SourceError, ValueError, KeyError, TypeError):
        result = read_result(content)
        named.update(str(file["name"]) for file in result["files"])
        named.update(str(name) for name in result["reports"])
        named.add(RESULT_FILE)
    return named


def _sweep(store: WritableStore, content: Store, sink: Sink | None, named: set[str], *, keep: set[str]) -> None:
    """Remove what is named and the state of earlier runs, and nothing else: what says "finished" first."""
    for name in sorted(content.list_files(), key=lambda n: (n != RESULT_FILE, n)):
        if name in named and name not in keep:
            store.remove(name) if sink is None else sink.remove(name)
    for name in store.list_files():
        if name.startswith(STATE_FOLDER + "/") and not name.startswith(INTERMEDIATES + "/") and name not in keep:
            store.remove(name)
