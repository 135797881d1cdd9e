"""The validators find what they are there to find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.objects import KINDS, check_object, schema_of

RELEASE = Path(__file__).parents[3] / "shared" / "data" / "kuberay-crds-v1.7.0"


def job() -> dict[str, Any]:
    pod = {"spec": {"containers": [{"name": "ray", "image": "a:b", "resources": {"limits": {"cpu": "1"}}}]}}
    group = {"groupName": "w", "minReplicas": 0, "maxReplicas": 1, "rayStartParams": {}, "template": pod}
    return {
        "apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "a"},
        "spec": {
            "entrypoint": "true",
            "rayClusterSpec": {
                "headGroupSpec": {"rayStartParams": {}, "template": pod}, "workerGroupSpecs": [dict(group)],
            },
        },
    }  # fmt: skip


def test_what_is_right_passes() -> None:
    assert check_object(job()) == []


def _head(spec: dict[str, Any]) -> Any:
    return spec["rayClusterSpec"]["headGroupSpec"]


@pytest.mark.parametrize(
    "mistake",
    [
        lambda s: s.update(entrypont="x"),
        lambda s: s.update(ttlSecondsAfterFinished="60"),
        lambda s: s.update(ttlSecondsAfterFinished=60),
        lambda s: _head(s).update(rayStartParams={"num-cpus": 0}),
        lambda s: _head(s).update(template={"spec": {"containers": [{"name": "ray", "resource": {}}]}}),
        lambda s: _head(s).update(template={"spec": {"containers": []}}),
        lambda s: s.update(deletionStrategy={"deletionRules": []}, shutdownAfterJobFinishes=True),
        lambda s: s.update(deletionStrategy={"onSuccess": {"policy": "DeleteCluster"}}),
        lambda s: s.update(managedBy="nobody"),
        lambda s: s["rayClusterSpec"].update(authOptions={"mode": "token"}),
        lambda s: s["rayClusterSpec"]["workerGroupSpecs"][0].update(idleTimeoutSeconds=5),
        lambda s: s["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas=3),
        lambda s: s["rayClusterSpec"]["workerGroupSpecs"][0].update(
            resources={"memory": "1Gi"}, rayStartParams={"memory": "1"}
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_found(mistake: Callable[[dict[str, Any]], None]) -> None:
    document = job()
    mistake(document["spec"])
    assert check_object(document)


def test_unknown_fields_of_core_objects_are_found() -> None:
    assert check_object({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "a"}, "spec": {"cron": "x"}})
    assert check_object({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"nam": "a"}})


@pytest.mark.skipif(not RELEASE.is_dir(), reason="the release's own files are not beside this checkout")
@pytest.mark.parametrize("kind", KINDS)
def test_the_schemas_are_those_of_the_release(kind: str) -> None:
    document = yaml.load((RELEASE / f"ray.io_{KINDS[kind]}.yaml").read_text(), Loader=yaml.CSafeLoader)
    (version,) = [version for version in document["spec"]["versions"] if version["name"] == "v1"]
    assert version["schema"]["openAPIV3Schema"] == schema_of(kind)
