"""What must hold before a file is written: the site against the manifest, the plan and Kubernetes' own rules.

Everything that is wrong is found at once, with the key that says it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from cluster.render.base import Form
from cluster.render.rendering import CONFIG_FOLDER, INSTANCE_LABEL, SUBMITTER_LABEL
from cluster.render.sizing import RAY_OWN_BYTES, Demand, Sizing, worker_group
from merger.errors import Problem
from merger.manifest import Manifest, Reference
from merger.manifest.placement import Kubernetes
from merger.planning.memory import IDLE_BYTES
from merger.tensors import format_size

LONGEST_NAME: Final[dict[Form, int]] = {"rayjob": 47, "raycluster": 53, "cronjob": 52, "raycronjob": 36}
"""Characters: what KubeRay 1.7 and Kubernetes append to them has to fit too."""
CONFIG_BYTES: Final = 1 << 20
"""Of a ConfigMap."""
_NAME: Final = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_IMAGE: Final = re.compile(
    r"(?P<name>[a-z0-9]+(?:[._-][a-z0-9]+)*(?::[0-9]+)?(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_OWN_LABELS: Final = frozenset(
    {"app.kubernetes.io/name", INSTANCE_LABEL, "app.kubernetes.io/part-of", "app.kubernetes.io/created-by",
     SUBMITTER_LABEL}
)  # fmt: skip
_TAKEN: Final = ("/tmp/ray", CONFIG_FOLDER, "/dev/shm")  # noqa: S108 - of the pod


def name_of(text: str) -> str:
    """A file's name as a name of Kubernetes; empty where nothing of it can stay."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).lstrip("-0123456789").rstrip("-")


def check_site(
    name: str, site: Kubernetes, form: Form, *, manifests: Sequence[tuple[str, Manifest]], run_dir: str | None,
) -> list[Problem]:  # fmt: skip
    """What can be said before anything is planned. Each manifest comes with the name of its merge, for messages."""
    return [
        *_check_name(name, form),
        *_check_image(site),
        *_check_labels(site),
        *_check_queue(site, form),
        *_check_mounts(site),
        *_check_bounds(site),
        *(
            replace(problem, where=f"{label}{problem.where}")
            for label, manifest in manifests
            for problem in _check_places(site, manifest)
        ),
        *_check_run_dir(site, run_dir, [manifest for _, manifest in manifests]),
    ]


def check_sizing(site: Kubernetes, demand: Demand, sizing: Sizing) -> list[Problem]:
    """Whether what the plan needs fits the pods of the site."""
    group = worker_group(site, demand.device)
    key = "kubernetes.gpu_workers" if demand.device == "cuda" else "kubernetes.cpu_workers"
    found = []
    needed, share = demand.peak_bytes + IDLE_BYTES, sizing.memory // sizing.workers
    if share < demand.peak_bytes:
        found.append(Problem(
            "memory", f"a worker needs {format_size(demand.peak_bytes)} of buffers and gets {format_size(share)}",
            "cluster.memory", f"{sizing.workers} workers share it", "write more memory, or fewer workers",
        ))  # fmt: skip
    elif sizing.ray_memory < needed:
        found.append(Problem(
            "memory", f"a worker needs {format_size(needed)} and its pod gives {format_size(sizing.ray_memory)}",
            f"{key}.memory", "the plan's smallest blocks, or a tensor that the method holds whole, do not fit",
            f"write memory: {-(-(needed + RAY_OWN_BYTES) // (1 << 30))}Gi or more",
        ))  # fmt: skip
    if group.max is not None and sizing.pods > group.max:
        found.append(Problem(
            "too-few-pods", f"{sizing.workers} workers fill {sizing.pods} pods and {group.max} are allowed",
            f"{key}.max", "the merge would wait for workers that never start" if sizing.workers_per_pod * group.max < 1
            else "the rest of the workers would never start", "raise max, lower cluster.workers, or give larger pods",
        ))  # fmt: skip
    return found


