"""The sink of an S3 bucket: each large file is one multipart upload, which S3 lets appear whole or not at all.

Parts are planned, so that any worker may upload any part, whenever it holds all of it: part number = index + 1, the
same bytes at each repetition. What a worker holds of a part when its bytes have to outlive it is put aside as pieces
in `.raymerge/pieces/` until `seal` joins them. The uploads under way are recorded in `.raymerge/uploads.json`; each
carries a random mark in the object's metadata, by which a completion whose answer was lost is told from another's.

Bytes are a function of the plan and their MD5 is checked on the way, so a part or a piece that is there is right.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any, Final

from merger.errors import InfrastructureError, MergeFailedError, OutputExistsError, PlanError, RaymergeError
from merger.storage.base import FileLayout, FileStat, RangeRead, read_whole
from merger.storage.http import Resource, gather, read_files, submit
from merger.storage.s3 import MARK, NO_SETTINGS, Rejected, S3Settings, S3Store, mark_of

RECORD_FILE: Final = ".raymerge/uploads.json"
PIECES_FOLDER: Final = ".raymerge/pieces"
PROBES: Final = ".raymerge/probe-"
"""How the names of objects begin on which a bucket's conditions are tried."""
_RECORD_LIMIT: Final = 64 << 20

BATCH_BYTES: Final = 128 << 20
"""A flush turns what is held of parts into pieces, which travel three times: it should be rare."""
HELD_PARTS: Final = 3
"""How many of the longest parts a writer may hold: two on their way, one being filled."""
_WAITING: Final = 2
_JOINING: Final = 4
"""Parts that a seal joins and uploads at once."""
_ABORTS: Final = 5
"""An abort may overtake a part that is still arriving; then it has to be repeated."""

Span = tuple[int, int]
"""Bytes [start, end)."""


def writer_bytes(files: Iterable[FileLayout]) -> int:
    """What one writer holds in memory at most."""
    spans = (file.part_span(part) for file in files for part in range(len(file.parts)))
    return HELD_PARTS * max((end - start for start, end in spans), default=0)


