"""`output.exists`: what becomes of a merge that is there already. Local folders; tests/remote has the other places."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

import merger
from merger import api, journal
from merger.errors import OutputExistsError, PlanError
from merger.run_files import read_log, read_status
from merger.verify import read_report, verify_output
from tests.conformance.folders import content_digest, model, names


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "m1", "m2")):
        model(tmp_path / name, seed)
    return tmp_path


def manifest(here: Path, weight: float = 1.0, exists: str = "refuse", **more: Any) -> dict[str, Any]:
    entries = [{"model": str(here / n), "parameters": {"weight": weight}} for n in ("m1", "m2")]
    return {
        "merge_method": "task_arithmetic", "base_model": str(here / "base"), "models": entries,
        "output": {"exists": exists}, **more,
    }  # fmt: skip


def test_replace_takes_the_place_of_another_merge(here: Path) -> None:
    merger.merge(manifest(here), here / "out")
    before = content_digest(here / "out")
    with pytest.raises(OutputExistsError):
        merger.merge(manifest(here, 0.5), here / "out")
    assert content_digest(here / "out") == before
    merger.merge(manifest(here, 0.5, "replace"), here / "out")
    assert content_digest(here / "out") != before
    verify_output(str(here / "out"))
    merger.merge(manifest(here, 0.5), here / "fresh")
    assert content_digest(here / "fresh") == content_digest(here / "out")
    assert not (here / "out" / ".raymerge").exists()


def test_the_old_merge_stands_until_the_new_one_is_whole(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merger.merge(manifest(here), here / "out")
    before = {name: (here / "out" / name).read_bytes() for name in names(here / "out")}
    seen: list[bool] = []

    def listen(_: Any) -> None:
        seen.append(all((here / "out" / name).read_bytes() == data for name, data in before.items()))

    merger.merge(manifest(here, 0.5, "replace"), here / "out", listener=listen)
    assert seen
    assert all(seen)


def test_files_that_the_new_merge_has_not_are_removed(here: Path) -> None:
    document = manifest(here)
    document["output"]["shard_size"] = "2KB"
    merger.merge(document, here / "out")
    assert len([n for n in names(here / "out") if n.endswith(".safetensors")]) > 1
    merger.merge(manifest(here, 1.0, "replace"), here / "out")
    assert [n for n in names(here / "out") if n.endswith(".safetensors")] == ["model.safetensors"]
    assert not (here / "out" / "model.safetensors.index.json").exists()
    verify_output(str(here / "out"))


def test_replace_leaves_what_raymerge_did_not_make(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        merger.merge(manifest(here, 1.0, "replace"), here / "out")
    assert names(here / "out") == {"mine.txt"}


@pytest.mark.parametrize("moment", range(1, 12))
def test_a_replacement_that_is_killed_anywhere_is_finished_by_the_same_command(
    here: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Killed at the n-th removal or publication; the second run is not disturbed."""
    from merger.storage.local import LocalStore

    class KilledError(BaseException):
        pass

    merger.merge(manifest(here), here / "out")
    count = 0
    with monkeypatch.context() as patch:
        for change in ("commit", "remove"):
            real = getattr(LocalStore, change)

            def dying(store: LocalStore, *arguments: Any, real: Any = real) -> Any:
                nonlocal count
                count += 1
                if count >= moment:
                    raise KilledError
                return real(store, *arguments)

            patch.setattr(LocalStore, change, dying)
        with pytest.raises(KilledError):
            merger.merge(manifest(here, 0.5, "replace"), here / "out")
    for lease in (here / "out" / ".raymerge" / "lease").glob("*"):
        lease.unlink()  # the killed process is this one, and lives
    merger.merge(manifest(here, 0.5, "replace"), here / "out")
    verify_output(str(here / "out"))
    merger.merge(manifest(here, 0.5), here / "fresh")
    assert content_digest(here / "fresh") == content_digest(here / "out")
    assert not (here / "out" / ".raymerge").exists()


def test_a_merge_that_was_replaced_meanwhile_is_not_replaced_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merger.merge(manifest(here), here / "out")
    supplant = journal.Journal.supplant

    def meddle(self: journal.Journal, sink: Any) -> None:
        result = here / "out" / "raymerge.json"
        document = json.loads(result.read_text())
        result.unlink()
        result.write_text(json.dumps({**document, "by": "another"}))
        supplant(self, sink)

    monkeypatch.setattr(journal.Journal, "supplant", meddle)
    with pytest.raises(OutputExistsError) as caught:
        merger.merge(manifest(here, 0.5, "replace"), here / "out")
    assert "replaced by another run" in caught.value.problems[0].what
    assert json.loads((here / "out" / "raymerge.json").read_text())["by"] == "another"


def test_a_source_in_the_output_is_never_replaced(here: Path) -> None:
    merger.merge(manifest(here), here / "out")
    document = manifest(here, 0.5, "replace")
    document["models"][0]["model"] = str(here / "out")
    with pytest.raises(PlanError) as caught:
        merger.merge(document, here / "out")
    assert caught.value.problems[0].code == "output-is-source"


def test_versions_stand_beside_each_other_and_the_latest_is_named(here: Path) -> None:
    first = merger.merge(manifest(here, 1.0, "version"), here / "out")
    second = merger.merge(manifest(here, 0.5, "version"), here / "out")
    pointer = json.loads((here / "out" / "latest.json").read_text())
    assert pointer["content_digest"] == second.content_digest != first.content_digest
    assert pointer["path"] == str(here / "out" / pointer["fingerprint"]) == second.path
    assert {p.name for p in (here / "out").iterdir()} == {
        first.plan_digest[:12], second.plan_digest[:12], "latest.json",
    }  # fmt: skip
    again = merger.merge(manifest(here, 1.0, "version"), here / "out")
    assert again.already_done
    assert json.loads((here / "out" / "latest.json").read_text())["content_digest"] == first.content_digest
    verify_output(second.path)
    # Who names the place sees what latest.json names.
    out = str(here / "out")
    assert verify_output(out).path == out
    assert read_report(out)["content_digest"] == first.content_digest
    assert read_status(out)["state"] == "finished"
    assert read_status(out)["content_digest"] == first.content_digest
    assert "begun on" in read_log(out)
    (here / "out" / "latest.json").write_text('{"fingerprint": "../elsewhere"}')
    assert read_status(out)["state"] == "foreign"


def test_versions_that_finish_at_once_leave_a_whole_pointer(here: Path) -> None:
    weights = [0.1 * n for n in range(1, 7)]
    planned = [api.plan(manifest(here, w, "version"), here / "out") for w in weights]
    errors: list[BaseException] = []

    def run(one: Any) -> None:
        try:
            api.run_planned(one, workers=1)
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in planned]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    pointer = json.loads((here / "out" / "latest.json").read_text())
    assert pointer["plan_digest"] in {p.digest for p in planned}
    assert len([p for p in (here / "out").iterdir() if p.is_dir()]) == 6