def check_schedule(manifests: Sequence[tuple[str, Manifest]]) -> list[Problem]:
    """A merge that runs again and again has to be allowed to take the place of its last result, or to stand beside it.

    Each manifest comes with the name of its merge.
    """
    return [
        Problem(
            "schedule-refused", f"the second run would find the first one's output{_at(manifest)} and refuse it",
            f"{where}output.exists", "exists: refuse lets nothing be replaced and no version be kept",
            "write exists: version (each stands beside the last) or exists: replace",
        )
        for where, manifest in manifests
        if manifest.output.exists == "refuse"
    ]  # fmt: skip


def _at(manifest: Manifest) -> str:
    return "" if manifest.output.path is None else f" at {manifest.output.path}"


def _check_name(name: str, form: Form) -> Iterator[Problem]:
    longest = LONGEST_NAME[form]
    if not _NAME.fullmatch(name) or len(name) > longest:
        yield Problem(
            "bad-value", f"{name!r} is no name of a {form}", "kubernetes.name",
            f"they begin with a letter, hold lower-case letters, digits and -, and are {longest} long at the most",
            "write another name",
        )  # fmt: skip


def _check_image(site: Kubernetes) -> Iterator[Problem]:
    if site.image is None:
        yield Problem(
            "missing-key", "image is missing", "kubernetes.image", "pods run an image of your own registry",
            "build one with the Dockerfile under manifests/kuberay, and name it with its tag or digest",
        )  # fmt: skip
    for key, image in (("kubernetes.image", site.image), ("kubernetes.gpu_image", site.gpu_image)):
        if image is None:
            continue
        found = _IMAGE.fullmatch(image)
        if found is None:
            yield Problem("bad-value", f"{image!r} is no image", key,
                          fix="write registry/name:tag, or registry/name@sha256:…")  # fmt: skip
        elif found["digest"] is None and found["tag"] in (None, "latest"):
            yield Problem(
                "bad-value", f"the image {image} is not pinned", key, "pods that start later would run something else",
                "name a tag that never moves, or a digest",
            )  # fmt: skip


def _check_labels(site: Kubernetes) -> Iterator[Problem]:
    for key in site.labels:
        if key in _OWN_LABELS or key.startswith(("ray.io/", "kueue.x-k8s.io/", "volcano.sh/")):
            yield Problem("conflict", f"the label {key} is not free", "kubernetes.labels",
                          "raymerge, KubeRay or the queue sets it, and pods are found by it", "drop it")  # fmt: skip


def _check_queue(site: Kubernetes, form: Form) -> Iterator[Problem]:
    if site.queue is None:
        return
    if form == "raycronjob":
        yield Problem("conflict", "a queue has no hold on what a RayCronJob makes", "kubernetes.queue",
                      "KubeRay 1.7 gives those jobs no labels",
                      "render a CronJob (--as cronjob), or drop the queue")  # fmt: skip
    if site.queue.kueue is not None and site.autoscales:
        yield Problem("conflict", "Kueue admits a job as large as it will ever be, and this one grows",
                      "kubernetes.autoscaling", "its quota knows no autoscaler of Ray",
                      "write autoscaling: false")  # fmt: skip


def _check_mounts(site: Kubernetes) -> Iterator[Problem]:
    places = [(f"kubernetes.volumes[{i}].mount", v.mount) for i, v in enumerate(site.volumes)]
    places += [(f"kubernetes.secrets.files[{i}].mount", f.mount) for i, f in enumerate(site.secrets.files)]
    seen: dict[str, str] = {}
    for where, mount in places:
        if not mount.startswith("/") or mount != posixpath.normpath(mount) or mount == "/":
            yield Problem("bad-value", f"{mount!r} is no place to mount at", where, fix="write an absolute path")
        elif any(_below(mount, taken) or _below(taken, mount) for taken in _TAKEN):
            yield Problem("conflict", f"{mount} is taken in the pods", where, "Ray and the manifest lie there",
                          "mount it elsewhere")  # fmt: skip
        elif mount in seen:
            yield Problem("conflict", f"{mount} is mounted twice", where, f"{seen[mount]} is the other", "keep one")
        seen.setdefault(mount, where)
    names = [volume.name for volume in site.volumes]
    for index, volume in enumerate(site.volumes):
        where = f"kubernetes.volumes[{index}]"
        if names.index(volume.name) != index or volume.name in ("ray-logs", "manifest") or "." in volume.name \
                or len(volume.name) > 63 or volume.name.startswith("secret-"):  # fmt: skip
            yield Problem("conflict", f"{volume.name!r} cannot name a volume here", f"{where}.name",
                          "names are single, without dots, and ray-logs, manifest and secret-… are taken",
                          "choose another name")  # fmt: skip
        if volume.access == "ReadWriteOnce":
            yield Problem("conflict", f"the volume {volume.name} is for one machine", f"{where}.access",
                          "the head and every worker mount it, each where it runs",
                          "use a storage class that gives ReadWriteMany, or s3://")  # fmt: skip
        if volume.access == "ReadOnlyMany" and not volume.read_only:
            yield Problem("conflict", f"the volume {volume.name} cannot be written", f"{where}.access",
                          "its access is ReadOnlyMany", "write read_only: true")  # fmt: skip


