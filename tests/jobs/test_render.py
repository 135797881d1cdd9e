"""`raymerge render`: what is refused before anything is written, and what lies in the folder afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.merge import main as job
from tests.conformance.folders import Outcome, signals_kept
from tests.test_house import BLOCKED
from tests.test_house import run as run_python

ADAPTERS = Path(__file__).parents[2] / "manifests" / "demo" / "adapters"
Raymerge = Callable[..., Outcome]


def site(**more: Any) -> dict[str, Any]:
    volume = {"name": "adapters", "claim": "adapters", "mount": str(ADAPTERS), "read_only": True}
    return {"image": "registry.example.com/raymerge:1", "volumes": [volume], **more}


def write(path: Path, **keys: Any) -> Path:
    document = {
        "merge_method": "ties",
        "adapters": [{"adapter": str(ADAPTERS / name)} for name in ("json", "sql")],
        "parameters": {"density": 0.2},
        "output": {"path": "s3://models/merged"},
        "kubernetes": site(),
        **keys,
    }
    path.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
    return path


def bulk(path: Path, *, exists: str = "version", schedule: Any = "30 2 * * 1-5", **keys: Any) -> Path:
    entry = {"adapters": [{"adapter": str(ADAPTERS / "json")}], "output": {"path": "s3://models/one"}}
    document = {
        "merges": [entry, {**entry, "name": "two", "output": {"path": "s3://models/two"}}],
        "defaults": {"output": {"exists": exists}}, "kubernetes": site(),
        **({"schedule": {"cron": schedule, "timezone": "Europe/Berlin"}} if schedule else {}), **keys,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(document))
    return path


def codes(outcome: Outcome) -> dict[str, str]:
    """Key → code of what was refused, without the lines."""
    problems = json.loads(outcome.out)["problems"]
    return {problem["where"].partition(" (")[0]: problem["code"] for problem in problems}


def test_a_base_is_written_and_written_again(raymerge: Raymerge, tmp_path: Path) -> None:
    manifest, out = write(tmp_path / "My Merge.yaml"), tmp_path / "base"
    assert raymerge("render", "kuberay", manifest, "-o", out).code == 0
    names = {file.name for file in out.iterdir()}
    assert names == {"kustomization.yaml", "networkpolicy.yaml", "manifest.yaml", "rayjob.yaml"}
    job = yaml.safe_load((out / "rayjob.yaml").read_text())
    assert job["metadata"]["name"] == "my-merge"
    assert job["spec"]["entrypoint"] == "python -m jobs.merge /etc/raymerge/manifest.yaml"
    assert job["spec"]["submissionMode"] == "HTTPMode"
    before = {name: (out / name).read_text() for name in names}
    assert raymerge("render", "kuberay", manifest, "-o", out).code == 0
    assert {file.name: file.read_text() for file in out.iterdir()} == before


def test_what_no_longer_belongs_goes_and_what_is_somebodys_stays(raymerge: Raymerge, tmp_path: Path) -> None:
    manifest, out = write(tmp_path / "m.yaml"), tmp_path / "base"
    raymerge("render", "kuberay", manifest, "-o", out)
    (out / "patch.yaml").write_text("# mine\n")
    assert raymerge("render", "kuberay", manifest, "--as", "raycluster", "-o", out).code == 0
    assert {file.name for file in out.iterdir()} == {
        "kustomization.yaml", "networkpolicy.yaml", "raycluster.yaml", "patch.yaml",
    }  # fmt: skip
    (out / "rayjob.yaml").write_text("# mine too\n")
    refused = raymerge("render", "kuberay", manifest, "-o", out, "--json")
    assert refused.code == 2
    assert [problem["code"] for problem in json.loads(refused.out)["problems"]] == ["not-ours"]
    assert (out / "rayjob.yaml").read_text() == "# mine too\n"
    assert (out / "raycluster.yaml").exists()


def test_drift_is_found(raymerge: Raymerge, tmp_path: Path) -> None:
    manifest, out = write(tmp_path / "m.yaml"), tmp_path / "base"
    assert raymerge("render", "kuberay", manifest, "-o", out, "--check").code == 1
    raymerge("render", "kuberay", manifest, "-o", out)
    assert raymerge("render", "kuberay", manifest, "-o", out, "--check").code == 0
    text = (out / "rayjob.yaml").read_text()
    (out / "rayjob.yaml").write_text(text.replace("backoffLimit: 3", "backoffLimit: 9"))
    found = raymerge("render", "kuberay", manifest, "-o", out, "--check", "--json")
    assert (found.code, list(codes(found).values())) == (1, ["drift"])
    assert "backoffLimit: 9" in (out / "rayjob.yaml").read_text()
    assert raymerge("render", "kuberay", manifest, "--check").code == 2


def test_without_a_folder_it_is_one_stream(raymerge: Raymerge, tmp_path: Path) -> None:
    shown = raymerge("render", "kuberay", write(tmp_path / "m.yaml"))
    assert [document["kind"] for document in yaml.safe_load_all(shown.out)] == ["NetworkPolicy", "ConfigMap", "RayJob"]
    document = json.loads(raymerge("render", "kuberay", tmp_path / "m.yaml", "--json").out)
    assert set(document["files"]) == {"kustomization.yaml", "networkpolicy.yaml", "manifest.yaml", "rayjob.yaml"}


def test_everything_that_is_wrong_is_said_at_once_and_nothing_is_written(raymerge: Raymerge, tmp_path: Path) -> None:
    manifest = write(
        tmp_path / "m.yaml", output={"path": "/lost/out"}, adapters=[{"adapter": str(tmp_path / "nothing")}],
        kubernetes=site(image="raymerge:latest", name="x" * 48, cpu_workers={"min": 3, "max": 1}),
    )  # fmt: skip
    refused = raymerge("render", "kuberay", manifest, "-o", tmp_path / "base", "--json")
    assert refused.code == 2
    assert set(codes(refused)) >= {
        "kubernetes.image", "kubernetes.name", "kubernetes.cpu_workers.min", "output.path", "adapters[0].adapter",
    }  # fmt: skip
    assert "no-such-source" in codes(refused).values()
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("keys", [{"cluster": {"workrs": 1}}, {"kubernetes": {"env": {"HF_TOKEN": "x"}}}])
def test_what_the_grammar_refuses_is_refused(raymerge: Raymerge, tmp_path: Path, keys: dict[str, Any]) -> None:
    refused = raymerge("render", "kuberay", write(tmp_path / "m.yaml", **keys), "-o", tmp_path / "base")
    assert refused.code == 2
    assert not (tmp_path / "base").exists()


def test_problems_of_the_plan_are_refused(raymerge: Raymerge, tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.yaml", merge_method="slerp", parameters={"t": 0.5})
    refused = raymerge("render", "kuberay", manifest, "-o", tmp_path / "base")
    assert refused.code == 2
    assert not (tmp_path / "base").exists()


def test_a_plan_made_elsewhere_stands_for_the_sources(raymerge: Raymerge, tmp_path: Path) -> None:
    planned = raymerge("plan", write(tmp_path / "here.yaml"), "--json")
    (tmp_path / "plan.json").write_text(planned.out)
    volume = {"name": "m", "claim": "m", "mount": "/models"}
    manifest = write(tmp_path / "m.yaml", adapters=[{"adapter": "/models/a"}, {"adapter": "/models/b"}],
                     kubernetes=site(volumes=[volume]))  # fmt: skip
    assert raymerge("render", "kuberay", manifest).code == 2
    assert raymerge("render", "kuberay", manifest, "--plan", tmp_path / "plan.json").code == 0
    assert raymerge("render", "kuberay", manifest, "--plan", tmp_path / "none.json").code == 2


def test_values_and_overrides_go_over_the_manifest(raymerge: Raymerge, tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.yaml")
    (tmp_path / "site.yaml").write_text("kubernetes: {namespace: prod, image: 'r.example.com/x:2'}\n")
    shown = raymerge("render", "kuberay", manifest, "--values", tmp_path / "site.yaml", "--set", "cluster.workers=3")
    documents = {document["kind"]: document for document in yaml.safe_load_all(shown.out)}
    assert {document["metadata"]["namespace"] for document in documents.values()} == {"prod"}
    inside = yaml.safe_load(documents["ConfigMap"]["data"]["manifest.yaml"])
    assert inside["cluster"]["workers"] == 3
    assert "kubernetes" not in inside


@pytest.mark.parametrize("form", ["cronjob", "raycronjob", "crontab", "systemd"])
def test_a_schedule_that_would_refuse_its_own_output_is_refused(raymerge: Raymerge, tmp_path: Path, form: str) -> None:
    manifest = bulk(tmp_path / "nightly.yaml", exists="refuse")
    refused = raymerge("render", "cron", manifest, "--as", form, "-o", tmp_path / "out", "--json")
    assert refused.code == 2
    assert codes(refused) == {f"{name}: output.exists": "schedule-refused" for name in ("merge-1", "two")}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["cronjob", "raycronjob", "crontab", "systemd"])
def test_a_schedule_is_needed(raymerge: Raymerge, tmp_path: Path, form: str) -> None:
    for manifest in (bulk(tmp_path / "bulk.yaml", schedule=None), write(tmp_path / "merge.yaml")):
        refused = raymerge("render", "cron", manifest, "--as", form, "--json")
        assert refused.code == 2
        assert codes(refused)["schedule"] == "missing-key"


def test_schedules_are_rendered(raymerge: Raymerge, tmp_path: Path) -> None:
    manifest = bulk(tmp_path / "nightly.yaml")
    shown = raymerge("render", "cron", manifest, "--address", "https://ray.example.com")
    assert [document["kind"] for document in yaml.safe_load_all(shown.out)] == ["ConfigMap", "CronJob"]
    shown = raymerge("render", "cron", manifest, "--as", "raycronjob")
    (job,) = [document for document in yaml.safe_load_all(shown.out) if document["kind"] == "RayCronJob"]
    assert job["spec"]["schedule"] == "30 2 * * 1-5"
    shown = raymerge("render", "cron", manifest, "--as", "crontab")
    assert f"bulk {tmp_path}/nightly.yaml" in shown.out
    assert raymerge("render", "cron", manifest, "--as", "systemd", "-o", tmp_path / "units").code == 0
    assert {file.name for file in (tmp_path / "units").iterdir()} == {"nightly.service", "nightly.timer"}
    service = (tmp_path / "units" / "nightly.service").read_text()
    assert f"WorkingDirectory={os.getcwd()}\n" in service
    changed = raymerge("render", "cron", manifest, "--as", "crontab", "--set", "max_active_merges=2")
    assert f"bulk {tmp_path}/nightly.yaml --set max_active_merges=2" in changed.out
    refused = raymerge("render", "cron", manifest, "--as", "raycronjob", "--address", "https://ray.example.com")
    assert refused.code == 2
    assert "takes no address" in refused.err
    timer = (tmp_path / "units" / "nightly.timer").read_text()
    assert "OnCalendar=Mon,Tue,Wed,Thu,Fri *-*-* 02:30:00 Europe/Berlin" in timer
    shown = raymerge("render", "cron", manifest, "--as", "crontab", "--address", "https://ray.example.com")
    assert f"submit {tmp_path}/nightly.yaml --address https://ray.example.com --follow" in shown.out


def test_a_bulk_of_every_form_is_rendered(raymerge: Raymerge, tmp_path: Path) -> None:
    write(tmp_path / "one.yaml", output=None, kubernetes=None)
    manifest = bulk(
        tmp_path / "bulk.yaml", merges=[{"manifest": str(tmp_path / "one.yaml")}],
        defaults={"output": {"path": "s3://models/{name}-{parameters.density}", "exists": "version"}},
        matrix={"parameters.density": [0.1, 0.2]}, cluster={"workers": 2},
    )  # fmt: skip
    shown = raymerge("render", "kuberay", manifest)
    documents = {document["kind"]: document for document in yaml.safe_load_all(shown.out)}
    inside = yaml.safe_load(documents["ConfigMap"]["data"]["manifest.yaml"])
    assert inside["matrix"] == {"parameters.density": [0.1, 0.2]}
    assert inside["cluster"]["workers"] == 2
    found = bulk(tmp_path / "each.yaml", merges=None, each=str(ADAPTERS),
                 defaults={"output": {"path": "s3://models/{name}", "exists": "replace"}})  # fmt: skip
    assert raymerge("render", "cron", found).code == 0
    lost = bulk(tmp_path / "lost.yaml", merges=None, each=str(ADAPTERS),
                defaults={"output": {"path": str(tmp_path / "{name}"), "exists": "replace"}})  # fmt: skip
    refused = raymerge("render", "cron", lost, "--json")
    assert codes(refused) == {f"{name}: output.path": "not-shared" for name in ("json", "sql", "triage")}


def test_the_plan_of_a_bulk_stands_for_its_sources(raymerge: Raymerge, tmp_path: Path) -> None:
    manifest = bulk(tmp_path / "nightly.yaml")
    (tmp_path / "plan.json").write_text(raymerge("plan", manifest, "--json").out)
    made = raymerge("render", "cron", manifest)
    assert made.code == 0
    again = raymerge("render", "cron", manifest, "--plan", tmp_path / "plan.json")
    text = [line for line in again.out.splitlines() if not line.startswith("#")]
    assert text == [line for line in made.out.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("form", ["cronjob", "crontab", "systemd"])
def test_a_schedule_submits_over_plain_http_only_when_told_to(raymerge: Raymerge, tmp_path: Path, form: str) -> None:
    line = ["render", "cron", bulk(tmp_path / "b.yaml"), "--as", form, "--json", "--address"]
    for address, code in (("http://ray:8265", "insecure"), ("ray://ray:1", "bad-arguments"), ("ray", "bad-arguments"),
                          ("https://user:opensesame@ray", "bad-arguments")):  # fmt: skip
        refused = raymerge(*line, address)
        assert (refused.code, codes(refused)) == (2, {"--address": code})
        assert "opensesame" not in refused.out + refused.err
    allowed = raymerge(*line, "http://ray:8265", "--insecure")
    assert "--insecure" in "".join(json.loads(allowed.out)["files"].values())
    safe = json.loads(raymerge(*line, "http://127.0.0.1:8265").out)["files"]
    assert "--insecure" not in "".join(safe.values())


def test_what_systemd_cannot_say_is_refused(raymerge: Raymerge, tmp_path: Path) -> None:
    refused = raymerge("render", "cron", bulk(tmp_path / "b.yaml", schedule="0 0 1 * 1"), "--as", "systemd", "--json")
    assert (refused.code, codes(refused)) == (2, {"schedule.cron": "bad-value"})


def test_a_form_that_is_not_known_is_refused(raymerge: Raymerge, tmp_path: Path) -> None:
    assert raymerge("render", "kuberay", write(tmp_path / "m.yaml"), "--as", "crontab").code == 2
    assert raymerge("render", "cron", bulk(tmp_path / "b.yaml"), "--as", "rayjob").code == 2


def test_a_secret_of_this_process_is_never_written(
    raymerge: Raymerge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "correcthorsebattery")
    manifest = write(tmp_path / "m.yaml", kubernetes=site(annotations={"note": "correcthorsebattery"}))
    refused = raymerge("render", "kuberay", manifest, "-o", tmp_path / "base")
    assert refused.code == 2
    assert "correcthorsebattery" not in refused.out + refused.err
    assert not (tmp_path / "base").exists()


def test_rendering_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.yaml")
    line = ["render", "kuberay", str(manifest), "-o", str(tmp_path / "base")]
    done = run_python(f"{BLOCKED}\nfrom jobs.cli import main\nsys.exit(main({line!r}))")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "base" / "rayjob.yaml").exists()


def test_the_job_that_is_rendered_merges_and_a_retry_finds_it_done(raymerge: Raymerge, tmp_path: Path) -> None:
    """What the pod of the head would do, on this machine: the entry point, on the manifest of the ConfigMap."""
    places = site()["volumes"] + [{"name": "out", "claim": "out", "mount": str(tmp_path / "out")}]
    out = tmp_path / "out" / "merged"
    for manifest, results in (
        (write(tmp_path / "m.yaml", output={"path": str(out)}, merge_method="task_arithmetic", parameters=None,
               kubernetes=site(volumes=places)), [out]),
        (bulk(tmp_path / "b.yaml", kubernetes=site(volumes=places), merges=None, each=str(ADAPTERS),
              defaults={"output": {"path": str(tmp_path / "out" / "{name}"), "exists": "replace"}}),
         [tmp_path / "out" / name for name in ("json", "sql", "triage")]),
    ):  # fmt: skip
        assert raymerge("render", "kuberay", manifest, "-o", tmp_path / "base").code == 0
        config = yaml.safe_load((tmp_path / "base" / "manifest.yaml").read_text())
        (tmp_path / "etc.yaml").write_text(config["data"]["manifest.yaml"])
        entrypoint = yaml.safe_load((tmp_path / "base" / "rayjob.yaml").read_text())["spec"]["entrypoint"]
        assert entrypoint.startswith("python -m jobs.merge /etc/raymerge/manifest.yaml")
        for _ in range(2):
            with signals_kept():
                assert job([str(tmp_path / "etc.yaml"), "--on", "here"]) == 0
            assert all((result / "adapter_model.safetensors").exists() for result in results)


def test_cluster_says_what_the_command_line_leaves_open(raymerge: Raymerge, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = write(tmp_path / "m.yaml", output={"path": str(out)}, cluster={"workers": 1, "memory": "1KB"},
                     merge_method="task_arithmetic", parameters=None, kubernetes=None)  # fmt: skip
    assert raymerge("merge", manifest, "--on", "here").code == 2, "1 KB holds no block"
    assert raymerge("merge", manifest, "--on", "here", "--memory", "1GB").code == 0
    recorded = json.loads((out / "raymerge.json").read_text())["manifest"]
    assert "cluster" not in recorded
    assert "kubernetes" not in recorded


def test_a_gpu_is_asked_for_by_the_manifest(raymerge: Raymerge, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    manifest = write(tmp_path / "m.yaml", output={"path": str(tmp_path / "out")}, cluster={"device": "cuda"},
                     merge_method="task_arithmetic", parameters=None)  # fmt: skip
    refused = raymerge("merge", manifest, "--on", "here", "--json")
    assert (refused.code, codes(refused)) == (2, {"--device": "no-gpu"})
    assert raymerge("merge", manifest, "--on", "here", "--device", "cpu").code == 0