def piece_name(file: str, start: int, end: int) -> str:
    """Where bytes [start, end) of a file wait for the rest of their part."""
    return f"{PIECES_FOLDER}/{file}/{start:012}-{end:012}"


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same bytes in ascending spans that do not touch."""
    found: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return tuple(found)


def covers(spans: Sequence[Span], start: int, end: int) -> bool:
    """Whether `joined` spans hold all of [start, end)."""
    at = bisect.bisect_right(spans, start, key=lambda span: span[0]) - 1
    return start >= end or (at >= 0 and end <= spans[at][1])


def _layout_digest(file: FileLayout) -> str:
    """Two runs may share an upload only where these agree."""
    said = json.dumps([file.size, file.parts, hashlib.sha256(file.prefix).hexdigest()])
    return hashlib.sha256(said.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Upload:
    """One multipart upload of ours, as recorded."""

    id: str
    """Empty for a file of no bytes, which is put whole."""
    mark: str
    layout: str


@dataclass(slots=True)
class MultipartSink:
    """The files of one output in a bucket. See `merger.storage.base.Sink`.

    `state` is where `.raymerge/` lies, normally the same place. A pickled sink carries the uploads' ids and no secret;
    what was staged stays with the driver.
    """

    store: S3Store
    state: S3Store
    settings: S3Settings = NO_SETTINGS
    _files: dict[str, FileLayout] = field(default_factory=dict)
    _uploads: dict[str, Upload] = field(default_factory=dict)
    _published: set[str] = field(default_factory=set)
    _held: dict[str, tuple[Span, ...]] = field(default_factory=dict)
    """What `begin` found of each file."""
    _staged: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = replace(self.store, settings=self.settings)
        self.state = replace(self.state, settings=self.settings.for_state())

    def __reduce__(self) -> tuple[Any, ...]:
        kept = (self._files, self._uploads, self._published)
        return MultipartSink, (self.store, self.state, self.settings, *kept)

    @property
    def seals(self) -> bool:
        return True

    @property
    def batch_bytes(self) -> int:
        return BATCH_BYTES

    def writer_bytes(self, files: Sequence[FileLayout]) -> int:
        return writer_bytes(files)

    # ---- before anything else

    def probe(self) -> None:
        """Raises PlanError: `no-conditional-writes`, `forbidden`, `no-such-bucket`; SourceError `no-credentials`."""
        if self.store.proven and self.state.proven:
            return
        try:
            for place in {self.store.bucket: self.store, self.state.bucket: self.state}.values():
                _prove(place)
        except MergeFailedError as error:  # nothing was begun: it is refused, not failed
            raise PlanError(error.problems) from None

    # ---- the driver

    def begin(self, files: Sequence[FileLayout]) -> None:
        self._files = {file.name: file for file in files}
        self._published, self._held, self._uploads = set(), {}, {}
        recorded = self._recorded()
        gather([submit(self._take_up, file, recorded[file.name]) for file in files if file.name in recorded])
        dropped = {name: upload for name, upload in recorded.items() if name not in self._uploads}
        self._drop_pieces(dropped)
        gather([submit(self._sweep, name, dropped.get(name)) for name in {**self._files, **dropped}])
        gather([submit(self._start, file) for file in files if file.name not in self._uploads])
        self._record()

    def _take_up(self, file: FileLayout, upload: Upload) -> None:
        """Go on with a recorded upload, if it led to its object or S3 still knows it."""
        if upload.layout != _layout_digest(file):
            return
        if mark_of(self.store.found(file.name)) == upload.mark:
            self._uploads[file.name] = upload
            self._published.add(file.name)
            return
        parts = self._parts(file, upload) if file.size else {}
        if parts is None:
            return
        self._uploads[file.name] = upload
        self._held[file.name] = joined(
            [
                (0, len(file.prefix)),
                *(file.part_span(part) for part in parts),
                *(span for span, _ in self._pieces(file.name)),
            ]
        )

    def _start(self, file: FileLayout) -> None:
        mark = secrets.token_hex(16)
        upload_id = ""
        if file.size:
            label = self.store.label(file.name)
            try:
                made = self.store.call(
                    "create_multipart_upload", label, Key=self.store.key(file.name), Metadata={MARK: mark},
                    **self.store.settings.parameters(),
                )  # fmt: skip
            except Rejected as answer:
                raise self._failed(file.name, answer) from None
            upload_id = made["UploadId"]
        self._uploads[file.name] = Upload(upload_id, mark, _layout_digest(file))
        self._held[file.name] = joined([(0, len(file.prefix))])

    def published(self) -> frozenset[str]:
        return frozenset(self._published)

    def holds(self, file: str, start: int, end: int, sha256: str) -> bool:
        """Presence in the right size is the proof: see the head of this file."""
        del sha256
        return file in self._published or covers(self._held.get(file, ()), start, end)

    def reopen(self, file: str) -> None:
        self._published.discard(file)
        self.store.remove(file)
        self._drop_pieces([file])
        self._start(self._files[file])
        self._record()

    def sealed(self, file: str, outcome: object) -> None:
        """`publish` asks S3 itself."""

    def stage(self, name: str, data: bytes) -> None:
        self._staged[name] = data

    def publish(self, name: str, *, exclusive: bool = True) -> None:
        if name in self._staged:
            self._publish_staged(name, exclusive=exclusive)
        elif name not in self._published:
            file, upload = self._files[name], self._uploads[name]
            if file.size:
                self._complete(file, upload, exclusive=exclusive)
            else:
                self._publish_empty(name, upload, exclusive=exclusive)
            self._published.add(name)

    def _publish_staged(self, name: str, *, exclusive: bool) -> None:
        data = self._staged[name]
        try:
            self.store.put(name, data, exclusive=exclusive)
        except FileExistsError:
            there = self.store.stat(name).size
            if there != len(data) or read_whole(self.store, name, limit=there) != data:
                raise self._taken(name) from None

    def _publish_empty(self, name: str, upload: Upload, *, exclusive: bool) -> None:
        try:
            self.store.put_view(name, b"", exclusive=exclusive, mark=upload.mark)
        except FileExistsError:
            raise self._taken(name) from None

    def _complete(self, file: FileLayout, upload: Upload, *, exclusive: bool) -> None:
        """Let S3 join the parts, and look whose object stands there then.

        A refusal may be of a repeated request that succeeded the first time; and there are servers that test the
        condition and let the object appear in two steps, so that two completions at once both succeed.
        """
        label = self.store.label(file.name)
        parts = self._parts(file, upload)
        if parts is None:
            self._see_whose(file.name)
            return
        missing = [part for part in range(len(file.parts)) if part not in parts]
        if missing:
            if mark_of(self.store.found(file.name)) == upload.mark:  # parts go while an upload becomes an object
                return
            start, end = file.part_span(missing[0])
            raise self._incomplete(file.name, f"{len(missing)} of its {len(file.parts)} parts", start, end)
        joined_parts = [{"PartNumber": part + 1, "ETag": parts[part]} for part in range(len(file.parts))]
        condition = {"IfNoneMatch": "*"} if exclusive else {}
        try:
            self.store.call(
                "complete_multipart_upload", label, Key=self.store.key(file.name), UploadId=upload.id,
                MultipartUpload={"Parts": joined_parts}, **condition,
            )  # fmt: skip
        except Rejected as answer:
            if answer.code == "NoSuchBucket" or answer.status not in (404, 412):
                raise self._failed(file.name, answer) from None
        self._see_whose(file.name)

    def _see_whose(self, name: str) -> None:
        """The upload has ended: return if it was by becoming the object that stands there."""
        found = self.store.found(name)
        if found is not None and mark_of(found) == self._uploads[name].mark:
            size = int(found["ContentLength"])
            if size != self._files[name].size:
                raise self._incomplete(name, f"all but {size} bytes of what S3 joined", size, self._files[name].size)
            return
        if found is not None:
            raise self._taken(name)
        raise MergeFailedError.of(
            "upload-lost",
            f"the upload of {name} was aborted",
            where=self.store.label(name),
            why="another run or a lifecycle rule of the bucket ended it",
            fix="see that nothing else writes to this output, and run the same command again",
        )

    def _taken(self, name: str) -> OutputExistsError:
        return OutputExistsError.of(
            "output-exists",
            f"there is another {name}",
            where=self.store.label(name),
            why="it appeared while this merge ran, and it is not this merge's",
            fix="choose another output, or say what shall happen with `output.exists`",
        )

    def _incomplete(self, name: str, what: str, start: int, end: int) -> MergeFailedError:
        return MergeFailedError.of(
            "incomplete",
            f"{name} is not whole: {what} is missing",
            where=self.store.label(name),
            why=f"nobody uploaded bytes {start} to {end}, or somebody removed them",
            fix="run the same command again: it merges what is missing",
        )

    def _failed(self, name: str, answer: Rejected) -> RaymergeError:
        return self.store.refused(self.store.label(name), answer, kind=MergeFailedError)

    def remove(self, name: str) -> None:
        self.store.remove(name)

    def conclude(self, message: str) -> None:
        """Each file appeared when it was published; nothing of the run stays."""
        del message
        gather([submit(self._sweep, name, None) for name in self._files])
        self._drop_pieces(self._files)
        self._drop_probes()
        self.state.remove(RECORD_FILE)

    def _drop_probes(self) -> None:
        """What runs left that were killed while they tried the bucket's conditions: an object, and perhaps an upload
        under its key."""
        for place in {self.store.uri: self.store, self.state.uri: self.state}.values():
            for name in place.list_stats(".raymerge"):
                if name.startswith(PROBES):
                    for stray in listed(place, name):
                        abort(place, name, stray)
                    place.remove(name)

    def abandon(self, files: Sequence[str]) -> None:
        recorded = self._recorded()
        gather([submit(self._sweep, name, recorded.get(name)) for name in files])
        self._drop_pieces(files)
        self._uploads = {name: upload for name, upload in recorded.items() if name not in files}
        if self._uploads:
            self._record()
        else:
            self.state.remove(RECORD_FILE)

    # ---- the workers

    def writer(self) -> MultipartWriter:
        return MultipartWriter(self, writer_bytes(self._files.values()))

    def layout(self, file: str) -> FileLayout:
        """Of a file of `begin`."""
        return self._files[file]

    def seal(self, file: str) -> object:
        """Upload the parts that no writer held as a whole. One part is in memory at a time."""
        layout, upload = self._files[file], self._uploads[file]
        if not layout.size or file in self._published:
            return {"joined": 0}
        there = self._parts(layout, upload)
        if there is None:
            self._see_whose(file)
            return {"joined": 0}
        missing = [part for part in range(len(layout.parts)) if part not in there]
        pieces = self._pieces(file) if missing else []

        def seal_part(part: int) -> None:
            self.upload_part(file, part, memoryview(self._join(layout, part, pieces)))

        with ThreadPoolExecutor(_JOINING, "raymerge-join") as threads:
            list(threads.map(seal_part, missing))
        return {"joined": len(missing)}

    def _join(self, file: FileLayout, part: int, pieces: Sequence[tuple[Span, FileStat]]) -> bytearray:
        """A part's bytes from the prefix and the pieces, which may overlap."""
        start, end = file.part_span(part)
        buffer = bytearray(end - start)
        view = memoryview(buffer)
        at = max(start, min(end, len(file.prefix)))
        view[: at - start] = file.prefix[start:at]
        wanted = []
        whole: list[tuple[Resource, memoryview]] = []
        inside = [piece for piece in pieces if piece[0][0] < end and start < piece[0][1]]
        while at < end:
            fitting = [piece for piece in inside if piece[0][0] <= at]
            (first, last), found = max(fitting, key=lambda piece: piece[0][1], default=((0, 0), FileStat(0, "")))
            if last <= at:
                raise self._incomplete(file.name, f"part {part + 1}", at, end)
            into = view[at - start : min(last, end) - start]
            piece = self.state.object_of(piece_name(file.name, first, last), found)
            wanted.append((piece, [RangeRead(at - first, into)]))
            if into.nbytes == last - first:
                whole.append((piece, into))
            at = min(last, end)
        read_files(wanted)
        for read, into in whole:
            self._check_piece(read, into)
        return buffer

    def _check_piece(self, piece: Resource, data: memoryview) -> None:
        """Compare a piece with its ETag, which is its MD5 unless it is encrypted: then two readings must agree."""
        if hashlib.md5(data, usedforsecurity=False).hexdigest() == piece.etag:
            return
        again = bytearray(data.nbytes)
        read_files([(piece, [RangeRead(0, memoryview(again))])])
        if hashlib.md5(again, usedforsecurity=False).hexdigest() == piece.etag:
            data[:] = again
        elif again != data:
            raise InfrastructureError.of(
                "source-unreachable", f"{piece.label} was read twice and came differently", where=piece.label,
                why="bytes change on their way", fix="look at the network, and run the same command again: it resumes",
            )  # fmt: skip

    def upload_part(self, file: str, part: int, data: memoryview) -> None:
        """Whoever uploads a part uploads the same bytes."""
        upload = self._uploads[file]
        label = f"part {part + 1} of {self.store.label(file)}"
        try:
            self.store.upload(
                "upload_part", label, data, Key=self.store.key(file), UploadId=upload.id, PartNumber=part + 1
            )
        except Rejected as answer:
            if answer.status != 404 or answer.code == "NoSuchBucket":
                raise self._failed(file, answer) from None
            self._see_whose(file)

    def put_pieces(self, file: str, start: int, data: memoryview, spans: Sequence[Span]) -> None:
        """Let spans of a part that begins at `start` outlive this process."""
        for first, last in spans:
            self.state.put_view(piece_name(file, first, last), data[first - start : last - start])

    # ---- what S3 holds

    def _parts(self, file: FileLayout, upload: Upload) -> dict[int, str] | None:
        """Part → ETag, of the parts that are there in their planned size. None when S3 knows no such upload."""
        found: dict[int, str] = {}
        more: dict[str, int] = {}
        while True:
            try:
                page = self.store.call(
                    "list_parts", self.store.label(file.name), Key=self.store.key(file.name), UploadId=upload.id, **more
                )
            except Rejected as answer:
                if answer.status == 404 and answer.code != "NoSuchBucket":
                    return None
                raise self._failed(file.name, answer) from None
            for entry in page.get("Parts", ()):
                part = int(entry["PartNumber"]) - 1
                if part < len(file.parts):
                    start, end = file.part_span(part)
                    if int(entry["Size"]) == end - start:
                        found[part] = entry["ETag"]
            if not page.get("IsTruncated"):
                return found
            more = {"PartNumberMarker": int(page["NextPartNumberMarker"])}

    def _pieces(self, file: str) -> list[tuple[Span, FileStat]]:
        """Pieces of a file, ascending, that are of the size that their names say."""
        found = []
        folder = f"{PIECES_FOLDER}/{file}"
        for name, stat in self.state.list_stats(folder).items():
            start, _, end = name[len(folder) + 1 :].partition("-")
            if start.isdigit() and end.isdigit() and int(end) - int(start) == stat.size:
                found.append(((int(start), int(end)), stat))
        return sorted(found, key=lambda piece: piece[0])

    def _drop_pieces(self, files: Iterable[str]) -> None:
        names = [name for file in files for name in self.state.list_stats(f"{PIECES_FOLDER}/{file}")]
        gather([submit(self.state.remove, name) for name in names])

    def _sweep(self, name: str, dropped: Upload | None) -> None:
        """Abort every upload under a file's key but the one that we go on with."""
        upload = self._uploads.get(name) if dropped is None else None
        kept = "" if upload is None or name in self._published else upload.id
        if dropped is not None and dropped.id:
            abort(self.store, name, dropped.id)
        for _ in range(_ABORTS):
            strays = [found for found in listed(self.store, name) if found != kept]
            if not strays:
                return
            for stray in strays:
                abort(self.store, name, stray)
        raise InfrastructureError.of(
            "upload-remains",
            f"an upload of {name} does not end",
            where=self.store.label(name),
            why=f"it is listed still, after {_ABORTS} requests to abort it",
            fix="run the same command again in a while",
        )

    def _recorded(self) -> dict[str, Upload]:
        if self.state.found(RECORD_FILE) is None:
            return {}
        document = json.loads(read_whole(self.state, RECORD_FILE, limit=_RECORD_LIMIT))
        return {name: Upload(**entry) for name, entry in document["uploads"].items()}

    def _record(self) -> None:
        uploads = {
            name: {"id": upload.id, "mark": upload.mark, "layout": upload.layout}
            for name, upload in sorted(self._uploads.items())
        }
        self.state.put(RECORD_FILE, json.dumps({"format": 1, "uploads": uploads}, indent=1).encode())


