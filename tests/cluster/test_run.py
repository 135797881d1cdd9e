"""A plan on a real Ray: what dies, what is refused, what passes through the driver."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.exceptions import RayActorError

from cluster import actors
from cluster.actors import PIECE_BYTES, MergeWorker, Mission, surroundings
from cluster.capacity import lacking, needs
from cluster.connect import AUTH_MODE, TOKEN, TOKEN_FILE, connection, has_token, quiet, set_authentication
from cluster.run import _Pool, run_on_ray
from cluster.schedule import MAX_LOSSES
from merger import api
from merger.errors import InfrastructureError, ManifestError, MergeFailedError, PlanError, StoppedError
from merger.events import Event
from merger.planning.devices import device_of
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan, Place
from merger.run import Stop
from merger.storage import LocalStore
from merger.storage.base import Sink
from merger.watch import Watch
from tests.cluster.runs import check_finished, journaled, ties, wait_for
from tests.cluster.sinks import ElsewhereStore, NarrowSink, PoisonSink, elsewhere, filled
from tests.conformance.folders import content_digest, ended, manifest, model, names, start

pytestmark = pytest.mark.ray

MB = 10**6


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    """Three CPUs, and two GPUs that are none."""
    ray.init(
        address="local", num_cpus=3, num_gpus=2, include_dashboard=False, log_to_driver=False,
        configure_logging=False, object_store_memory=100 << 20, namespace="raymerge",
    )  # fmt: skip
    with quiet():
        yield
    ray.shutdown()


@pytest.fixture(scope="module")
def motley(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with magnitudes of all sizes, of which there is much to say."""
    folder = tmp_path_factory.mktemp("motley")
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "m1", "m2"):
        size = torch.exp2(200 * torch.rand(600, 1000, generator=generator) - 100)
        model(folder / name, 0, tensors={"model.norm.weight": size * torch.randn(600, 1000, generator=generator)})
    manifest(folder / "merge.yaml", ties(folder))
    api.merge(folder / "merge.yaml", folder / "whole")
    return folder


def on_ray(
    folder: Path, out: Path, *, workers: int = 2, sink: Callable[[Sequence[Sink]], Sink] | None = None,
    change: Callable[[MergePlan], MergePlan] = lambda plan: plan, **options: Any,
) -> Any:  # fmt: skip
    """Merge on actors, into the sink that `sink` makes of the right one, by the plan that `change` makes of it."""

    def runner(plan: MergePlan, progression: Any, sinks: Sequence[Sink], recorder: Any, **more: Any) -> None:
        run_on_ray(change(plan), progression, sinks if sink is None else [sink(sinks)], recorder, **more)

    return api.run_planned(api.plan(folder / "merge.yaml", out), workers=workers, runner=runner, **options)


def worker_processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if any("MergeWorker" in part for part in child.cmdline()[:1]):
                found.append(child)
        except psutil.Error:
            continue
    return found


# ---- deaths ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("private_ray")
def test_kill_9_of_a_worker_midway(large: Path, tmp_path: Path) -> None:
    """What it had in hand is put back, another actor takes its place, and the bytes are the same."""
    killed: list[int] = []

    def listen(progress: Any) -> None:
        if not killed and 0 < progress.units_done < progress.units:
            for process in worker_processes()[:1]:
                process.kill()
                killed.append(process.pid)

    report = on_ray(large, tmp_path / "out", listener=listen)
    assert killed
    assert report.content_digest == content_digest(large / "whole")
    assert not (tmp_path / "out" / ".raymerge").exists()


def place_of(plan: MergePlan, name: str) -> Place:
    [place] = [p for task in plan.tasks if task.name == name for result in task.results for p in result.places]
    return place


