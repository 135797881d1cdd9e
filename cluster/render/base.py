"""Which files make a kustomize base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from cluster.render.rayjob import ray_cluster, ray_job
from cluster.render.rendering import Rendering
from cluster.render.schedules import cron_job, ray_cron_job
from cluster.render.surroundings import config_map, network_policy, service_account, volume_claim
from cluster.render.text import as_yaml
from merger.errors import PlanError
from merger.manifest.references import holds_secret

Form = Literal["rayjob", "raycluster", "cronjob", "raycronjob"]
FORMS: Final[tuple[Form, ...]] = ("rayjob", "raycluster", "cronjob", "raycronjob")
MARK: Final = "Rendered by `raymerge render"
"""Every file begins with it: a file without it is somebody's own."""


def render_base(
    rendering: Rendering, form: Form, *, command: str, address: str | None = None, insecure: bool = False
) -> dict[str, str]:
    """File names and their text, kustomization.yaml first. `command` is what made them, for their first line.

    `address` is the cluster that a CronJob submits to, `insecure` whether over plain http or without a token; without
    an address a shared one is rendered beside it.
    """
    objects = _objects(rendering, form, address, insecure)
    note = f"{MARK} {command}`. Change the manifest or the site's values, not this file."
    files = {"kustomization.yaml": as_yaml(_kustomization(rendering, objects), note=note)}
    files |= {f"{name}.yaml": as_yaml(document, note=note) for name, document in objects.items()}
    for name, text in files.items():
        if holds_secret(text):
            raise PlanError.of(
                "secret-in-clear", "what would be written looks as if it held a secret", where=name,
                why="rendered files are read by many", fix="name the secret under kubernetes.secrets",
            )  # fmt: skip
    return files


def _objects(rendering: Rendering, form: Form, address: str | None, insecure: bool) -> Mapping[str, Mapping[str, Any]]:
    site = rendering.site
    found: dict[str, dict[str, Any]] = {}
    if site.service_account is not None and site.service_account.create:
        found["serviceaccount"] = service_account(rendering)
    for volume in site.volumes:
        if volume.size is not None:
            found[f"volume-{volume.name}"] = volume_claim(rendering, volume)
    owns_cluster = form != "cronjob" or address is None
    if site.network_policy.enabled and owns_cluster:
        found["networkpolicy"] = network_policy(rendering)
    if form != "raycluster":
        found["manifest"] = config_map(rendering)
    if form == "rayjob":
        found["rayjob"] = ray_job(rendering)
    elif form == "raycronjob":
        found["raycronjob"] = ray_cron_job(rendering)
    elif owns_cluster:
        found["raycluster"] = ray_cluster(rendering)
    if form == "cronjob":
        found["cronjob"] = cron_job(rendering, address=address, insecure=insecure)
    return found


def _kustomization(rendering: Rendering, objects: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    if rendering.site.namespace is not None:
        found["namespace"] = rendering.site.namespace
    found["resources"] = [f"{name}.yaml" for name in objects]
    return found