# ---------------------------------------------------------------------------------------------- uploads of one key


def listed(place: S3Store, name: str) -> list[str]:
    """Ids of the uploads in progress under a file's key, whoever began them.

    Asked for one key at a time: not every server that speaks S3 lists them for a folder.
    """
    key, found = place.key(name), []
    more: dict[str, str] = {}
    while True:
        try:
            page = place.call("list_multipart_uploads", place.label(name), Prefix=key, **more)
        except Rejected as answer:
            raise place.refused(place.label(name), answer, kind=MergeFailedError) from None
        found += [entry["UploadId"] for entry in page.get("Uploads", ()) if entry["Key"] == key]
        if not page.get("IsTruncated"):
            return found
        more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def abort(place: S3Store, name: str, upload_id: str) -> None:
    """End an upload, whether or not it is there still."""
    try:
        place.call("abort_multipart_upload", place.label(name), Key=place.key(name), UploadId=upload_id)
    except Rejected as answer:
        if answer.status != 404 or answer.code == "NoSuchBucket":
            raise place.refused(place.label(name), answer, kind=MergeFailedError) from None


# ---------------------------------------------------------------------------------------------- one thread's way in


@dataclass(slots=True, eq=False)
class _Part:
    """A part that is being filled, or the bytes of it that came so far."""

    start: int
    data: bytearray
    written: tuple[Span, ...] = ()
    """What was written, in offsets of the file; without the prefix."""


