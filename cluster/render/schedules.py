"""Schedules on Kubernetes: a CronJob that submits to a cluster, or KubeRay's own RayCronJob."""

from __future__ import annotations

from typing import Any, Final

from cluster.render.pods import submitter_template
from cluster.render.rayjob import job_spec
from cluster.render.rendering import DASHBOARD_PORT, MANIFEST_PATH, Rendering
from cluster.render.text import Noted
from merger.manifest import Schedule

LATE_SECONDS: Final = 3600
"""A tick that could not start for so long is left out."""
KEPT_SECONDS: Final = 3 * 86400
"""How long what a tick left in the cluster can be looked at."""
TOKEN_KEY: Final = "auth_token"  # noqa: S105 - a name


def head_address(rendering: Rendering) -> str:
    """Of the shared cluster, for pods of its namespace."""
    return f"http://{rendering.name}-head-svc:{DASHBOARD_PORT}"


def cron_job(rendering: Rendering, *, address: str | None, insecure: bool = False) -> dict[str, Any]:
    """Submits at each tick, follows to the end and fails as the merge does. `address` None: the shared cluster that is
    rendered beside it, over plain http inside the namespace (the policy lets nobody else in)."""
    schedule, site = _schedule(rendering), rendering.site
    own = address is None
    command = ["raymerge", "submit", MANIFEST_PATH, "--address", address or head_address(rendering), "--follow"]
    secret = site.auth_secret or (rendering.name if own else None)
    environment: list[Any] = []
    if secret is not None and site.auth == "token":
        environment = [
            {"name": "RAY_AUTH_MODE", "value": "token"},
            Noted(
                {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": secret, "key": TOKEN_KEY}}},
                "KubeRay makes this Secret with the cluster." if site.auth_secret is None else "The cluster's own.",
            ),
        ]
    if own or insecure:
        command.append("--insecure")
    template = submitter_template(
        rendering, container="submit",
        command=command, environment=environment, submits_to=rendering.name if own else None,
    )  # fmt: skip
    return {
        "apiVersion": "batch/v1", "kind": "CronJob", "metadata": rendering.metadata(),
        "spec": {
            "schedule": schedule.cron,
            "timeZone": schedule.timezone,
            "concurrencyPolicy": Noted("Forbid", "A tick that finds the last one at work is left out."),
            "startingDeadlineSeconds": LATE_SECONDS,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 5,
            "jobTemplate": {
                "spec": {
                    "backoffLimit": site.job.retries,
                    "activeDeadlineSeconds": site.job.deadline_seconds,
                    "ttlSecondsAfterFinished": KEPT_SECONDS,
                    "podFailurePolicy": Noted(
                        {
                            "rules": [
                                {
                                    "action": "Ignore",
                                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                                },
                                {
                                    "action": "FailJob",
                                    "onExitCodes": {"containerName": "submit", "operator": "In", "values": [1, 2, 3]},
                                },
                            ]
                        },
                        "Only what is worth a retry is retried (75): not a merge that failed (1), that cannot start "
                        "(2) or that finds something else in place (3). A pod that is evicted costs no retry.",
                    ),
                    "template": template,
                }
            },
        },
    }  # fmt: skip


def ray_cron_job(rendering: Rendering) -> dict[str, Any]:
    """A cluster for each tick, by KubeRay itself. Its jobs carry no labels, so no queue takes hold of them."""
    schedule, job = _schedule(rendering), rendering.site.job
    rules = [
        {"policy": policy, "condition": {**condition, "ttlSeconds": seconds}}
        for policy, seconds in (("DeleteCluster", job.ttl_seconds), ("DeleteSelf", max(KEPT_SECONDS, job.ttl_seconds)))
        for condition in (
            {"jobStatus": "SUCCEEDED"}, {"jobStatus": "FAILED"}, {"jobDeploymentStatus": "Failed"},
        )
    ]  # fmt: skip
    return {
        "apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": rendering.metadata(),
        "spec": {
            "schedule": schedule.cron,
            "timeZone": schedule.timezone,
            "jobTemplate": {
                **job_spec(rendering),
                "deletionStrategy": Noted(
                    {"deletionRules": rules}, "The RayJobs of past ticks would else stay for ever, each with its pods."
                ),
            },
        },
    }  # fmt: skip


def _schedule(rendering: Rendering) -> Schedule:
    assert rendering.schedule is not None
    return rendering.schedule
