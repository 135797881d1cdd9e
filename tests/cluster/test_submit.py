"""A job is submitted once, followed to its true end, and carries no secret."""

from __future__ import annotations

import io
import json
import shlex
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.jobs_api import JobServer, server_address
from cluster.submit import JobSpec, check_shipment, follow, own_code, recall, submit
from jobs.cli import main
from jobs.guard import HOME
from merger import api
from merger.errors import InfrastructureError, ManifestError, PlanError
from merger.report import versions
from tests.conformance.bulks import bulk_sources, each
from tests.conformance.folders import adapter, manifest
from tests.counterparts.jobs import FakeJobs, job_server

DIGEST = "0123456789abcdef" * 4
SPEC = JobSpec(digest=DIGEST, manifest={"adapters": [{"adapter": "o/a"}]}, outputs=("s3://bucket/out",))
FIRST = "raymerge-0123456789ab-a1"


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret-token")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret-value")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


@pytest.fixture
def server() -> Iterator[FakeJobs]:
    with job_server() as found:
        yield found


# ---- which job -------------------------------------------------------------------------------------------------------


def test_the_same_work_meets_the_job_that_does_it(server: FakeJobs) -> None:
    client = JobServer(server.address)
    assert submit(client, SPEC) == (FIRST, "submitted")
    assert submit(client, SPEC) == (FIRST, "under way")
    server.jobs[FIRST]["status"] = "FAILED"
    assert submit(client, SPEC)[0].endswith("-a2")
    server.jobs[FIRST.replace("a1", "a2")]["status"] = "STOPPED"
    assert submit(client, SPEC)[0].endswith("-a3")
    server.jobs[FIRST.replace("a1", "a3")]["status"] = "SUCCEEDED"
    concluded = JobSpec(digest=DIGEST, manifest=SPEC.manifest, conclusive=True)
    assert submit(client, concluded) == (FIRST.replace("a1", "a3"), "succeeded")
    assert submit(client, SPEC)[0].endswith("-a4")
    other = JobSpec(digest="f" * 64, manifest=SPEC.manifest)
    assert submit(client, other) == ("raymerge-ffffffffffff-a1", "submitted")


def test_attempts_are_counted_not_sorted_as_text(server: FakeJobs) -> None:
    for n in range(1, 12):
        server.add(f"raymerge-0123456789ab-a{n}", "FAILED")
    assert submit(JobServer(server.address), SPEC)[0].endswith("-a12")


def test_of_two_that_submit_at_once_one_follows_the_other(server: FakeJobs) -> None:
    server.after_list = lambda: None
    client = JobServer(server.address)
    client.check_token = lambda: setattr(server, "after_list", lambda: server.add(FIRST, "RUNNING"))  # type: ignore[method-assign]
    assert submit(client, SPEC) == (FIRST, "under way")


def test_a_cluster_without_an_agent_yet_is_asked_again(server: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.jobs_api.AGENT_PAUSE", 0.01)
    server.no_agent = 3
    assert submit(JobServer(server.address), SPEC) == (FIRST, "submitted")
    assert server.requests.count(("POST", "/api/jobs/")) == 4
    monkeypatch.setattr("cluster.jobs_api.AGENT_SECONDS", 0.05)
    server.jobs.clear()
    server.no_agent = -1
    with pytest.raises(InfrastructureError, match="does not answer") as caught:
        submit(JobServer(server.address), SPEC)
    assert "No available agent" in caught.value.problems[0].why
    assert not server.jobs


# ---- what travels ----------------------------------------------------------------------------------------------------


def test_no_secret_travels_and_the_manifest_does(server: FakeJobs) -> None:
    submit(JobServer(server.address), SPEC)
    asked = server.jobs[FIRST]["asked"]
    assert shlex.split(asked["entrypoint"]) == ["python", "-m", "jobs.merge", "manifest.json"]
    assert asked["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert asked["metadata"] == {
        "raymerge": versions()["raymerge"], "raymerge_code": "image", "raymerge_digest": DIGEST
    }  # fmt: skip
    ((name, package),) = server.packages.items()
    assert asked["runtime_env"]["working_dir"] == f"gcs://{name}"
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        assert archive.namelist() == ["manifest.json"]
        assert json.loads(archive.read("manifest.json")) == SPEC.manifest
        texts = [archive.read(n) for n in archive.namelist()]
    for secret in (b"hf_xxx", b"aws-secret-value", b"secret-token"):
        assert all(secret not in text for text in (*texts, json.dumps(asked).encode()))


def test_code_comes_along_where_asked_for_and_only_once(server: FakeJobs) -> None:
    client = JobServer(server.address)
    submit(client, JobSpec(digest=DIGEST, manifest="s3://bucket/m.yaml", code="working_dir"))
    submit(client, JobSpec(digest="f" * 64, manifest="s3://bucket/m.yaml", code="working_dir"))
    assert sum(command == "PUT" for command, _ in server.requests) == 1
    ((_, package),) = server.packages.items()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        names = set(archive.namelist())
    assert {"jobs/merge.py", "cluster/actors.py", "merger/api.py", "merger/py.typed"} <= names
    assert not any("__pycache__" in n or n.startswith(("tests", "jobs/demo", ".git")) for n in names)
    assert "s3://bucket/m.yaml" in server.jobs[FIRST]["asked"]["entrypoint"]


def test_shipped_code_knows_its_version_and_passes_the_name_guard(tmp_path: Path) -> None:
    import subprocess
    import sys

    for name, data in own_code().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "manifest.json").write_text('{"merges": [{"name": "x"}]}')
    told = {"metadata": {"raymerge": versions()["raymerge"], "raymerge_code": "working_dir"}}
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(told)}
    ended = subprocess.run(
        [sys.executable, "-m", "jobs.merge", "manifest.json"], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "version-skew" not in ended.stderr
    assert "an entry is either" in ended.stderr


def test_a_driver_of_another_version_refuses() -> None:
    def told(**metadata: str) -> dict[str, str]:
        return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": metadata})}

    here = versions()["raymerge"]
    assert check_shipment({}, HOME) == []
    assert check_shipment(told(), HOME) == []
    assert check_shipment(told(raymerge=here, raymerge_code="image"), HOME) == []
    assert [p.code for p in check_shipment(told(raymerge="9.9", raymerge_code="image"), HOME)] == ["version-skew"]
    skewed = check_shipment(told(raymerge=here, raymerge_code="working_dir"), Path("/elsewhere"))
    assert [p.code for p in skewed] == ["version-skew"]


# ---- addresses and tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address, code",
    [("ray://h:10001", "ray-client"), ("", "bad-arguments"), ("http://user:pw@h:1", "bad-arguments"),
     ("ftp://h", "bad-arguments")],
)  # fmt: skip
def test_what_is_no_job_server(address: str, code: str) -> None:
    with pytest.raises(ManifestError) as caught:
        server_address(address)
    assert caught.value.problems[0].code == code
    assert "pw" not in str(caught.value)


