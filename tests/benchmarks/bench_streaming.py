"""Seconds of reads from S3 and the Hub, and of whole merges, beside what one would do with s3fs and huggingface_hub.

    python tests/benchmarks/bench_streaming.py --rounds 3
    python tests/benchmarks/bench_streaming.py --quick

*Reads*: every second tensor of a safetensors file, from a SeaweedFS and from the Hub of the tests. Each client is a
process of its own that lives through all rounds with its connections open; clients take turns. What is timed begins
with the file's reference and the wanted ranges and ends when all bytes are in memory; their SHA-256 is checked after.

*Merges*: ties of three models and their base, S3 to S3 and Hub to disk. `raymerge merge` on the remote references,
beside: download all files, `raymerge merge` on the folders, upload where the output is remote. Every step is a fresh
interpreter. The merged file must be, byte for byte, that of a merge from disk to disk.

Each twice: straight, and through proxies that keep each request waiting for --delay-ms and let --rate-mb MB/s through
each connection. Servers, proxies and clients share this machine's cores, so only ratios inside one table mean anything.
Targets are judged by the best round of each.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, cast

if TYPE_CHECKING:
    from merger.storage.base import Store
    from tests.counterparts.faults import FaultProxy
    from tests.counterparts.hub import HubServer
    from tests.counterparts.s3 import S3Server

ROOT = Path(__file__).parents[2]
BUCKET, ORG, FILE = "raymerge", "acme", "model.safetensors"
MODELS = ("base", "a", "b", "c")
MB = 10**6
CAT_RANGES_TARGET, HUB_FILES_TARGET, MERGE_TARGET = 1.0, 5.0, 1.0
"""How many times faster raymerge has to be than s3fs's cat_ranges; than the better of HfFileSystem's two ways, with
latency; streamed than after a download."""
TENSOR_BYTES = 5 * MB
"""On average."""
THREADS = 4
"""Units under way at once in a merge on two cores."""

Place: TypeAlias = Literal["s3", "hub"]
PLACES: tuple[Place, ...] = ("s3", "hub")
Span: TypeAlias = tuple[int, int]
"""Bytes [start, end) of the file."""
Read: TypeAlias = Callable[[Sequence[Span]], Sequence[Any]]
"""Spans to buffers."""


# ---- what it costs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one round."""

    wall: float
    cpu: float
    """User and system seconds of the client."""
    peak_mb: float = 0.0
    """Resident memory of the largest process."""
    disk_mb: float = 0.0
    """Most that lay on the client's disk at a time."""


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of one way to do a thing."""

    name: str
    costs: tuple[Cost, ...]

    @property
    def best(self) -> float:
        return min(cost.wall for cost in self.costs)

    def median(self, what: Callable[[Cost], float]) -> float:
        return statistics.median(map(what, self.costs))


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that is asked for, and the one that was found."""

    what: str
    ratio: float
    wanted: float

    @property
    def met(self) -> bool:
        return self.ratio >= self.wanted

    def __str__(self) -> str:
        return f"{self.what:92} {self.ratio:6.2f} ≥ {self.wanted:.1f}{'' if self.met else '   MISSED'}"


# ---- clients that read: each in a process of its own -----------------------------------------------------------------


def _buffers(spans: Sequence[Span]) -> list[Any]:
    import numpy as np

    return [np.empty(end - start, np.uint8) for start, end in spans]


def _from_store(open_store: Callable[[], Store], *, threads: int | None = None) -> Read:
    """Through the seam that the merger reads through: all spans in one call, or one a thread as units do."""
    from merger.storage.base import RangeRead

    def read(spans: Sequence[Span]) -> Sequence[Any]:
        store = open_store()
        pin = store.stat(FILE).pin
        store.resolve([FILE])
        into = _buffers(spans)
        reads = [RangeRead(start, memoryview(x)) for (start, _), x in zip(spans, into, strict=True)]
        if threads is None:
            store.read_into(FILE, reads, pin=pin)
            return into
        with ThreadPoolExecutor(threads) as workers:
            list(workers.map(lambda one: store.read_into(FILE, [one], pin=pin), reads))
        return into

    return read


def _s3_store() -> Store:
    from merger.storage.s3 import S3Store

    return S3Store(BUCKET, "read")


def _hub_store() -> Store:
    from merger.storage.hub import pin_hub

    return pin_hub(f"{ORG}/read", None)


