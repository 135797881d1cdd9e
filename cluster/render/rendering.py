"""What is rendered: a merge or a bulk, its site, and the size that its plan came to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from cluster.render.sizing import Sizing
from merger.manifest import Schedule
from merger.manifest.placement import Kubernetes

CONFIG_FOLDER: Final = "/etc/raymerge"
MANIFEST_FILE: Final = "manifest.yaml"
MANIFEST_PATH: Final = f"{CONFIG_FOLDER}/{MANIFEST_FILE}"
DASHBOARD_PORT: Final = 8265
METRICS_PORT: Final = 8080
INSTANCE_LABEL: Final = "app.kubernetes.io/instance"
SUBMITTER_LABEL: Final = "raymerge-submitter"
"""Pods that carry it, with the cluster's name as value, may submit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """One manifest on one site."""

    name: str
    site: Kubernetes
    sizing: Sizing
    ray_version: str
    manifest_text: str
    """What the job reads: the manifest, canonical, with the workers and memory of `sizing`."""
    schedule: Schedule | None = None
    other_sizing: Sizing | None = None
    """Pods of the other kind, for a shared cluster that has both."""

    @property
    def image(self) -> str:
        """Of every pod: workers refuse a driver with another build of torch."""
        on_gpus = any(sizing is not None and sizing.device == "cuda" for sizing in (self.sizing, self.other_sizing))
        image = (self.site.gpu_image if on_gpus else None) or self.site.image
        assert image is not None
        return image

    @property
    def config_name(self) -> str:
        """The ConfigMap never changes: another manifest is another name."""
        return f"{self.name}-{hashlib.sha256(self.manifest_text.encode()).hexdigest()[:8]}"

    @property
    def entrypoint(self) -> str:
        return f"python -m jobs.merge {MANIFEST_PATH}"

    @property
    def labels(self) -> dict[str, str]:
        """Of every object but pods, whose app.kubernetes.io/name is KubeRay's to set."""
        return {"app.kubernetes.io/name": "raymerge", INSTANCE_LABEL: self.name, **self.site.labels}

    @property
    def pod_labels(self) -> dict[str, str]:
        return {INSTANCE_LABEL: self.name, "app.kubernetes.io/part-of": "raymerge", **self.site.labels}

    def metadata(self, name: str | None = None) -> dict[str, Any]:
        """Of an object of this rendering."""
        found: dict[str, Any] = {"name": name or self.name}
        if self.site.namespace is not None:
            found["namespace"] = self.site.namespace
        found["labels"] = self.labels
        if self.site.annotations:
            found["annotations"] = dict(self.site.annotations)
        return found