def test_plain_http_to_another_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="insecure"):
        JobServer("http://10.0.0.5:8265")
    JobServer("http://10.0.0.5:8265", insecure=True)
    JobServer("https://cluster.example")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://other.example/")
    monkeypatch.setenv("RAY_ADDRESS", "ignored:6379")
    assert JobServer(None).address == "https://other.example"
    assert JobServer("localhost:8265").address == "http://localhost:8265"


def test_a_cluster_without_a_token_is_refused(server: FakeJobs) -> None:
    server.token = ""
    with pytest.raises(PlanError, match="asks for no token"):
        submit(JobServer(server.address), SPEC)
    assert server.jobs == {}
    assert submit(JobServer(server.address, insecure=True), SPEC) == (FIRST, "submitted")


def test_a_wrong_token_and_none_are_told_apart(
    server: FakeJobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(PlanError, match="its token is another"):
        submit(JobServer(server.address), SPEC)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PlanError, match="there is none here"):
        submit(JobServer(server.address), SPEC)
    (tmp_path / "none").write_text("secret-token\n")
    assert submit(JobServer(server.address), SPEC)[1] == "submitted"


def test_a_server_that_is_not_there() -> None:
    with job_server() as gone:
        pass
    with pytest.raises(InfrastructureError, match="no-cluster"):
        JobServer(gone.address).jobs()


# ---- to the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state, driver, code",
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 1, 1), ("FAILED", 2, 2), ("STOPPED", None, 143),
     ("FAILED", None, 75), ("FAILED", 137, 75), ("FAILED", 75, 75)],
)  # fmt: skip
def test_a_follower_ends_as_the_driver_did(server: FakeJobs, state: str, driver: int | None, code: int) -> None:
    server.add(FIRST, "PENDING")
    server.script = [("RUNNING", "one\n", None), ("RUNNING", "one\ntwo\n", None), (state, "one\ntwo\nend\n", driver)]
    heard: list[str] = []
    job, found = follow(JobServer(server.address), FIRST, heard.append, seconds=0.0)
    assert (job.state, found) == (state, code)
    assert heard == ["one\n", "two\n", "end\n"]