@dataclass(slots=True)
class MultipartWriter:
    """Collects bytes until a part is whole, and uploads it while the caller goes on. Not shared between threads.

    Holds `writer_bytes` at most: when room is needed it waits for uploads, then turns what it touched longest ago
    into pieces.
    """

    sink: MultipartSink
    _limit: int
    """Bytes."""
    _open: dict[tuple[str, int], _Part] = field(default_factory=dict)
    """By file and part; the one touched last stands last."""
    _under_way: deque[tuple[tuple[str, int] | None, int, Future[None]]] = field(default_factory=deque)
    _done: set[tuple[str, int]] = field(default_factory=set)
    """Parts that this writer uploaded. Who writes into them again, writes the same."""

    def write(self, file: str, offset: int, data: memoryview) -> None:
        layout, content = self.sink.layout(file), data.cast("B")
        if offset < 0 or offset + content.nbytes > layout.size:
            raise MergeFailedError.of(
                "write-failed",
                f"{file} has no room for {content.nbytes} bytes at byte {offset}",
                where=self.sink.store.label(file),
                why=f"it was planned with {layout.size} bytes",
                fix="this is a defect of raymerge: please report it",
            )
        done = 0
        while done < content.nbytes:
            at = offset + done
            part = bisect.bisect_right(layout.parts, at) - 1
            count = min(content.nbytes - done, layout.part_span(part)[1] - at)
            self._fill(layout, part, at, content[done : done + count])
            done += count

    def _fill(self, layout: FileLayout, part: int, at: int, data: memoryview) -> None:
        key = (layout.name, part)
        if key in self._done or any(key == flying for flying, _, _ in self._under_way):
            return
        start, end = layout.part_span(part)
        found = self._open.pop(key, None)
        if found is None:
            self._make_room(end - start)
            found = _Part(start, bytearray(end - start))
            known = layout.prefix[start:end]
            found.data[: len(known)] = known
        self._open[key] = found
        found.data[at - start : at - start + data.nbytes] = data
        found.written = joined([*found.written, (at, at + data.nbytes)])
        if covers(joined([*found.written, (0, len(layout.prefix))]), start, end):
            del self._open[key]
            self._send(key, found, self.sink.upload_part, *key, memoryview(found.data))

    def _make_room(self, num_bytes: int) -> None:
        limit = self._limit
        while self._held_bytes() + num_bytes > limit:
            if self._under_way:
                self._wait_for_one()
            else:
                self._put_aside(next(iter(self._open)))

    def _held_bytes(self) -> int:
        return sum(len(part.data) for part in self._open.values()) + sum(size for _, size, _ in self._under_way)

    def _put_aside(self, key: tuple[str, int]) -> None:
        """Turn a part that is not whole into pieces."""
        part = self._open.pop(key)
        self._send(None, part, self.sink.put_pieces, key[0], part.start, memoryview(part.data), part.written)

    def _send(self, key: tuple[str, int] | None, part: _Part, task: Callable[..., None], *arguments: Any) -> None:
        while len(self._under_way) >= _WAITING:
            self._wait_for_one()
        self._under_way.append((key, len(part.data), submit(task, *arguments)))

    def _wait_for_one(self) -> None:
        """Raises what an upload raised; then nothing that was written and not flushed counts any more."""
        key, _, future = self._under_way.popleft()
        try:
            future.result()
        except BaseException:  # whatever it was, no upload may outlive its data
            self._forget()
            raise
        if key is not None:
            self._done.add(key)

    def _forget(self) -> None:
        self._open.clear()
        wait([future for _, _, future in self._under_way])
        self._under_way.clear()

    def flush(self) -> None:
        for key in [*self._open]:
            self._put_aside(key)
        while self._under_way:
            self._wait_for_one()