@pytest.mark.usefixtures("private_ray")
def test_a_unit_that_kills_its_workers_is_named_and_nobody_else_is(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    place = place_of(api.plan(small / "merge.yaml", tmp_path / "out"), name)
    log = tmp_path / "deaths"

    def poison(sinks: Sequence[Sink]) -> Sink:
        sink = filled(sinks)
        return PoisonSink(sink.store, sink._files, sink._published, file=place.file, byte=place.start + 7, log=str(log))

    with pytest.raises(MergeFailedError) as caught:
        on_ray(small, tmp_path / "out", sink=poison)
    (problem,) = caught.value.problems
    assert problem.code == "poison-unit"
    assert problem.where.startswith(f"{name}, rows 0 to ")
    deaths = log.read_text().split()
    assert len(deaths) == len(set(deaths)) <= MAX_LOSSES + 1  # in company at most once
    assert "SIGKILL" in problem.why or "exit" in problem.why, problem.why
    assert capfd.readouterr().out == ""  # what befell them is no business of standard output
    assert names(tmp_path / "out") == set()
    report = api.merge(small / "merge.yaml", tmp_path / "out")
    assert report.units_resumed > 0
    check_finished(tmp_path / "out", small / "whole")


@pytest.mark.usefixtures("private_ray")
def test_a_stop_keeps_what_is_done(large: Path, tmp_path: Path) -> None:
    """And what actors began, this process may end."""
    stop = Stop()

    def listen(progress: Any) -> None:
        if progress.units_done:
            stop.set(signal.SIGTERM)

    with pytest.raises(StoppedError) as caught:
        on_ray(large, tmp_path / "out", workers=1, listener=listen, stop=stop)
    assert caught.value.signal_number == signal.SIGTERM
    assert names(tmp_path / "out") == set()
    report = api.merge(large / "merge.yaml", tmp_path / "out")
    assert report.units_resumed > 0
    assert report.content_digest == content_digest(large / "whole")


@pytest.mark.slow
def test_kill_9_of_a_driver_with_its_ray(large: Path, tmp_path: Path) -> None:
    """The same command ends what is left."""
    out = tmp_path / "out"
    line = ("merge", large / "merge.yaml", out, "--on", "ray", "--workers", "2")
    run = start(*line)
    wait_for(lambda: journaled(out), 120)
    run.kill()
    assert ended(run).code in (137, 0)
    assert names(out) == set() or (out / "raymerge.json").exists()
    done = ended(start(*line, "--json"))
    assert done.code == 0, done.err
    assert done.document["units_resumed"] > 0
    assert content_digest(out) == content_digest(large / "whole")


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("private_ray")
def test_a_unit_that_finds_no_memory_is_done_in_smaller_blocks(large: Path, tmp_path: Path) -> None:
    def narrow(sinks: Sequence[Sink]) -> Sink:
        sink = filled(sinks)
        return NarrowSink(sink.store, sink._files, sink._published, limit=2 * MB)

    whole_tensor = 2500 * 2048 * 2
    assert whole_tensor > 2 * MB
    on_ray(large, tmp_path / "out", sink=narrow, memory=800 * MB)
    check_finished(tmp_path / "out", large / "whole")


@pytest.mark.usefixtures("private_ray")
def test_memory_that_runs_out_with_the_smallest_blocks_is_worth_a_retry(small: Path, tmp_path: Path) -> None:
    def closed(sinks: Sequence[Sink]) -> Sink:
        sink = filled(sinks)
        return NarrowSink(sink.store, sink._files, sink._published, limit=0)

    with pytest.raises(InfrastructureError) as caught:
        on_ray(small, tmp_path / "out", sink=closed, workers=1)
    assert caught.value.problems[0].code == "out-of-memory"
    assert "model." in caught.value.problems[0].where


OOM = """
import sys
from pathlib import Path
from tests.cluster.sinks import NarrowSink, filled
from tests.cluster.test_run import on_ray
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
         object_store_memory=100 << 20)
from cluster import run
losses = []
made = run.Lost
def lost(worker, kind, *more):
    losses.append(kind)
    return made(worker, kind, *more)
run.Lost = lost
def greedy(sinks):
    sink = filled(sinks)
    return NarrowSink(sink.store, sink._files, sink._published, limit=10**6, hog=6 << 30)
on_ray(Path(sys.argv[1]), Path(sys.argv[2]), sink=greedy, memory=40 * 10**6, workers=1)
assert "out-of-memory" in losses, losses
assert set(losses) == {"out-of-memory"}, losses
"""


@pytest.mark.slow
def test_a_worker_that_ray_kills_for_memory_comes_back_with_less(motley: Path, tmp_path: Path) -> None:
    """Ray's memory monitor, told to act early, so that nobody else is in danger."""
    memory = psutil.virtual_memory()
    used = (memory.total - memory.available + (4 << 30)) / memory.total
    if used > 0.9:
        pytest.skip("too little memory is free to play with")
    environment = {
        **os.environ, "RAY_memory_usage_threshold": f"{used:.3f}", "RAY_memory_monitor_refresh_ms": "100",
        "RAY_AUTH_MODE": "disabled",
    }  # fmt: skip
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", OOM, motley, tmp_path / "out"], cwd=root, env=environment, text=True,
        capture_output=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_finished(tmp_path / "out", motley / "whole")


# ---- what passes through the driver ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("private_ray")
def test_nothing_goes_through_the_object_store(motley: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan, and the statistics of a model, are more than Ray sends inside its messages: they go in pieces."""
    messages: dict[str, list[list[int]]] = {"out": [], "in": []}

    def packed(message: object) -> list[bytes]:
        pieces = actors.pack(message)
        messages["out"].append([len(piece) for piece in pieces])
        return pieces

    def unpacked(pieces: Sequence[bytes]) -> Any:
        messages["in"].append([len(piece) for piece in pieces])
        return actors.unpack(pieces)

    monkeypatch.setattr("cluster.run.pack", packed)
    monkeypatch.setattr("cluster.run.unpack", unpacked)
    free: set[float] = set()

    def listen(progress: Any) -> None:
        free.add(ray.available_resources()["object_store_memory"])  # type: ignore[no-untyped-call] # ray's

    def padded(plan: MergePlan) -> MergePlan:
        return replace(plan, manifest={**plan.manifest, "padding": os.urandom(200_000)})

    on_ray(motley, tmp_path / "out", listener=listen, change=padded)
    assert free == {float(100 << 20)}
    for found in messages.values():
        assert max(len(pieces) for pieces in found) > 1
        assert max(size for pieces in found for size in pieces) <= PIECE_BYTES < 100 << 10
    assert content_digest(tmp_path / "out") == content_digest(motley / "whole")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("private_ray")
def test_a_worker_of_another_version_is_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.run.surroundings", lambda: {**surroundings(), "numpy": "1.0"})
    with pytest.raises(InfrastructureError) as caught:
        on_ray(small, tmp_path / "out", workers=1)
    (problem,) = caught.value.problems
    assert problem.code == "version-skew"
    assert "numpy" in problem.what
    assert "torch" not in problem.what


@pytest.mark.usefixtures("private_ray")
def test_an_output_folder_that_is_not_shared_is_refused(small: Path, tmp_path: Path) -> None:
    """There is one of the same name on the worker's side, with files of an earlier try in it."""
    out = tmp_path / "out"
    other = tmp_path / "out-elsewhere" / ".raymerge"
    other.mkdir(parents=True)
    (other / "plan.json").write_text("{}")
    with pytest.raises(PlanError) as caught:
        on_ray(small, out, workers=1, sink=elsewhere)
    (problem,) = caught.value.problems
    assert problem.code == "not-shared"
    assert str(out) in problem.what
    assert "node" in problem.where
    assert not list((out / ".raymerge").glob("probe-*"))


@pytest.mark.usefixtures("private_ray")
@pytest.mark.parametrize("there", [False, True])
def test_a_source_folder_that_is_not_shared_is_refused(small: Path, tmp_path: Path, *, there: bool) -> None:
    away = tmp_path / "m1"
    if there:
        away = tmp_path / "m1-elsewhere"
        away.mkdir()
        for file in (small / "m1").iterdir():
            (away / file.name).write_bytes(file.read_bytes())

    def change(plan: MergePlan) -> MergePlan:
        first, *others = plan.sources
        store = first.catalog.store
        assert isinstance(store, LocalStore)
        hidden = ElsewhereStore(str(tmp_path / "m1")) if there else ElsewhereStore(store.root)
        return replace(plan, sources=(replace(first, catalog=replace(first.catalog, store=hidden)), *others))

    def seen(plan: MergePlan) -> MergePlan:
        if there:
            (tmp_path / "m1").symlink_to(api.plan(small / "merge.yaml").sources[0].catalog.store.uri)
        return change(plan)

    with pytest.raises(PlanError) as caught:
        on_ray(small, tmp_path / "out", workers=1, change=seen)
    (problem,) = caught.value.problems
    assert problem.code == "not-shared"
    assert ("another file" if there else "is not there") in problem.why


# ---- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("private_ray")
def test_workers_that_find_no_place_do_not_hold_up_the_others(small: Path, tmp_path: Path) -> None:
    """Five one-CPU actors where three CPUs are: three start, and the merge is done by these; it says so."""
    events: list[Event] = []
    report = on_ray(small, tmp_path / "out", workers=5, watch=Watch().also(events.append))
    assert report.content_digest == content_digest(small / "whole")
    [said] = [event for event in events if event.kind == "capacity-partly"]
    assert said.text.startswith("the cluster has room for 3 of 5 workers of 1 CPU, ")
    assert said.warning


@pytest.mark.usefixtures("private_ray")
def test_a_cluster_without_room_is_named_at_the_deadline(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYMERGE_START_SECONDS", "1")
    monkeypatch.setattr("cluster.run.needs", lambda *_, **__: {"CPU": 1, "GPU": 16})
    with pytest.raises(InfrastructureError) as caught:
        on_ray(small, tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.code == "no-resources"
    assert problem.why == "no node has 16 GPU; the most is 2 GPU"


@pytest.mark.usefixtures("private_ray")
def test_a_cluster_that_never_has_room_is_named_at_once(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing scales this one, and nobody said that nodes would come: no actor is asked for."""
    monkeypatch.delenv("RAYMERGE_START_SECONDS", raising=False)
    monkeypatch.setattr("cluster.run.needs", lambda *_, **__: {"CPU": 1, "GPU": 16})
    monkeypatch.setattr("cluster.run._Pool.start", lambda *_: pytest.fail("an actor was asked for"))
    with pytest.raises(InfrastructureError) as caught:
        on_ray(small, tmp_path / "out")
    (problem,) = caught.value.problems
    assert problem.code == "no-resources"
    assert problem.what == "the cluster can never start a worker of this run"
    assert problem.where == "2 workers of 1 CPU, 16 GPU"
    assert problem.why == "no node has 16 GPU; the most is 2 GPU"
    assert "--gpus-per-worker" in problem.fix
    assert "RAYMERGE_START_SECONDS" in problem.fix


@pytest.mark.usefixtures("private_ray")
def test_two_workers_share_a_gpu(small: Path) -> None:
    """Placement alone: these GPUs are none."""
    plan = api.plan(small / "merge.yaml")
    nodes = [{"CPU": 8.0, "GPU": 2.0, "memory": 8e9}]
    wanted = needs(plan, nodes, share=10 * MB, workers=3, device="cuda", gpus_per_worker=0.5)
    pool = _Pool(Mission(plan, (), (), 1, 1, "cpu"), wanted)
    made: Any = ray.remote(MergeWorker)
    workers = [made.options(**pool.options(number)).remote() for number in range(3)]
    try:
        placed = ray.get([worker.hello.remote() for worker in workers], timeout=60)
    finally:
        for worker in workers:
            ray.kill(worker)
    gpus = [gpu for about in placed for gpu in about["gpus"]]
    assert len(gpus) == 3
    assert set(gpus) == {"0", "1"}
    with pytest.raises(RayActorError):
        ray.get(workers[0].hello.remote(), timeout=60)


@pytest.mark.usefixtures("private_ray")
def test_spectral_work_goes_to_workers_with_gpus_and_the_rest_to_others(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three workers, one has a GPU, which is none: on it, torch's device is the CPU. Ray places what we ask for."""
    document = {
        "merge_method": "tsv_m", "base_model": str(small / "base"),
        "models": [{"model": str(small / f"m{n}"), "parameters": {"weight": 1.0}} for n in (1, 2)],
    }  # fmt: skip
    monkeypatch.setattr("cluster.run.TORCH_DEVICES", {"cpu": "cpu", "cuda": "cpu"})
    handed: list[tuple[float, str, int]] = []
    hand, introduce = _Pool.hand, _Pool._introduce
    gpus: dict[int, list[str]] = {}

    def watch(self: _Pool, given: Any) -> None:
        kinds = {device_of(self._mission.plan, self._mission.plan.tasks[unit.task]) for unit in given.job.units}
        handed.extend((self._wanted.get("GPU", 0), kind, given.worker) for kind in kinds)
        hand(self, given)

    def ask(self: _Pool, actor: Any, number: int) -> Any:
        gpus[number] = ray.get(actor.hello.remote(), timeout=100)["gpus"]
        return introduce(self, actor, number)

    monkeypatch.setattr(_Pool, "hand", watch)
    monkeypatch.setattr(_Pool, "_introduce", ask)
    planned = api.plan(document, tmp_path / "out", device="cuda")
    report = api.run_planned(planned, workers=3, runner=functools.partial(run_on_ray, gpus_per_worker=0.5))
    assert {(share, kind) for share, kind, _ in handed} == {(0.5, "cuda"), (0, "cpu")}
    assert all(bool(gpus[worker]) == bool(share) for share, _, worker in handed)
    assert not {worker for share, _, worker in handed if share} & {worker for share, _, worker in handed if not share}
    plain = api.merge(document, tmp_path / "plain", workers=1)
    assert {e[3] for e in extents(tmp_path / "out")} == {e[3] for e in extents(tmp_path / "plain")}
    assert report.plan_digest != plain.plan_digest


def extents(out: Path) -> list[Any]:
    """What raymerge.json says of the bytes of the tensor files."""
    return [e for e in json.loads((out / "raymerge.json").read_text())["extents"] if e[0].endswith(".safetensors")]


@pytest.mark.usefixtures("private_ray")
def test_elementwise_work_asks_for_no_gpu(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    options = _Pool.options

    def note(self: _Pool, number: int) -> dict[str, Any]:
        asked.append(options(self, number))
        return asked[-1]

    monkeypatch.setattr(_Pool, "options", note)
    planned = api.plan(small / "merge.yaml", tmp_path / "out", device="cuda")
    api.run_planned(planned, workers=2, runner=run_on_ray)
    assert {each["num_gpus"] for each in asked} == {0}


def test_a_gpu_is_shared_by_powers_of_two(small: Path) -> None:
    plan = api.plan(small / "merge.yaml")
    for share in (0.3, 2.0, 0.0):
        with pytest.raises(ManifestError):
            needs(plan, [], share=MB, workers=1, device="cuda", gpus_per_worker=share)


def test_memory_lets_all_workers_find_a_place(small: Path) -> None:
    plan = api.plan(small / "merge.yaml")

    def memory(share: int, workers: int, *nodes: float) -> float:
        declared = [{"CPU": 64.0, "memory": size} for size in nodes]
        return needs(plan, declared, share=share, workers=workers, device="cpu", gpus_per_worker=1)["memory"]

    gib = float(1 << 30)
    assert gib < memory(1 << 30, 2, 64 * gib) < 2 * gib  # the share and an idle process
    assert memory(100 << 30, 4, 64 * gib) == 16 * gib
    assert memory(100 << 30, 4, 64 * gib, 64 * gib) == 32 * gib
    assert peak_bytes(plan) < memory(1, 1000, 64 * gib) < gib  # never less than it takes
    assert memory(1 << 30, 1, 0.25 * gib) == 0.25 * gib  # and never more than there is
    assert memory(1 << 60, 1, 2.0**60) < 9e14
    assert "memory" not in needs(plan, [{"CPU": 1.0}], share=1, workers=1, device="cpu", gpus_per_worker=1)


def test_what_a_cluster_lacks_is_said() -> None:
    nodes = [{"CPU": 4.0, "memory": 8e9}, {"CPU": 1.0, "GPU": 1.0, "memory": 1e9}]
    assert lacking(nodes, {"CPU": 1, "GPU": 1}) == ""
    assert lacking(nodes, {"CPU": 8}) == "no node has 8 CPU; the most is 4 CPU"
    assert lacking(nodes, {"CPU": 1, "memory": 1 << 40}).startswith("no node has 1")
    assert lacking(nodes, {"CPU": 4, "GPU": 1}) == "no node has all of 4 CPU, 1 GPU"
    assert lacking([], {"CPU": 1}) == "no node has 1 CPU; the most is 0 CPU"


# ---- clusters --------------------------------------------------------------------------------------------------------


def test_no_cluster_at_an_address(small: Path, tmp_path: Path) -> None:
    outcome = ended(
        start("merge", small / "merge.yaml", tmp_path / "out", "--on", "127.0.0.1:1", "--json"), timeout=240
    )
    assert outcome.code == 75, outcome.err
    assert outcome.document["problems"][0]["code"] == "no-cluster"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_on_a_private_ray(small: Path, tmp_path: Path) -> None:
    outcome = ended(start("merge", small / "merge.yaml", tmp_path / "out", "--on", "ray", "--workers", "1", "--json"))
    assert outcome.code == 0, outcome.err
    assert outcome.document["content_digest"] == content_digest(small / "whole")
    check_finished(tmp_path / "out", small / "whole")


@pytest.fixture
def no_authentication(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment that says nothing, and an empty home folder."""
    for name in (AUTH_MODE, TOKEN, TOKEN_FILE):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_private_ray_has_a_token_of_its_own(no_authentication: Path) -> None:
    set_authentication(private=True)
    assert os.environ[AUTH_MODE] == "token"
    assert len(os.environ[TOKEN]) == 64


def test_a_cluster_gets_a_token_where_there_is_one(no_authentication: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_authentication(private=False)
    assert os.environ.pop(AUTH_MODE) == "disabled"
    (no_authentication / ".ray").mkdir()
    (no_authentication / ".ray" / "auth_token").write_text("a" * 64)
    set_authentication(private=False)
    assert os.environ.pop(AUTH_MODE) == "token"
    assert TOKEN not in os.environ
    monkeypatch.setenv(TOKEN_FILE, "nowhere")
    assert not has_token()
    monkeypatch.setenv(TOKEN, "b" * 64)
    assert has_token()


@pytest.mark.parametrize("private", [True, False])
def test_what_the_environment_says_of_authentication_stays(
    no_authentication: Path, monkeypatch: pytest.MonkeyPatch, *, private: bool
) -> None:
    monkeypatch.setenv(AUTH_MODE, "disabled")
    set_authentication(private=private)
    assert os.environ[AUTH_MODE] == "disabled"
    assert TOKEN not in os.environ


ATTACH = """
import sys
from cluster.connect import connection
from merger.errors import RaymergeError
try:
    with connection(sys.argv[1], workers=1):
        print("connected")
except RaymergeError as error:
    print(type(error).__name__, error.problems[0].code)
"""


@pytest.mark.slow
def test_a_cluster_that_does_not_know_us_says_so(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    theirs = {**clean, AUTH_MODE: "token", TOKEN: "a" * 64}
    command = Path(sys.executable).with_name("ray")
    # Sockets lie in it, and their paths must be short.
    home = tempfile.TemporaryDirectory(prefix="rm", ignore_cleanup_errors=True)
    head = subprocess.Popen(
        [command, "start", "--head", "--block", "--port", str(port), "--num-cpus", "1", "--include-dashboard", "false",
         "--temp-dir", home.name, "--disable-usage-stats"],
        env=theirs, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def attach(environment: dict[str, str]) -> str:
        done = subprocess.run(
            [sys.executable, "-c", ATTACH, f"127.0.0.1:{port}"], cwd=Path(__file__).parents[2], text=True,
            env={**environment, "HOME": str(tmp_path)}, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        assert "aaaa" not in done.stdout + done.stderr
        return done.stdout.strip()

    try:
        wait_for(lambda: attach(theirs) == "connected")
        assert attach({**theirs, TOKEN: "b" * 64}) == "PlanError not-authenticated"
        assert attach(clean) == "PlanError not-authenticated"
    finally:
        head.terminate()
        head.wait(timeout=60)
        home.cleanup()


def test_a_connection_that_is_there_is_used(private_ray: None) -> None:
    before = ray.get_runtime_context().get_job_id()
    with connection("private", workers=1):
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()
