"""What a merge on Kubernetes stands among: its manifest, its account, its volumes, and who may speak with it."""

from __future__ import annotations

from typing import Any

from cluster.render.pods import bytes_text
from cluster.render.rendering import (
    DASHBOARD_PORT,
    INSTANCE_LABEL,
    MANIFEST_FILE,
    METRICS_PORT,
    SUBMITTER_LABEL,
    Rendering,
)
from cluster.render.text import Noted
from merger.manifest.placement import Volume


def config_map(rendering: Rendering) -> dict[str, Any]:
    """The manifest that the job reads."""
    return {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": rendering.metadata(rendering.config_name),
        "immutable": Noted(True, "Another manifest is another name: a running job never sees its manifest change."),
        "data": {MANIFEST_FILE: rendering.manifest_text},
    }  # fmt: skip


def service_account(rendering: Rendering) -> dict[str, Any]:
    """The account that the pods run as."""
    account = rendering.site.service_account
    assert account is not None
    metadata = rendering.metadata(account.name)
    if joined := {**rendering.site.annotations, **account.annotations}:
        metadata["annotations"] = joined
    return {
        "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata,
        "automountServiceAccountToken": Noted(False, "Pods that need the token ask for it."),
    }  # fmt: skip


def volume_claim(rendering: Rendering, volume: Volume) -> dict[str, Any]:
    """A claim that is made with the merge; it outlives it."""
    assert volume.size is not None
    spec: dict[str, Any] = {
        "accessModes": [volume.access], "resources": {"requests": {"storage": bytes_text(volume.size)}},
    }  # fmt: skip
    if volume.storage_class is not None:
        spec["storageClassName"] = volume.storage_class
    return {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": rendering.metadata(volume.claim), "spec": spec,
    }  # fmt: skip


def network_policy(rendering: Rendering) -> dict[str, Any]:
    """Pods of the cluster speak with each other; the operator and submitters reach the dashboard; the rest do not."""
    policy = rendering.site.network_policy
    own = {"podSelector": {"matchLabels": {INSTANCE_LABEL: rendering.name}}}
    ingress: list[Any] = [
        Noted({"from": [own]}, "Ray uses many ports between its own pods."),
        Noted(
            {
                "from": [
                    {
                        "namespaceSelector": _namespace(policy.operator_namespace),
                        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
                    },
                    {"podSelector": {"matchLabels": {SUBMITTER_LABEL: rendering.name}}},
                ],
                "ports": [{"port": DASHBOARD_PORT, "protocol": "TCP"}],
            },
            "KubeRay's operator, and pods that are labelled to submit.",
        ),
    ]
    if policy.monitoring_namespace is not None:
        ingress.append(
            {
                "from": [{"namespaceSelector": _namespace(policy.monitoring_namespace)}],
                "ports": [{"port": METRICS_PORT, "protocol": "TCP"}],
            }
        )
    egress = [
        {"to": [own]},
        Noted(
            {
                "to": [{"namespaceSelector": _namespace("kube-system")}],
                "ports": [{"port": 53, "protocol": protocol} for protocol in ("UDP", "TCP")],
            },
            "Names.",
        ),
        Noted(
            {"ports": [{"port": port, "protocol": "TCP"} for port in policy.egress_ports]},
            "The Hub, S3 and the API server, wherever they are. Some networks want the API server named otherwise "
            "(Cilium), and identities served on the machine (169.254.169.254 and its like) their own port.",
        ),
    ]
    return {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": rendering.metadata(),
        "spec": {
            "podSelector": {"matchLabels": {INSTANCE_LABEL: rendering.name}},
            "policyTypes": ["Ingress", "Egress"], "ingress": ingress, "egress": egress,
        },
    }  # fmt: skip


def _namespace(name: str) -> dict[str, Any]:
    return {"matchLabels": {"kubernetes.io/metadata.name": name}}