# ---------------------------------------------------------------------------------------------- what S3 must refuse


def _prove(place: S3Store) -> None:
    """See that a bucket can be written and keeps the conditions that stand between two runs. Leaves nothing.

    Another run that ends here at this moment takes the probe away with its own state, and then nothing holds: so only
    what is broken twice is. Raises PlanError(code `no-conditional-writes`), MergeFailedError for what is refused
    altogether.
    """
    place = replace(place, settings=place.settings.for_state())
    broken = _broken_conditions(place) and _broken_conditions(place)
    if broken:
        raise PlanError.of(
            "no-conditional-writes",
            f"the bucket {place.bucket} does not keep the conditions of {' and '.join(broken)}",
            where=place.uri,
            why="two runs could overwrite each other's output, and neither would know",
            fix="use a server that keeps them, as AWS does, or write to a disk and copy the result",
        )
    place.prove()


def _broken_conditions(place: S3Store) -> list[str]:
    """Which conditions a server does not keep, tried on an object of our own."""
    name = f"{PROBES}{secrets.token_hex(8)}"
    broken: list[str] = []
    try:
        place.put(name, b"1", exclusive=True)
        pin = place.stat(name).pin
        if not _is_refused(lambda: place.put(name, b"2", exclusive=True)):
            broken.append("PutObject with If-None-Match")
        if not _is_refused(lambda: place.put(name, b"3", replacing=f"s3:{'0' * 32}")):
            broken.append("PutObject with If-Match")
        elif not broken and _is_refused(lambda: place.put(name, b"4", replacing=pin)):
            broken.append("PutObject with an If-Match that holds")
        if not _completion_is_refused(place, name):
            broken.append("CompleteMultipartUpload with If-None-Match")
    finally:
        place.remove(name)
    return broken


