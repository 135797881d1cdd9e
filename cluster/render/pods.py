"""Pod templates: the Ray head, which drives; the workers; and who submits.

All run as uid 1000 of the image without privileges, with requests equal to limits (Ray counts what a pod may use), and
take secrets by name alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from cluster.render.rendering import CONFIG_FOLDER, METRICS_PORT, SUBMITTER_LABEL, Rendering
from cluster.render.sizing import Sizing, worker_group
from cluster.render.text import Noted
from merger.manifest.placement import GpuWorkers, Toleration

DRAIN_SECONDS: Final = 60
GRACE_SECONDS: Final = 90
"""More than Ray takes to drain a node."""
USER, GROUP = 1000, 100
"""Of the user `ray` in Ray's images, and in ours."""
_SPOT: Final[Mapping[str, tuple[str, str, bool]]] = {
    "karpenter": ("karpenter.sh/capacity-type", "spot", False),
    "eks": ("eks.amazonaws.com/capacityType", "SPOT", False),
    "gke": ("cloud.google.com/gke-spot", "true", True),
    "aks": ("kubernetes.azure.com/scalesetpriority", "spot", True),
}
"""Label of a spot node, and whether it is also a taint."""


def head_template(rendering: Rendering, *, reads_manifest: bool) -> dict[str, Any]:
    """The pod of Ray's head. With `reads_manifest` it holds what the job's entry point reads."""
    site = rendering.site
    head = site.head
    resources = _resources(head.cpu, head.memory, head.ephemeral_storage)
    mounts, volumes = _volumes(rendering, head.ephemeral_storage, reads_manifest=reads_manifest)
    environment = [
        *_fixed_environment(),
        Noted(
            {"name": "RAYMERGE_START_SECONDS", "value": str(site.job.start_seconds)},
            "How long the driver waits for the first worker: pods and machines have to come up.",
        ),
        *_environment(rendering),
    ]
    container = {
        "name": "ray-head",
        **_image(rendering),
        "env": environment,
        **_environment_from(rendering),
        "ports": [
            {"name": "gcs-server", "containerPort": 6379}, {"name": "dashboard", "containerPort": 8265},
            {"name": "metrics", "containerPort": METRICS_PORT},
        ],
        "resources": resources,
        "securityContext": _container_security(),
        "volumeMounts": mounts,
    }  # fmt: skip
    annotations = {
        **site.annotations,
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }
    return {
        "metadata": {
            "labels": rendering.pod_labels,
            "annotations": Noted(annotations, "With the head goes the driver: keep it off machines that are given up."),
        },
        "spec": {
            **_pod(rendering, head.node_selector, head.tolerations),
            "automountServiceAccountToken": Noted(
                site.autoscales, "Only the autoscaler beside the head speaks with the API server."
            ),
            "containers": [container],
            "volumes": volumes,
        },
    }


def worker_template(rendering: Rendering, sizing: Sizing) -> dict[str, Any]:
    """The pod of workers."""
    group = worker_group(rendering.site, sizing.device)
    resources = _resources(sizing.pod_cpu, sizing.pod_memory, group.ephemeral_storage)
    tolerations = list(group.tolerations)
    selector = dict(group.node_selector)
    if isinstance(group, GpuWorkers):
        for amounts in resources.values():
            amounts[group.resource] = str(sizing.pod_gpus)
        tolerations.append(Toleration(key=group.resource, operator="Exists", effect="NoSchedule"))
    if group.spot is not None:
        label, value, tainted = _SPOT[group.spot]
        selector[label] = value
        if tainted:
            tolerations.append(Toleration(key=label, value=value, effect="NoSchedule"))
    mounts, volumes = _volumes(rendering, group.ephemeral_storage, reads_manifest=False)
    container = {
        "name": "ray-worker",
        **_image(rendering),
        "env": [*_fixed_environment(), *_environment(rendering)],
        **_environment_from(rendering),
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
        "resources": resources,
        "securityContext": _container_security(),
        "volumeMounts": mounts,
    }
    metadata: dict[str, Any] = {"labels": rendering.pod_labels}
    if rendering.site.annotations:
        metadata["annotations"] = dict(rendering.site.annotations)
    return {
        "metadata": metadata,
        "spec": {
            **_pod(rendering, selector, tolerations),
            "automountServiceAccountToken": False,
            "topologySpreadConstraints": Noted(
                [
                    {
                        "maxSkew": 1,
                        "topologyKey": "kubernetes.io/hostname",
                        "whenUnsatisfiable": "ScheduleAnyway",
                        "labelSelector": {"matchLabels": {"app.kubernetes.io/instance": rendering.name}},
                    }
                ],
                "A merge is bound by networks, which machines have and pods share.",
            ),
            "containers": [container],
            "volumes": volumes,
        },
    }