def test_a_dropped_stream_and_a_silent_head_end_nothing(server: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.add(FIRST, "RUNNING")
    server.drops, server.drop_logs = 5, 2
    server.script = [("RUNNING", "one\n", None), ("RUNNING", "one\ntwo\n", None), ("FAILED", "one\ntwo\nend\n", 1)]
    heard: list[str] = []
    job, code = follow(JobServer(server.address), FIRST, heard.append, seconds=0.0)
    assert (job.state, code) == ("FAILED", 1)
    assert "".join(heard) == "one\ntwo\nend\n"


def test_a_job_that_a_new_head_does_not_know(server: FakeJobs) -> None:
    with pytest.raises(InfrastructureError, match="no-job"):
        follow(JobServer(server.address), FIRST, lambda _: None, seconds=0.0)


# ---- the commands ----------------------------------------------------------------------------------------------------


def call(capfd: Any, *arguments: str | Path) -> tuple[int, Any, str]:
    capfd.readouterr()
    code = main([*map(str, arguments), "--json"])
    out, err = capfd.readouterr()
    return code, json.loads(out) if out else None, err


def test_submit_plans_first_and_submits_what_is_not_done(server: FakeJobs, tmp_path: Path, capfd: Any) -> None:
    for seed in (1, 2):
        adapter(tmp_path / f"a{seed}", seed)
    document: dict[str, Any] = {"adapters": [{"adapter": str(tmp_path / "a1")}, {"adapter": str(tmp_path / "a2")}]}
    path, out = manifest(tmp_path / "m.yaml", document), tmp_path / "out"
    options = ("submit", path, "-o", out, "--address", server.address)
    code, told, _ = call(capfd, *options, "--workers", "3", "--memory", "1GB")
    assert (code, told["state"], told["outputs"]) == (0, "submitted", [str(out)])
    name = told["submission_id"]
    assert shlex.split(server.jobs[name]["asked"]["entrypoint"])[4:] == ["--workers", "3", "--memory", "1GB"]
    ((_, package),) = server.packages.items()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        shipped = json.loads(archive.read("manifest.json"))
    assert shipped["output"]["path"] == str(out)
    known = recall(name)
    assert known is not None
    assert known.outputs == (str(out),)

    # Its driver does the work; then there is nothing to submit.
    api.merge(shipped)
    server.jobs[name]["status"] = "FAILED"
    code, told, _ = call(capfd, *options)
    assert (code, told["state"], told["submission_id"]) == (0, "done", None)
    assert len(server.jobs) == 1

    # An input moves: other plan, other job.
    adapter(tmp_path / "a2", 9)
    code, told, _ = call(capfd, *options)
    assert told["submission_id"] not in (None, name)

    (tmp_path / "a1" / "adapter_model.safetensors").unlink()
    code, told, _ = call(capfd, *options)
    assert code == 2
    assert len(server.jobs) == 2


def test_a_bulk_is_submitted_written_out(server: FakeJobs, tmp_path: Path, capfd: Any) -> None:
    sources = bulk_sources(tmp_path)
    placed = {"workers": 3, "memory": "2GB", "device": "cpu"}
    path = manifest(tmp_path / "bulk.yaml", each(sources, max_active_merges=2, cluster=placed))
    server.script = [("SUCCEEDED", "table\n", 0)]
    code, told, err = call(capfd, "submit", path, "--address", server.address, "--follow", "--max-failures", "2")
    assert (code, told["state"], len(told["outputs"])) == (0, "SUCCEEDED", 4)
    assert "table\n" in err
    asked = server.jobs[told["submission_id"]]["asked"]
    assert asked["entrypoint"].endswith("--max-failures 2")
    ((_, package),) = server.packages.items()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        shipped = json.loads(archive.read("manifest.json"))
    assert [m["name"] for m in shipped["merges"]] == ["a0", "a1", "a2", "a3"]
    assert shipped["max_active_merges"] == 2
    assert {key: shipped["cluster"][key] for key in placed} == {"workers": 3, "memory": 2 * 10**9, "device": "cpu"}
    before = Path.cwd()
    assert main(["plan", json.dumps(shipped)]) == 0
    assert Path.cwd() == before


def test_status_logs_and_stop_of_a_submission(server: FakeJobs, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    adapter(tmp_path / "a", 1)
    spec = JobSpec(digest=DIGEST, manifest={"adapters": [{"adapter": str(tmp_path / "a")}]}, outputs=(str(out),))
    submit(JobServer(server.address), spec)
    server.jobs[FIRST]["logs"] = "a line\n"
    code, told, _ = call(capfd, "status", FIRST)
    assert (code, told["job"]["state"], told["outputs"][0]["state"]) == (0, "PENDING", "absent")
    assert main(["logs", FIRST]) == 0
    assert capfd.readouterr().out == "a line\n"
    code, told, _ = call(capfd, "stop", FIRST)
    assert (code, told["asked"], server.jobs[FIRST]["status"]) == (0, True, "STOPPED")
    code, told, _ = call(capfd, "status", "raymerge-" + "e" * 12 + "-a1")
    assert code == 2


def test_status_and_logs_when_the_cluster_is_gone(tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    adapter(tmp_path / "a", 1)
    document = {"adapters": [{"adapter": str(tmp_path / "a")}]}
    with job_server() as gone:
        submit(JobServer(gone.address), JobSpec(digest=DIGEST, manifest=document, outputs=(str(out),)))
    api.merge(document, out)
    code, told, _ = call(capfd, "status", FIRST)
    assert (code, told["job"]["state"], told["outputs"][0]["state"]) == (0, "UNREACHED", "finished")
    assert main(["logs", FIRST]) == 0
    assert "all units are done" in capfd.readouterr().out
    code, told, _ = call(capfd, "stop", FIRST)
    assert (code, told["asked"]) == (0, False)