def _is_refused(put: Callable[[], None]) -> bool:
    """Whether a condition did its work. A server that does not know conditions may say so instead."""
    try:
        put()
    except FileExistsError:
        return True
    except MergeFailedError as error:
        if error.problems[0].code != "not-implemented":
            raise
    return False


def _completion_is_refused(place: S3Store, name: str) -> bool:
    """Whether an upload may not be completed under a name that is taken. Sees, too, that uploads may be listed."""
    label, key = place.label(name), place.key(name)
    try:
        upload_id = place.call("create_multipart_upload", label, Key=key, **place.settings.parameters())["UploadId"]
        try:
            part = place.upload("upload_part", label, b"5", Key=key, UploadId=upload_id, PartNumber=1)
            place.call("list_multipart_uploads", label, Prefix=key)
            place.call("list_parts", label, Key=key, UploadId=upload_id)
            try:
                parts = {"Parts": [{"PartNumber": 1, "ETag": part.headers["etag"]}]}
                place.call(
                    "complete_multipart_upload", label, Key=key, UploadId=upload_id, MultipartUpload=parts,
                    IfNoneMatch="*",
                )  # fmt: skip
            except Rejected as answer:
                if answer.status not in (412, 501):
                    raise
                return answer.status == 412
            return False
        except Rejected as answer:
            if answer.code != "NoSuchUpload":  # swept by another run
                raise
            return False
        finally:
            with contextlib.suppress(Rejected):  # completed
                place.call("abort_multipart_upload", label, Key=key, UploadId=upload_id)
    except Rejected as answer:
        raise place.refused(label, answer, kind=MergeFailedError) from None