def _seek_and_read(fs: Any, path: str) -> Read:
    def read(spans: Sequence[Span]) -> Sequence[Any]:
        fs.invalidate_cache()
        with fs.open(path, "rb") as file:
            found = []
            for start, end in spans:
                file.seek(start)
                found.append(file.read(end - start))
        return found

    return read


def _cat_ranges(fs: Any, path: str) -> Read:
    def read(spans: Sequence[Span]) -> Sequence[Any]:
        fs.invalidate_cache()
        starts, ends = zip(*spans, strict=True)
        found: list[bytes] = fs.cat_ranges([path] * len(spans), list(starts), list(ends), on_error="raise")
        return found

    return read


def _s3fs(pool: int | None = None) -> Any:
    import s3fs

    return s3fs.S3FileSystem(config_kwargs={} if pool is None else {"max_pool_connections": pool})


def _hub_files() -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem()


def _download_then_read(spans: Sequence[Span]) -> Sequence[Any]:
    from huggingface_hub import hf_hub_download

    into = _buffers(spans)
    with tempfile.TemporaryDirectory() as folder:
        fd = os.open(hf_hub_download(f"{ORG}/read", FILE, cache_dir=folder), os.O_RDONLY)
        for (start, _), buffer in zip(spans, into, strict=True):
            if os.preadv(fd, [buffer], start) != buffer.nbytes:
                raise SystemExit("a short read from the cache")
        os.close(fd)
    return into


OURS = "raymerge"
CAT_RANGES = "s3fs cat_ranges"
HUB_SEEK, HUB_CAT = "HfFileSystem seek, read", "HfFileSystem cat_ranges"
READERS: Mapping[Place, Mapping[str, Callable[[], Read]]] = {
    "s3": {
        OURS: lambda: _from_store(_s3_store),
        f"{OURS}, a tensor a thread": lambda: _from_store(_s3_store, threads=THREADS),
        CAT_RANGES: lambda: _cat_ranges(_s3fs(), f"{BUCKET}/read/{FILE}"),
        f"{CAT_RANGES}, pool of 32": lambda: _cat_ranges(_s3fs(32), f"{BUCKET}/read/{FILE}"),
        "s3fs seek, read": lambda: _seek_and_read(_s3fs(), f"{BUCKET}/read/{FILE}"),
    },
    "hub": {
        OURS: lambda: _from_store(_hub_store),
        f"{OURS}, a tensor a thread": lambda: _from_store(_hub_store, threads=THREADS),
        HUB_SEEK: lambda: _seek_and_read(_hub_files(), f"{ORG}/read/{FILE}"),
        HUB_CAT: lambda: _cat_ranges(_hub_files(), f"{ORG}/read/{FILE}"),
        "hf_hub_download, then read": lambda: _download_then_read,
    },
}


