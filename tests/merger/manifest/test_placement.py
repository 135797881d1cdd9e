"""cluster: and kubernetes: as typed values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merger.errors import ManifestError, Problem
from merger.manifest import Manifest, load_documents, load_manifest

ADAPTERS = {"adapters": [{"adapter": "o/a"}]}


def loaded(**sections: Any) -> Manifest:
    return load_manifest({**ADAPTERS, **sections})


def refused(**sections: Any) -> list[Problem]:
    with pytest.raises(ManifestError) as caught:
        loaded(**sections)
    return list(caught.value.problems)


def test_nothing_said_is_a_site_with_defaults() -> None:
    found = loaded()
    assert found.cluster.workers is None
    assert found.kubernetes.auth == "token"
    assert found.kubernetes.job.submission == "HTTPMode"
    assert found.kubernetes.autoscales


def test_sizes_are_read_as_kubernetes_and_as_we_spell_them() -> None:
    for text in ("16Gi", "16GiB", 16 * 2**30):
        assert loaded(kubernetes={"head": {"memory": text}}).kubernetes.head.memory == 16 << 30
    assert loaded(cluster={"memory": "4GB"}).cluster.memory == 4 * 10**9


def test_kueue_switches_autoscaling_off() -> None:
    assert not loaded(kubernetes={"queue": {"kueue": "q"}}).kubernetes.autoscales
    assert loaded(kubernetes={"queue": {"volcano": "q"}}).kubernetes.autoscales


@pytest.mark.parametrize(
    "sections, where, code",
    [
        ({"cluster": {"worker": 3}}, "cluster.worker", "unknown-key"),
        ({"cluster": {"workers": 0}}, "cluster.workers", "out-of-bounds"),
        ({"cluster": {"workers": True}}, "cluster.workers", "bad-value"),
        ({"cluster": {"device": "gpu"}}, "cluster.device", "bad-value"),
        ({"cluster": {"gpus_per_worker": 0.3}}, "cluster.gpus_per_worker", "bad-value"),
        ({"kubernetes": {"nodeSelector": {}}}, "kubernetes.nodeSelector", "unknown-key"),
        ({"kubernetes": {"namespace": "Merges"}}, "kubernetes.namespace", "bad-value"),
        ({"kubernetes": {"head": {"memory": "16Gb/s"}}}, "kubernetes.head.memory", "bad-value"),
        ({"kubernetes": {"head": {"cpu": -1}}}, "kubernetes.head.cpu", "out-of-bounds"),
        ({"kubernetes": {"cpu_workers": {"spot": "aws"}}}, "kubernetes.cpu_workers.spot", "bad-value"),
        ({"kubernetes": {"cpu_workers": {"gpus": 1}}}, "kubernetes.cpu_workers.gpus", "unknown-key"),
        ({"kubernetes": {"labels": {"a b": "c"}}}, "kubernetes.labels", "bad-value"),
        ({"kubernetes": {"labels": {"a": "c" * 64}}}, "kubernetes.labels", "bad-value"),
        ({"kubernetes": {"annotations": {"a": True}}}, "kubernetes.annotations", "bad-value"),
        ({"kubernetes": {"queue": {}}}, "kubernetes.queue", "conflict"),
        ({"kubernetes": {"queue": {"kueue": "a", "volcano": "b"}}}, "kubernetes.queue", "conflict"),
        ({"kubernetes": {"tolerations": [{"operator": "Exists", "value": "x"}]}}, "kubernetes.tolerations[0]",
         "conflict"),
        ({"kubernetes": {"tolerations": [{"effect": "NoShedule"}]}}, "kubernetes.tolerations[0].effect", "bad-value"),
        ({"kubernetes": {"volumes": [{"name": "a", "mount": "/a"}]}}, "kubernetes.volumes[0].claim", "missing-key"),
        ({"kubernetes": {"job": {"submission": "Http"}}}, "kubernetes.job.submission", "bad-value"),
        ({"kubernetes": {"env": {"X": "y"}, "secrets": {"env": {"X": {"secret": "s", "key": "k"}}}}}, "kubernetes",
         "conflict"),
        ({"kubernetes": {"secrets": {"env": {"A B": {"secret": "s", "key": "k"}}}}}, "kubernetes.secrets.env.A B.[key]",
         "bad-value"),
        ({"kubernetes": {"secrets": {"env": {"A": {"secret": "s", "kei": "k", "key": "k"}}}}},
         "kubernetes.secrets.env.A.kei", "unknown-key"),
        ({"kubernetes": {"env": {"A": 1}}}, "kubernetes.env", "bad-value"),
        ({"kubernetes": {"env": {"RAY_ADDRESS": "x"}}}, "kubernetes.env", "conflict"),
        ({"kubernetes": {"network_policy": {"egress_ports": [0]}}}, "kubernetes.network_policy.egress_ports[0]",
         "out-of-bounds"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_key(sections: dict[str, Any], where: str, code: str) -> None:
    assert [(problem.where, problem.code) for problem in refused(**sections)] == [(where, code)]


def test_every_mistake_is_named_at_once() -> None:
    found = refused(cluster={"workers": 0, "memori": 1}, kubernetes={"auth": "none", "job": {"retries": 99}})
    assert {problem.where for problem in found} == {
        "cluster.workers", "cluster.memori", "kubernetes.auth", "kubernetes.job.retries",
    }  # fmt: skip


SECRETS = ["hf_" + "a" * 34, "AKIA" + "B" * 16, "https://user:opensesame@host/x", "opensesame"]


@pytest.mark.parametrize("value", SECRETS)
def test_secrets_are_refused_and_never_repeated(value: str) -> None:
    for sections in (
        {"kubernetes": {"env": {"HF_TOKEN": value}}},
        {"kubernetes": {"env": {"AWS_SECRET_ACCESS_KEY": value}}},
        {"kubernetes": {"secrets": {"env": {"HF_TOKEN": value}}}},
        {"kubernetes": {"secrets": {"env": {"HF_TOKEN": {"secret": "s", "key": "k", "value": value}}}}},
        {"kubernetes": {"secrets": {"env": value}}},
        {"kubernetes": {"secrets": value}},
        {"kubernetes": {"secrets": {"files": [value]}}},
    ):
        problems = refused(**sections)
        assert problems
        assert value not in str(problems)
    for text in SECRETS[:3]:
        (problem,) = refused(kubernetes={"env": {"HARMLESS": text}})
        assert problem.code == "secret-in-clear"
        assert text not in str(problem)


def test_a_secret_in_place_of_its_name_is_not_repeated() -> None:
    (problem,) = refused(kubernetes={"secrets": {"env": {"HF_TOKEN": "opensesame"}}})
    assert problem.code == "secret-in-clear"
    assert "opensesame" not in str(problem)


def test_settings_that_only_sound_secret_pass() -> None:
    env = {
        "HF_TOKEN_PATH": "/var/run/token",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/x",
        "AWS_ENDPOINT_URL": "https://s3",
    }
    assert loaded(kubernetes={"env": env}).kubernetes.env == env


def test_a_site_lies_over_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "merge.yaml").write_text(
        "adapters: [{adapter: o/a}]\nkubernetes: {image: a:1, labels: {x: y}, head: {cpu: 4, memory: 4Gi}}\n"
    )
    (tmp_path / "site.yaml").write_text(
        "cluster: {workers: 3}\nkubernetes:\n  image: b:2\n  labels: {z: w}\n  head: {memory: 9Gi}\n"
    )
    (found,) = load_documents(tmp_path / "merge.yaml", site=tmp_path / "site.yaml")
    assert found.cluster.workers == 3
    assert found.kubernetes.image == "b:2"
    assert found.kubernetes.labels == {"x": "y", "z": "w"}
    assert (found.kubernetes.head.cpu, found.kubernetes.head.memory) == (4, 9 << 30)


def test_a_site_says_nothing_of_the_merge(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("kubernetes: {image: a:1}\nparameters: {density: 0.1}\n")
    with pytest.raises(ManifestError, match="parameters"):
        load_documents(ADAPTERS, site=tmp_path / "site.yaml")


def test_a_mistake_in_a_site_is_named_with_its_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("kubernetes:\n  image: a:1\n  auth: non\n")
    with pytest.raises(ManifestError) as caught:
        load_documents(ADAPTERS, site=tmp_path / "site.yaml")
    assert [p.where for p in caught.value.problems] == [f"kubernetes.auth ({tmp_path}/site.yaml:3)"]