def _check_bounds(site: Kubernetes) -> Iterator[Problem]:
    for key, group in (("cpu_workers", site.cpu_workers), ("gpu_workers", site.gpu_workers)):
        if group is not None and group.max is not None and group.min > group.max:
            yield Problem("conflict", f"min {group.min} is above max {group.max}", f"kubernetes.{key}.min",
                          fix="lower min or raise max")  # fmt: skip


def _check_places(site: Kubernetes, manifest: Manifest) -> Iterator[Problem]:
    """Everything a pod reads or writes has to be where every pod finds it."""
    for where, reference in _sources(manifest):
        if reference.kind == "local" and not _mounted(site, reference.root, writes=False):
            yield Problem("not-shared", f"no pod finds {reference}", where,
                          "it lies on no volume of kubernetes.volumes",
                          "mount a volume there, or name a source on the Hub or S3")  # fmt: skip
        elif reference.kind == "memory":
            yield Problem("not-shared", f"no pod finds {reference}", where, fix="name a source on the Hub or S3")
    out = manifest.output.path
    if out is None:
        yield Problem("no-output", "no output is named", "output.path", "a job has no command line to name it on",
                      "add output.path to the manifest")  # fmt: skip
    elif out.kind == "local" and not _mounted(site, out.root, writes=True):
        yield Problem("not-shared", f"{out} would be lost with its pod", "output.path",
                      "it lies on no volume of kubernetes.volumes that can be written",
                      "mount a volume there, or write to s3:// or hf://")  # fmt: skip


def _check_run_dir(site: Kubernetes, run_dir: str | None, manifests: Sequence[Manifest]) -> Iterator[Problem]:
    outputs = [manifest.output.path for manifest in manifests]
    if run_dir is None and any(out is not None and out.kind == "hub" for out in outputs):
        yield Problem(
            "missing-key", "run_dir is missing", "cluster.run_dir", "the state of a run whose output is a repository "
            "has to lie where every pod and every retry finds it", "write cluster: {run_dir: s3://bucket/runs}",
        )  # fmt: skip
    if run_dir is not None and "://" not in run_dir and not _mounted(site, run_dir, writes=True):
        yield Problem("not-shared", f"{run_dir} would be lost with its pod", "cluster.run_dir",
                      "it lies on no volume that can be written", "mount a volume there, or write s3://…")  # fmt: skip


def _sources(manifest: Manifest) -> Iterator[tuple[str, Reference]]:
    if manifest.base_model is not None:
        yield from (("base_model", part) for part in (manifest.base_model.model, *manifest.base_model.adapters))
    for i, entry in enumerate(manifest.adapters or ()):
        yield f"adapters[{i}].adapter", entry.adapter
    modules = [("", manifest.models, manifest.slices)]
    modules += [(f"modules.{name}.", module.models, module.slices) for name, module in (manifest.modules or {}).items()]
    for lead, models, slices in modules:
        for i, model in enumerate(models or ()):
            yield from ((f"{lead}models[{i}].model", part) for part in (model.model.model, *model.model.adapters))
        for i, piece in enumerate(slices or ()):
            for j, source in enumerate(piece.sources):
                parts = (source.model.model, *source.model.adapters)
                yield from ((f"{lead}slices[{i}].sources[{j}].model", part) for part in parts)


def _mounted(site: Kubernetes, path: str, *, writes: bool) -> bool:
    return any(_below(path, volume.mount) and not (writes and volume.read_only) for volume in site.volumes)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