def serve_reader(place: Place, name: str, told: Path) -> int:
    """A client's process: one round for each line on standard input, its cost on standard output."""
    wanted = json.loads(told.read_text())
    spans = [(start, end) for start, end, _ in wanted]
    read = READERS[place][name]()
    read(spans[:2])  # imports, sessions and connections are there before the first round
    print("ready", flush=True)
    for _ in sys.stdin:
        before, started = _cpu(), time.perf_counter()
        found = read(spans)
        wall, cpu = time.perf_counter() - started, _cpu() - before
        if [hashlib.sha256(data).hexdigest() for data in found] != [sha256 for _, _, sha256 in wanted]:
            raise SystemExit(f"{name} from {place} brought wrong bytes")
        del found
        print(json.dumps(asdict(Cost(wall, cpu))), flush=True)
    return 0


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def read_rounds(place: Place, told: Path, environment: Mapping[str, str], *, rounds: int) -> list[Row]:
    """All clients of a place, in turns, each round starting with another one."""
    names = list(READERS[place])
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    with ExitStack() as stack:
        clients = {}
        for name in names:
            command = [sys.executable, __file__, "--reader", place, name, str(told)]
            client = stack.enter_context(
                subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            clients[name] = client
        for name in names:
            _answer(clients[name], name)
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                stdin = clients[name].stdin
                assert stdin is not None
                stdin.write("round\n")
                stdin.flush()
                costs[name].append(Cost(**json.loads(_answer(clients[name], name))))
                _say(f"{place} {name}: {costs[name][-1].wall:.2f} s")
    return [Row(name, tuple(found)) for name, found in costs.items()]


def _answer(client: subprocess.Popen[str], name: str) -> str:
    assert client.stdout is not None
    line = client.stdout.readline()
    if not line:
        raise SystemExit(f"{name} failed: its error is above")
    return line


def make_file(path: Path, size: int, tensors: int) -> list[tuple[int, int, str]]:
    """A safetensors file of random bytes in tensors that differ in size, and (start, end, SHA-256) of every second."""
    import numpy as np

    sizes = [round(size / tensors * (0.75 + 0.5 * (i * 7 % tensors) / tensors)) // 2 * 2 for i in range(tensors)]
    edges = [0, *itertools.accumulate(sizes)]
    header = {
        f"model.layers.{i}.weight": {"dtype": "BF16", "shape": [n // 2], "data_offsets": edges[i : i + 2]}
        for i, n in enumerate(sizes)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    wanted = []
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, n in enumerate(sizes):
            data = generator.bytes(n)
            if i % 2:
                wanted.append((file.tell(), file.tell() + n, hashlib.sha256(data).hexdigest()))
            file.write(data)
    return wanted


# ---- whole merges ----------------------------------------------------------------------------------------------------


def fetch_models(place: Place, folder: Path) -> None:
    """All files of all models below `folder`, many at once. Prints their folders as JSON."""
    if place == "s3":
        fs = _s3fs()
        found = [path for name in MODELS for path in fs.find(f"{BUCKET}/merge/{name}")]
        local = [folder / Path(path).parent.name / Path(path).name for path in found]
        for path in local:
            path.parent.mkdir(parents=True, exist_ok=True)
        fs.get(found, [str(path) for path in local])
        print(json.dumps({name: str(folder / name) for name in MODELS}))
        return
    from huggingface_hub import HfApi, hf_hub_download

    def files(name: str) -> list[str]:
        return HfApi().list_repo_files(f"{ORG}/{name}")

    def download(wanted: tuple[str, str]) -> tuple[str, str]:
        name, file = wanted
        return name, os.path.dirname(hf_hub_download(f"{ORG}/{name}", file, cache_dir=folder))

    with ThreadPoolExecutor(8) as threads:  # as many as snapshot_download uses, here for all models together
        listed = zip(MODELS, threads.map(files, MODELS), strict=True)
        print(json.dumps(dict(threads.map(download, [(name, file) for name, found in listed for file in found]))))


def send_folder(folder: Path, prefix: str) -> None:
    """Upload every file of a folder."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    targets = [f"{BUCKET}/{prefix}/{path.relative_to(folder).as_posix()}" for path in found]
    _s3fs().put([str(path) for path in found], targets)


def ties(models: Mapping[str, str]) -> dict[str, Any]:
    weights = {"a": 0.5, "b": 0.3, "c": 0.4}
    return {
        "merge_method": "ties",
        "base_model": models["base"],
        "models": [{"model": models[name], "parameters": {"weight": w, "density": 0.2}} for name, w in weights.items()],
        "dtype": "bfloat16",
    }


class DiskWatch:
    """The most bytes that lie below a folder at a time, looked at every few milliseconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.most = 0

    def _look(self) -> None:
        while not self._end.wait(0.05):
            self.most = max(self.most, _allocated(self._folder))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.most = max(self.most, _allocated(self._folder))


def _allocated(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total


@dataclass(frozen=True, slots=True)
class Step:
    """What a process took, and what it printed."""

    wall: float
    cpu: float
    peak_mb: float
    out: str


def run_step(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Step:
    """Run a command to its end.

    This process has to stay small: a child's peak begins at what its parent held.
    """
    started = time.perf_counter()
    with log.open("w+") as out, log.with_suffix(".err").open("w") as err:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{log.with_suffix('.err').read_text()[-4000:]}")
        out.seek(0)
        return Step(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / MB, out.read())


def merge_command(manifest: Path, models: Mapping[str, str], out: str) -> list[str]:
    manifest.write_text(json.dumps(ties(models)))
    return [sys.executable, "-m", "jobs.cli", "merge", str(manifest), out, "--on", "here", "--json"]


def step_command(*arguments: object) -> list[str]:
    return [sys.executable, __file__, *map(str, arguments)]


def streamed(place: Place, work: Path, prefix: str, environment: Mapping[str, str]) -> list[Step]:
    """`raymerge merge` on the remote references."""
    models = {name: f"s3://{BUCKET}/merge/{name}" if place == "s3" else f"{ORG}/{name}" for name in MODELS}
    out = f"s3://{BUCKET}/{prefix}" if place == "s3" else str(work / "out")
    return [run_step(merge_command(work / "merge.json", models, out), environment, work / "merge.log")]


def downloaded(place: Place, work: Path, prefix: str, environment: Mapping[str, str]) -> list[Step]:
    """Download, merge, and upload where the output is remote."""
    steps = [run_step(step_command("--fetch", place, work / "sources"), environment, work / "fetch.log")]
    models = json.loads(steps[0].out)
    steps.append(
        run_step(merge_command(work / "merge.json", models, str(work / "out")), environment, work / "merge.log")
    )
    if place == "s3":
        steps.append(run_step(step_command("--send", work / "out", prefix), environment, work / "send.log"))
    return steps


STREAMED, DOWNLOADED = "streamed", "download, merge, upload"
WAYS = {STREAMED: streamed, DOWNLOADED: downloaded}


def merge_rounds(
    place: Place, folder: Path, environment: Mapping[str, str], expected: str, s3: S3Server | None, *, rounds: int
) -> list[Row]:
    """Both ways in turns; each output is compared with the SHA-256 of the one that was merged from disk to disk."""
    costs: dict[str, list[Cost]] = {name: [] for name in WAYS}
    for number in range(rounds):
        for name in list(WAYS)[:: -1 if number % 2 else 1]:
            work = folder / "work"
            for below in ("tmp", "state"):
                (work / below).mkdir(parents=True)
            own = {"TMPDIR": str(work / "tmp"), "XDG_STATE_HOME": str(work / "state"), "HF_HOME": str(work / "hf")}
            prefix = f"out/{name.partition(',')[0]}-{number}"
            with DiskWatch(work) as disk:
                steps = WAYS[name](
                    place, work, prefix, {**environment, **own, "HF_HUB_CACHE": str(work / "hf" / "hub")}
                )
            if s3 is not None:
                body = s3.client().get_object(Bucket=BUCKET, Key=f"{prefix}/{FILE}")["Body"]
                found = _sha256(body.iter_chunks(1 << 20))
                s3.empty(BUCKET, prefix)
            else:
                found = _file_sha256(work / "out" / FILE)
            if found != expected:
                raise SystemExit(f"the merge from {place} ({name}) is not the merge from disk")
            costs[name].append(
                Cost(
                    sum(step.wall for step in steps),
                    sum(step.cpu for step in steps),
                    max(step.peak_mb for step in steps),
                    disk.most / MB,
                )
            )
            shutil.rmtree(work)
            _say(f"{place} {name}: {' + '.join(f'{step.wall:.2f}' for step in steps)} s")
    return [Row(name, tuple(found)) for name, found in costs.items()]


def _sha256(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- servers and the network before them -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Network:
    """What lies between clients and servers."""

    name: str
    delay_seconds: float = 0.0
    bytes_per_second: float = 0.0

    def before(self, stack: ExitStack, upstream: str, *, paced: bool = True, **more: Any) -> FaultProxy:
        """A proxy that answers as late and as slowly as this network does."""
        from tests.counterparts.faults import Fault, FaultProxy

        proxy = stack.enter_context(FaultProxy.start(upstream, **more))
        proxy.add(Fault("delay", seconds=self.delay_seconds, times=None))
        if paced:
            proxy.add(Fault("slow", bytes_per_second=self.bytes_per_second, times=None))
        return proxy


def plain_environment() -> dict[str, str]:
    """This process's, without what would lead a client elsewhere."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "AWS_", "RAYMERGE_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def s3_environment(stack: ExitStack, s3: S3Server, network: Network) -> dict[str, str]:
    endpoint = network.before(stack, s3.endpoint).endpoint if network.delay_seconds else s3.endpoint
    return {**plain_environment(), **s3.environment(endpoint=endpoint)}


def hub_environment(stack: ExitStack, hub: HubServer, network: Network) -> dict[str, str]:
    """Metadata come late; what redirects lead to comes late and slowly."""
    environment = {**plain_environment(), **hub.environment()}
    if network.delay_seconds:
        cdn = network.before(stack, hub.cdn_endpoint)
        api = network.before(stack, hub.endpoint, paced=False, rewrite={hub.cdn_endpoint: cdn.endpoint})
        environment["HF_ENDPOINT"] = api.endpoint
    return environment


def start_s3(stack: ExitStack, folder: Path) -> S3Server:
    """A bucket whose data lie in our folder. Deleted objects stay on its disk: each use of many bytes gets its own."""
    from tests.counterparts.s3 import S3Server

    return stack.enter_context(S3Server.start(folder, (BUCKET,)))


def start_hub(stack: ExitStack, folder: Path) -> HubServer:
    from tests.counterparts.hub import HubServer

    return stack.enter_context(HubServer.start(folder))


def compare_reads(folder: Path, networks: Sequence[Network], *, size: int, rounds: int) -> Iterator[Report]:
    """One report a place and a network."""
    path, told = folder / "read" / FILE, folder / "wanted.json"
    path.parent.mkdir()
    tensors = max(20, round(size / TENSOR_BYTES))
    wanted = make_file(path, size, tensors)
    told.write_text(json.dumps(wanted))
    wanted_bytes = sum(end - start for start, end, _ in wanted)
    for place in PLACES:
        with ExitStack() as stack:
            if place == "s3":
                s3 = start_s3(stack, folder / "servers")
                run_step(step_command("--send", path.parent, "read"), s3_plain(s3), folder / "send.log")
            else:
                hub = start_hub(stack, folder / "servers")
                hub.create(f"{ORG}/read", path.parent)
                path.unlink()
            for network in networks:
                if place == "s3":
                    environment = s3_environment(stack, s3, network)
                else:
                    environment = hub_environment(stack, hub, network)
                found = read_rounds(place, told, {**environment, "TMPDIR": str(folder)}, rounds=rounds)
                title = f"{len(wanted)} of {tensors} tensors, {wanted_bytes / MB:.0f} of {size / MB:.0f} MB"
                yield Report(f"Reads from {_name(place)}, {network.name}: {title}", place, network, found, wanted_bytes)
        shutil.rmtree(folder / "servers")


def s3_plain(s3: S3Server) -> dict[str, str]:
    """What a step needs to reach the server itself."""
    return {**plain_environment(), **s3.environment()}


def compare_merges(folder: Path, networks: Sequence[Network], *, layers: int, rounds: int) -> Iterator[Report]:
    """One report a place and a network, each with servers of its own."""
    sources, log = folder / "sources", folder / "log"
    sources.mkdir()
    maker = [sys.executable, str(Path(__file__).with_name("bench_mergekit.py"))]
    run_step([*maker, "--make", str(sources), "--layers", str(layers)], plain_environment(), log)
    local = merge_command(folder / "merge.json", {name: str(sources / name) for name in MODELS}, str(folder / "first"))
    run_step(local, {**plain_environment(), "XDG_STATE_HOME": str(folder / "state")}, log)  # fills numba's cache, too
    expected, size = _file_sha256(folder / "first" / FILE), (sources / "base" / FILE).stat().st_size
    shutil.rmtree(folder / "first")
    for place, network in itertools.product(PLACES, networks):
        with ExitStack() as stack:
            s3: S3Server | None = None
            if place == "s3":
                s3 = start_s3(stack, folder / "servers")
                run_step(step_command("--send", sources, "merge"), s3_plain(s3), log)
                environment = s3_environment(stack, s3, network)
            else:
                hub = start_hub(stack, folder / "servers")
                for name in MODELS:
                    hub.create(f"{ORG}/{name}", sources / name)
                environment = hub_environment(stack, hub, network)
            found = merge_rounds(place, folder, environment, expected, s3, rounds=rounds)
        shutil.rmtree(folder / "servers")
        way = "S3 to S3" if place == "s3" else "Hub to disk"
        title = f"Merges, {way}, {network.name}: ties, base and three models of {size / MB:.0f} MB"
        yield Report(title, place, network, found, 0)


def _name(place: Place) -> str:
    return {"s3": "S3", "hub": "the Hub"}[place]


# ---- the tables ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report:
    """One table."""

    title: str
    place: Place
    network: Network
    rows: Sequence[Row]
    wanted_bytes: int
    """Of a read; 0 for a merge."""

    @property
    def by_name(self) -> dict[str, Row]:
        return {row.name: row for row in self.rows}

    def targets(self) -> list[Target]:
        """What is asked of this table."""
        rows, at = self.by_name, f"{_name(self.place)}, {self.network.name}"
        if not self.wanted_bytes:
            ratio = rows[DOWNLOADED].best / rows[STREAMED].best
            return [Target(f"streamed merge beside download, merge, upload ({at})", ratio, MERGE_TARGET)]
        if self.place == "s3":
            peer = min(row.best for name, row in rows.items() if name.startswith(CAT_RANGES))
            return [Target(f"reads beside s3fs cat_ranges ({at})", peer / rows[OURS].best, CAT_RANGES_TARGET)]
        if self.network.delay_seconds:
            peer = min(rows[HUB_SEEK].best, rows[HUB_CAT].best)
            return [Target(f"reads beside HfFileSystem ({at})", peer / rows[OURS].best, HUB_FILES_TARGET)]
        return []

    def __str__(self) -> str:
        ours = self.rows[0].best
        lines = [self.title]
        if self.wanted_bytes:
            lines.append(f"  {'':28} best s  median s    MB/s  CPU s/GB   their best / ours")
            lines += [
                f"  {row.name:28} {row.best:6.2f}  {row.median(lambda c: c.wall):8.2f}"
                f"  {self.wanted_bytes / MB / row.best:6.0f}"
                f"  {row.median(lambda c: c.cpu) / self.wanted_bytes * 1e9:8.2f}   {row.best / ours:.2f}"
                for row in self.rows
            ]
            return "\n".join(lines)
        lines.append(f"  {'':28} best s  median s   CPU s  peak MB  disk MB   their best / ours")
        lines += [
            f"  {row.name:28} {row.best:6.2f}  {row.median(lambda c: c.wall):8.2f}  {row.median(lambda c: c.cpu):6.2f}"
            f"  {row.median(lambda c: c.peak_mb):7.0f}  {row.median(lambda c: c.disk_mb):7.0f}   {row.best / ours:.2f}"
            for row in self.rows
        ]
        return "\n".join(lines)

    def figures(self) -> dict[str, Any]:
        return {
            "title": self.title, "wanted_bytes": self.wanted_bytes, "network": asdict(self.network),
            "rows": {row.name: [asdict(cost) for cost in row.costs] for row in self.rows},
        }  # fmt: skip


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _load() -> str:
    return f"load {' '.join(f'{x:.1f}' for x in os.getloadavg())}, {os.cpu_count()} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size-mb", type=int, default=1000, help="of the file that is read in part")
    parser.add_argument("--layers", type=int, default=30, help="of the models that are merged; 30 make 269 MB each")
    parser.add_argument("--delay-ms", type=float, default=40.0)
    parser.add_argument("--rate-mb", type=float, default=40.0, help="MB/s of a connection")
    parser.add_argument("--quick", action="store_true", help="small files, one round: a look, no measurement")
    parser.add_argument("--only", choices=["reads", "merges"])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--reader", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--fetch", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--send", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reader:
        place, name, told = arguments.reader
        return serve_reader(cast("Place", place), name, Path(told))
    if arguments.fetch:
        fetch_models(arguments.fetch[0], Path(arguments.fetch[1]))
        return 0
    if arguments.send:
        send_folder(Path(arguments.send[0]), arguments.send[1])
        return 0
    sys.path.insert(0, str(ROOT))  # the servers of the tests
    size, layers, rounds = arguments.size_mb * MB, arguments.layers, arguments.rounds
    if arguments.quick:
        size, layers, rounds = min(size, 64 * MB), min(layers, 2), 1
    far = f"{arguments.delay_ms:.0f} ms to the first byte, {arguments.rate_mb:.0f} MB/s a connection"
    networks = (Network("no latency"), Network(far, arguments.delay_ms / 1000, arguments.rate_mb * MB))
    reports: list[Report] = []
    print(_load(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "merges":
            for report in compare_reads(Path(folder), networks, size=size, rounds=rounds):
                reports.append(report)
                print(f"\n{report}", flush=True)
        if arguments.only != "reads":
            for report in compare_merges(Path(folder), networks, layers=layers, rounds=rounds):
                reports.append(report)
                print(f"\n{report}", flush=True)
    targets = [target for report in reports for target in report.targets()]
    print(f"\n{_load()}\nTargets (times faster, by the best round of each)")
    print("\n".join(f"  {target}" for target in targets))
    if arguments.json:
        arguments.json.write_text(json.dumps([report.figures() for report in reports], indent=1) + "\n")
    return int(not all(target.met for target in targets))


if __name__ == "__main__":
    sys.exit(main())