def submitter_template(
    rendering: Rendering, *, container: str, command: Sequence[str] | None, environment: Sequence[Any] = (),
    submits_to: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The pod that hands a job in and waits for its end. Without a command KubeRay brings one."""
    labels = rendering.pod_labels
    if submits_to is not None:
        labels = {**labels, SUBMITTER_LABEL: submits_to}
    filled: dict[str, Any] = {"name": container, **_image(rendering)}
    volumes: list[Any] = []
    if command is not None:
        mounts, volumes = _manifest_volume(rendering)
        seen, places = _site_volumes(rendering)  # it plans what it submits, from what the workers will read
        volumes = volumes + places
        filled |= {"command": list(command), "volumeMounts": mounts + seen}
        environment = [*environment, *_environment(rendering)]
        filled |= _environment_from(rendering)
    if environment:
        filled["env"] = list(environment)
    filled["resources"] = _resources(0.5, 1 << 30, 1 << 30)
    filled["securityContext"] = _container_security()
    spec = {
        **_pod(rendering, {}, ()),
        "automountServiceAccountToken": False,
        "restartPolicy": "Never",
        "containers": [filled],
    }
    return {"metadata": {"labels": labels}, "spec": {**spec, "volumes": volumes} if volumes else spec}


def _pod(rendering: Rendering, selector: Mapping[str, str], tolerations: Sequence[Toleration]) -> dict[str, Any]:
    site = rendering.site
    found: dict[str, Any] = {}
    if site.service_account is not None:
        found["serviceAccountName"] = site.service_account.name
    if site.image_pull_secrets:
        found["imagePullSecrets"] = [{"name": name} for name in site.image_pull_secrets]
    if site.priority_class is not None:
        found["priorityClassName"] = site.priority_class
    if joined := {**site.node_selector, **selector}:
        found["nodeSelector"] = joined
    if bears := [*site.tolerations, *tolerations]:
        found["tolerations"] = [_toleration(one) for one in bears]
    found["terminationGracePeriodSeconds"] = GRACE_SECONDS
    found["securityContext"] = {
        "runAsNonRoot": True, "runAsUser": USER, "runAsGroup": GROUP, "fsGroup": GROUP,
        "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    return found


def _toleration(one: Toleration) -> dict[str, str]:
    fields: dict[str, str | None] = {
        "key": one.key, "operator": one.operator, "value": one.value, "effect": one.effect,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value is not None}


def _image(rendering: Rendering) -> dict[str, Any]:
    return {"image": rendering.image, "imagePullPolicy": rendering.site.image_pull_policy}


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "privileged": False, "capabilities": {"drop": ["ALL"]}}


def _resources(cpu: float, memory: int, ephemeral: int) -> dict[str, dict[str, str]]:
    amounts = {"cpu": cpu_text(cpu), "memory": bytes_text(memory), "ephemeral-storage": bytes_text(ephemeral)}
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _fixed_environment() -> list[Any]:
    return [
        {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(DRAIN_SECONDS)},
        {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
    ]


def _environment(rendering: Rendering) -> list[Any]:
    secrets = rendering.site.secrets.env
    return [
        *({"name": name, "value": value} for name, value in sorted(rendering.site.env.items())),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": of.secret, "key": of.key}}}
            for name, of in sorted(secrets.items())
        ),
    ]


def _environment_from(rendering: Rendering) -> dict[str, Any]:
    names = rendering.site.secrets.env_from
    return {"envFrom": [{"secretRef": {"name": name}} for name in names]} if names else {}


def _volumes(rendering: Rendering, ephemeral: int, *, reads_manifest: bool) -> tuple[list[Any], list[Any]]:
    """(mounts, volumes) of a pod of Ray."""
    logs = {"sizeLimit": bytes_text(ephemeral // 2)}
    mounts: list[Any] = [{"name": "ray-logs", "mountPath": "/tmp/ray"}]  # noqa: S108 - where Ray writes
    volumes: list[Any] = [
        Noted({"name": "ray-logs", "emptyDir": logs}, "Logs of Ray; beyond the limit the pod is evicted, not the node.")
    ]
    if reads_manifest:
        mount, volume_of = _manifest_volume(rendering)
        mounts, volumes = mounts + mount, volumes + volume_of
    seen, places = _site_volumes(rendering)
    return mounts + seen, volumes + places


def _site_volumes(rendering: Rendering) -> tuple[list[Any], list[Any]]:
    """(mounts, volumes) that the site names."""
    mounts: list[Any] = []
    volumes: list[Any] = []
    for volume in rendering.site.volumes:
        mounts.append(_mount(volume.name, volume.mount, read_only=volume.read_only))
        claim: dict[str, Any] = {"claimName": volume.claim}
        if volume.read_only:
            claim["readOnly"] = True
        volumes.append({"name": volume.name, "persistentVolumeClaim": claim})
    for index, files in enumerate(rendering.site.secrets.files):
        name = f"secret-{index}"
        mounts.append(_mount(name, files.mount, read_only=True))
        volumes.append({"name": name, "secret": {"secretName": files.secret, "defaultMode": 0o440}})
    return mounts, volumes


def _manifest_volume(rendering: Rendering) -> tuple[list[Any], list[Any]]:
    return (
        [_mount("manifest", CONFIG_FOLDER, read_only=True)],
        [{"name": "manifest", "configMap": {"name": rendering.config_name}}],
    )


def _mount(name: str, path: str, *, read_only: bool) -> dict[str, Any]:
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}


def cpu_text(cpu: float) -> str:
    """Cores as Kubernetes writes them: `4`, `500m`."""
    return str(int(cpu)) if cpu == int(cpu) else f"{round(cpu * 1000)}m"


def bytes_text(count: int) -> str:
    """Bytes as Kubernetes writes them, exactly: `16Gi`, `1500Mi`, `1000000`."""
    units: tuple[tuple[Literal["Ti", "Gi", "Mi", "Ki"], int], ...] = (
        ("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10),
    )  # fmt: skip
    for unit, size in units:
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
