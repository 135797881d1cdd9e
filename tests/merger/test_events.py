"""Events: said to a log and beside the output, bounded, and without a secret."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from merger import api
from merger.errors import MergeFailedError, SourceError
from merger.events import FIRST, LAST, TEXT_LIMIT, Event, EventLog, say, scrubbed, shown
from merger.run_files import EVENTS_FILE, read_events, read_log, read_status
from tests.conformance.folders import manifest, model

SECRETS = {
    "a signed URL": "GET https://b.s3.amazonaws.com/key?X-Amz-Credential=AKIAIOSFODNN7EXAMPLE&X-Amz-Signature=canary1",
    "an older one": "https://b.example.com/key?Signature=canary1&Expires=1",
    "a CDN's": "302 to https://cdn.example.com/a/b?Policy=canary1&Key-Pair-Id=canary1",
    "a header": "Authorization: Bearer canary1canary1",
    "a header as a dict": "{'Authorization': 'Bearer canary1canary1', 'x': 1}",
    "AWS's token": "x-amz-security-token: canary1/canary1==",
    "a password in a URL": "proxy http://user:canary1@proxy:3128 refused",
    "named": "secret_access_key=canary1",
    "JSON": '{"aws_session_token": "canary1"}',
    "the Hub's": "401 for hf_canary1canary1canary1",
}


@pytest.mark.parametrize("text", SECRETS.values(), ids=SECRETS.keys())
def test_secrets_are_hidden(text: str) -> None:
    for found in (scrubbed(text), str(shown(text)), json.dumps(Event("x", text, {"why": text}).as_json())):
        assert "canary1" not in found
        assert "[hidden]" in found


@pytest.mark.parametrize(
    "text",
    [
        "model.layers.3.self_attn.q_proj.weight, rows 0 to 64", "process 12 on 10.0.0.1: SIGKILL", "why? because a=b",
        "tokenizer.json: no such file", "s3://bucket/prefix/model-00001-of-00002.safetensors", "added_tokens.json",
        "hf://org/name@main", "the token of a special kind",
    ],
)  # fmt: skip
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert scrubbed(text) == text


def test_the_values_of_credentials_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary+value/of+a+key")
    assert "canary" not in scrubbed("it said: canary+value/of+a+key is wrong")


def test_texts_are_escaped_and_bounded() -> None:
    assert shown("a\x1b[31m\u202eb") == "a\\x1b[31m\\u202eb"
    assert shown("one\ntwo\n\tthree") == "one two three"
    assert len(str(shown("x" * 10_000))) == TEXT_LIMIT + 1
    assert shown(3) == 3


def test_a_log_keeps_the_first_and_the_last_and_all_numbers() -> None:
    log = EventLog()
    count = FIRST + LAST + 57
    for number in range(count):
        log.add(Event("unit-again" if number % 2 else "worker-lost", f"number {number}", {"number": number}))
    lines = [json.loads(line) for line in log.lines()]
    assert len(lines) == FIRST + LAST + 1
    assert [line["number"] for line in lines[:FIRST]] == list(range(FIRST))
    assert lines[FIRST] == {"event": "left-out", "count": 57}
    assert [line["number"] for line in lines[FIRST + 1 :]] == list(range(count - LAST, count))
    assert log.counts.total() == count


def test_events_reach_the_log_with_their_facts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("raymerge.run"), "handle", records.append)
    with caplog.at_level(logging.INFO, logger="raymerge.run"):
        say(Event("worker-lost", "worker 3 is lost", {"worker": 3}, warning=True))
        say(Event("worker-ready", "worker 4 is ready", {"worker": 4}))
    first, second = records
    assert (first.levelname, first.getMessage()) == ("WARNING", "worker 3 is lost")
    assert first.__dict__["raymerge"] == {"event": "worker-lost", "worker": 3}
    assert second.levelname == "INFO"


@pytest.fixture
def merge(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "m1")):
        model(tmp_path / name, seed, layers=2)
    sources: list[dict[str, Any]] = [{"model": str(tmp_path / "m1"), "parameters": {"weight": 1.0}}]
    document = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": sources}
    return manifest(tmp_path / "merge.yaml", document)


def test_a_finished_merge_keeps_their_numbers(merge: Path, tmp_path: Path) -> None:
    api.merge(merge, tmp_path / "out", workers=1)
    found = json.loads((tmp_path / "out" / "raymerge-report.json").read_text())
    assert found["events"] == {"run-begun": 1, "stage-done": 1, "units-done": 1}
    assert any("units in 1 stages for 1 workers" in line for line in found["log"])
    assert not (tmp_path / "out" / ".raymerge").exists()
    with pytest.raises(SourceError) as caught:
        read_events(str(tmp_path / "out"))
    assert caught.value.problems[0].code == "no-events"


def test_an_unfinished_one_keeps_them_beside_its_output(merge: Path, tmp_path: Path) -> None:
    def fail(progress: Any) -> None:
        if progress.units_done:
            raise MergeFailedError.of("odd", "it broke with token=canary1")

    with pytest.raises(MergeFailedError):
        api.merge(merge, tmp_path / "out", workers=1, listener=fail)
    out = str(tmp_path / "out")
    first, *_ = read_events(out)
    assert first["event"] == "run-begun"
    assert first["workers"] == 1
    assert len(first["run"]) == 12
    status = read_status(out)
    assert status["state"] == "failed"
    assert status["events"]["run-begun"] == 1
    assert "canary1" not in read_log(out)
    assert (tmp_path / "out" / EVENTS_FILE).is_file()
    report = api.merge(merge, tmp_path / "out", workers=1)  # and it resumes
    assert report.units_resumed
    kept = json.loads((tmp_path / "out" / "raymerge-report.json").read_text())
    assert kept["events"]["resumed"] == 1
