"""RayJob (a cluster for one job) and RayCluster (one that jobs share), for KubeRay 1.7."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from cluster.render.pods import bytes_text, head_template, submitter_template, worker_template
from cluster.render.rendering import Rendering
from cluster.render.sizing import OBJECT_STORE_BYTES, Sizing, worker_group
from cluster.render.text import Noted

STOP_SECONDS: Final = 60
"""What a job that is stopped gets to write its journal; Ray's own default is 3."""

_MODES: Final = {
    "HTTPMode": (
        "The operator submits over HTTP and asks for the job's state. In the other modes the job counts as failed, and "
        "its cluster is removed, thirty seconds after the stream of its logs ends, though the merge may be running."
    ),
    "K8sJobMode": (
        "A pod submits and follows the logs (`kubectl logs`). When that stream breaks, KubeRay 1.7 lets the job fail "
        "after thirty seconds, running or not: HTTPMode is safer for merges of more than minutes."
    ),
    "SidecarMode": (
        "A container beside the head submits and follows the logs. When that stream breaks, KubeRay 1.7 lets the job "
        "fail after thirty seconds, running or not: HTTPMode is safer for merges of more than minutes."
    ),
}


def ray_job(rendering: Rendering) -> dict[str, Any]:
    """A RayJob: it makes a cluster, merges, and takes the cluster away."""
    metadata = rendering.metadata()
    metadata["labels"] |= queue_labels(rendering)
    return {
        "apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata,
        "spec": {
            **job_spec(rendering),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": rendering.site.job.ttl_seconds,
        },
    }  # fmt: skip


def job_spec(rendering: Rendering) -> dict[str, Any]:
    """What a RayJob and the template of a RayCronJob share; how the cluster ends is theirs to say."""
    site = rendering.site
    found: dict[str, Any] = {
        "entrypoint": Noted(rendering.entrypoint, "The driver runs on the head; started again, it resumes."),
        "submissionMode": Noted(site.job.submission, _MODES[site.job.submission]),
        "runtimeEnvYAML": Noted(
            f'env_vars:\n  RAY_JOB_STOP_WAIT_TIME_S: "{STOP_SECONDS}"\n',
            "Never a secret here: Ray stores and shows it in the clear.",
        ),
        "backoffLimit": Noted(
            site.job.retries,
            "Each retry is a new cluster, which takes up what the journal of the last one has. KubeRay looks at no "
            "exit code: what cannot start (2) or finds something else in place (3) is retried too, in vain.",
        ),
        "activeDeadlineSeconds": site.job.deadline_seconds,
        "preRunningDeadlineSeconds": Noted(
            site.job.start_seconds, "Nothing is held for a cluster that cannot be scheduled."
        ),
    }
    if site.job.submission == "K8sJobMode":
        found["submitterPodTemplate"] = submitter_template(rendering, container="ray-job-submitter", command=None)
    found["rayClusterSpec"] = cluster_spec(rendering, [rendering.sizing], reads_manifest=True)
    return found


def ray_cluster(rendering: Rendering) -> dict[str, Any]:
    """A RayCluster that stays, for `raymerge submit` and for schedules."""
    metadata = rendering.metadata()
    metadata["labels"] |= queue_labels(rendering)
    sizings = [sizing for sizing in (rendering.sizing, rendering.other_sizing) if sizing is not None]
    return {
        "apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata,
        "spec": cluster_spec(rendering, sorted(sizings, key=lambda s: s.device), reads_manifest=False),
    }  # fmt: skip


def cluster_spec(rendering: Rendering, sizings: Sequence[Sizing], *, reads_manifest: bool) -> dict[str, Any]:
    """A head, and one group of workers for each sizing."""
    site = rendering.site
    found: dict[str, Any] = {
        "rayVersion": Noted(rendering.ray_version, "That of the image."),
        "enableInTreeAutoscaling": site.autoscales,
    }
    if site.autoscales:
        amounts = {"cpu": "500m", "memory": "1Gi"}
        found["autoscalerOptions"] = {
            "version": "v2", "upscalingMode": "Default", "idleTimeoutSeconds": site.idle_seconds,
            "resources": {"requests": amounts, "limits": dict(amounts)},
        }  # fmt: skip
    if site.auth == "token":
        named = {} if site.auth_secret is None else {"secretName": site.auth_secret}
        found["authOptions"] = Noted(
            {"mode": "token", **named},
            "Without it anyone who reaches the head runs code there. KubeRay makes the token, or takes it from the "
            "Secret that is named (key auth_token).",
        )
    found["headGroupSpec"] = {
        "rayStartParams": {
            "num-cpus": Noted("0", "No worker beside the driver."),
            "dashboard-host": "0.0.0.0",  # noqa: S104 - the operator has to reach it; tokens and the policy guard it
            "object-store-memory": Noted(str(OBJECT_STORE_BYTES), "No tensor goes through it."),
        },
        "template": head_template(rendering, reads_manifest=reads_manifest),
    }
    found["workerGroupSpecs"] = [_worker_group(rendering, sizing, shared=not reads_manifest) for sizing in sizings]
    return found


def _worker_group(rendering: Rendering, sizing: Sizing, *, shared: bool) -> dict[str, Any]:
    site = rendering.site
    group = worker_group(site, sizing.device)
    most = group.max or sizing.pods
    wanted = min(sizing.pods, most)
    replicas = min(group.min, most) if shared and site.autoscales else wanted
    found: dict[str, Any] = {
        "groupName": "gpu" if sizing.device == "cuda" else "cpu",
        "replicas": Noted(
            replicas,
            f"Workers: {sizing.workers}, {sizing.workers_per_pod} a pod. The bytes of a merge are the same for any "
            "number.",
        ),
        "minReplicas": min(group.min, most) if site.autoscales else wanted,
        "maxReplicas": most,
    }
    if site.autoscales:
        found["idleTimeoutSeconds"] = site.idle_seconds
    if group.spot is not None:
        found["labels"] = {"ray.io/market-type": "spot"}
    # KubeRay takes `resources` for all that the pod's limits would else say, but only what stands there.
    found["resources"] = Noted(
        {"memory": bytes_text(sizing.ray_memory // (1 << 20) * (1 << 20))},
        "What Ray may promise to workers: the pod's limit, less what Ray's own processes and the object store take.",
    )
    found["rayStartParams"] = {"object-store-memory": str(OBJECT_STORE_BYTES)}
    found["template"] = worker_template(rendering, sizing)
    return found


def queue_labels(rendering: Rendering) -> dict[str, str]:
    """By which a queue takes hold of an object."""
    queue = rendering.site.queue
    if queue is None:
        return {}
    if queue.kueue is not None:
        return {"kueue.x-k8s.io/queue-name": queue.kueue}
    assert queue.volcano is not None
    priority = rendering.site.priority_class
    return {
        "volcano.sh/queue-name": queue.volcano,
        **({} if priority is None else {"ray.io/priority-class-name": priority}),
    }
