"""The log on standard error: plain lines, or nothing but JSON documents."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import logs, show
from jobs.cli import main
from merger import api
from merger.errors import ManifestError, MergeFailedError, Problem
from tests.conformance.folders import manifest, model


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    logger = logging.getLogger(logs.LOGGER)
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def documents(text: str) -> list[dict[str, Any]]:
    """Every line of a structured log. Raises where one is something else."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def merge(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "m1")):
        model(tmp_path / name, seed, layers=2)
    sources: list[dict[str, Any]] = [{"model": str(tmp_path / "m1"), "parameters": {"weight": 1.0}}]
    document = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": sources}
    return manifest(tmp_path / "merge.yaml", document)


def test_a_merge_in_json(merge: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["merge", str(merge), str(tmp_path / "out"), "--on", "here", "--log-format", "json", "--json"]
    assert main(line) == 0
    out, err = capfd.readouterr()
    json.loads(out)  # one document there
    found = documents(err)
    assert [each["event"] for each in found if "event" in each] == [
        "run-begun",
        "stage-done",
        "units-done",
        "published",
    ]
    assert all({"time", "level", "logger", "text"} <= set(each) for each in found)
    assert {each["logger"] for each in found} <= {"raymerge.run", "raymerge.command"}
    assert len({each["run"] for each in found if each["logger"] == "raymerge.run"}) == 1


def test_what_is_refused_in_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path / "none.yaml"), "--log-format", "json"]) == 2
    [found] = documents(capfd.readouterr().err)
    assert found["level"] == "error"
    assert found["code"]
    assert found["where"]
    assert found["fix"]


def test_the_environment_says_it_too(
    merge: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(logs.VARIABLE, "json")
    assert main(["merge", str(merge), str(tmp_path / "out"), "--on", "here"]) == 0
    assert documents(capfd.readouterr().err)
    assert main(["merge", str(merge), str(tmp_path / "out"), "--on", "here", "--log-format", "plain"]) == 0
    assert "{" not in capfd.readouterr().err


def test_another_format_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bulk", "x.yaml", "--log-format", "yaml"]) == 2
    assert "'yaml' is no format of logs" in capfd.readouterr().err


def test_plain_lines_are_warnings_and_worse(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("plain")
    logging.getLogger("raymerge.run").info("a unit is done")
    logging.getLogger("raymerge.run").warning("worker 3 is lost\x1b[2J: token=sesame")
    assert capfd.readouterr().err == "warning worker 3 is lost\\x1b[2J: token=[hidden]\n"


def test_records_carry_facts_and_no_secret(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    facts = {"run": "ab12", "unit": 7, "tensor": "a\u202eb", "url": "https://h/k?X-Amz-Signature=canary"}
    logging.getLogger("raymerge.run").warning("unit %s", 7, extra={"raymerge": facts})
    try:
        raise ValueError("https://h/k?X-Amz-Signature=canary")
    except ValueError:
        logging.getLogger("raymerge.run").exception("it broke")
    show.warn(Problem("code", "what", "https://u:canary@h/k", "why", "fix"))
    text = capfd.readouterr().err
    first, second, third = documents(text)
    assert (first["run"], first["unit"], first["tensor"]) == ("ab12", 7, "a\\u202eb")
    assert "ValueError" in second["exception"]
    assert third["where"] == "https://[hidden]@h/k"
    assert "canary" not in text


def test_a_timeline_of_the_command(merge: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "timeline.json"
    line = ["merge", str(merge), str(tmp_path / "out"), "--on", "here", "--timeline", str(file)]
    assert main(line) == 0
    assert json.loads(file.read_text())["traceEvents"]
    capfd.readouterr()
    assert main([*line[:-1], str(tmp_path / "none" / "t.json")]) == 2
    assert "no timeline can be written there" in capfd.readouterr().err


def test_a_format_is_checked_where_it_is_set() -> None:
    with pytest.raises(ManifestError):
        logs.configure("xml")


def test_events_of_an_unfinished_run_are_shown_from_its_own_files(
    merge: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(progress: Any) -> None:
        if progress.units_done:
            raise MergeFailedError.of("odd", "it broke")

    out = str(tmp_path / "out")
    with pytest.raises(MergeFailedError):
        api.merge(merge, out, workers=1, listener=fail)
    assert main(["logs", out, "--events", "--json"]) == 0
    first, *_ = json.loads(capfd.readouterr().out)
    assert (first["event"], first["output"], first["workers"]) == ("run-begun", out, 1)
    assert main(["logs", out, "--events"]) == 0
    assert "run-begun  3 units in 1 stages for 1 workers" in capfd.readouterr().out
    assert main(["status", out, "--json"]) == 0
    [status] = json.loads(capfd.readouterr().out)["outputs"]
    assert status["events"]["run-begun"] == 1
    assert main(["logs", out, "--json"]) == 2
    assert main(["merge", str(merge), out, "--on", "here"]) == 0
    capfd.readouterr()
    assert main(["logs", out, "--events"]) == 2  # finished: its report has their numbers
    assert main(["report", out]) == 0
    assert "events  resumed 1, run-begun 1, " in capfd.readouterr().out


def test_a_size_of_gpu_memory_is_checked(merge: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(merge), "--device-memory", "much", "--on", "here"]) == 2
    assert "--device-memory" in capfd.readouterr().err
