"""Where a merge runs: `cluster:` (how many workers, of what kind) and `kubernetes:` (the site `render` writes for).

Neither is part of what a merge is: plans, digests and raymerge.json are the same without them, but for the kind of
device. No key here holds a secret: secrets are named, and Kubernetes fills them in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, PlainValidator, field_validator, model_validator

from merger.manifest.node import Bool, Finite, Int, Node, Size, Text, fail
from merger.manifest.references import holds_secret
from merger.tensors import parse_size

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_LABEL_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SOUNDS_SECRET: Final = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE_KEY|ACCESS_KEY|API_?KEY", re.IGNORECASE)
_NOT_SECRET: Final = re.compile(r"(_PATH|_FILE|_URI|_URL|_DIR|_NAME)$", re.IGNORECASE)
_USER_IN_URL: Final = re.compile(r"://[^/\s]*@")

MANAGED: Final = frozenset({
    "RAY_ADDRESS", "RAY_IP", "RAY_PORT", "FQ_RAY_IP", "RAY_CLUSTER_NAME", "RAY_CLUSTER_NAMESPACE", "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME",
    "RAY_enable_autoscaler_v2", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAYMERGE_START_SECONDS",
})  # fmt: skip
"""Variables of the environment that KubeRay, Ray or the rendered files set."""


def _quantity(value: object) -> int:
    """Bytes, also as Kubernetes spells them (`16Gi`)."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9.]+\s*[KMGT]i\s*", value):
        value = value.strip() + "B"
    if isinstance(value, bool) or not isinstance(value, str | int):
        fail("bad_value", "a size is a number with a unit", fix="write it as 16GiB, 16Gi or 20GB")
    try:
        return parse_size(value)
    except ValueError as error:
        fail("bad_value", str(error))


def _name(value: object) -> str:
    if not isinstance(value, str) or len(value) > 253 or not _NAME.fullmatch(value):
        fail("bad_value", "this is no name of a Kubernetes object", why="they hold lower-case letters, digits, - and .",
             fix="write a name such as model-cache")  # fmt: skip
    return value


def _environment(value: object) -> dict[str, str]:
    """Plain settings. What looks like a secret is refused, and never repeated in a message."""
    if not isinstance(value, Mapping):
        fail("bad_value", "env is a mapping of names to text")
    for name, text in value.items():
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            fail("bad_value", "a name in env is no name of an environment variable", fix="letters, digits and _")
        if name in MANAGED:
            fail("conflict", f"{name} is set by what is rendered, by KubeRay or by Ray", fix=f"drop {name}")
        if not isinstance(text, str):
            fail("bad_value", f"the value of {name} is no text", fix="quote it")
        sounds = _SOUNDS_SECRET.search(name) and not _NOT_SECRET.search(name)
        if sounds or holds_secret(text) or _USER_IN_URL.search(text):
            fail(
                "secret-in-clear", f"{name} looks like a secret",
                why="a manifest and rendered files are read by many; secrets are named there, never written",
                fix=f"write kubernetes.secrets.env: {{{name}: {{secret: NAME, key: KEY}}}}",
            )  # fmt: skip
    return dict(value)


def _labels(value: object) -> dict[str, str]:
    found = _annotations(value)
    for key, text in found.items():
        if text and not _LABEL_NAME.fullmatch(text):
            fail("bad_value", f"the value of the label {key} is not allowed",
                 why="a label holds up to 63 letters, digits, -, _ and .", fix="write an annotation")  # fmt: skip
    return found


def _annotations(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping):
        fail("bad_value", "a mapping of text to text is expected")
    for key, text in value.items():
        prefix, slash, name = str(key).rpartition("/")
        if not isinstance(key, str) or not _LABEL_NAME.fullmatch(name) or (slash and not _NAME.fullmatch(prefix)):
            fail("bad_value", f"{key!r} is no key of a label or an annotation", fix="write name or domain/name")
        if not isinstance(text, str):
            fail("bad_value", f"the value of {key} is no text", why="YAML reads true, 1 and 2024-01-01 as other things",
                 fix="quote it")  # fmt: skip
    return dict(value)


Quantity = Annotated[int, PlainValidator(_quantity)]
Name = Annotated[str, PlainValidator(_name)]
Labels = Annotated[Mapping[str, str], PlainValidator(_labels)]
Annotations = Annotated[Mapping[str, str], PlainValidator(_annotations)]
Environment = Annotated[Mapping[str, str], PlainValidator(_environment)]
Cpu = Annotated[Finite, Field(gt=0, le=1024)]


class Cluster(Node):
    """What the command line's options of the same names say; they win."""

    workers: Annotated[Int, Field(ge=1, le=10_000)] | None = None
    memory: Size | None = None
    """Bytes of buffers of all workers together."""
    device: Literal["cpu", "cuda"] | None = None
    gpus_per_worker: Annotated[Finite, Field(gt=0, le=1)] | None = None
    device_memory: Size | None = None
    """Bytes of its GPU that a worker may take."""
    run_dir: Text | None = None

    @field_validator("gpus_per_worker", mode="after")
    @classmethod
    def _check_share(cls, value: float | None) -> float | None:
        if value is not None and value not in {2.0**-n for n in range(7)}:
            fail("bad_value", f"{value:g} GPUs a worker", why="a GPU is shared by 2, 4, 8 … workers",
                 fix="use 1, 0.5, 0.25 …")  # fmt: skip
        return value


class Toleration(Node):
    """A taint that pods bear, in Kubernetes' own words."""

    key: Text | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _check_value(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            fail("conflict", "operator: Exists takes no value", fix="drop the value, or write operator: Equal")
        if self.operator == "Equal" and self.key is None:
            fail("missing_key", "key is missing", why="without a key only operator: Exists is allowed")
        return self


class SecretKey(Node):
    """One key of a Secret that exists in the namespace."""

    secret: Name
    key: Text

    @model_validator(mode="before")
    @classmethod
    def _refuse_value(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):  # never repeated: it may be the secret itself
            fail("secret-in-clear", "a secret is named here, never written", fix="write {secret: NAME, key: KEY}")
        return value


class SecretFiles(Node):
    """A Secret whose keys become files under a folder."""

    secret: Name
    mount: Text


def _variable(value: object) -> str:
    if not isinstance(value, str) or not _VARIABLE.fullmatch(value):
        fail("bad_value", "this is no name of an environment variable", fix="letters, digits and _")
    if value in MANAGED:
        fail("conflict", f"{value} is set by what is rendered, by KubeRay or by Ray", fix="see kubernetes.auth_secret")
    return value


class Secrets(Node):
    """Secrets by name. They reach the head and the workers."""

    env: Mapping[Annotated[str, PlainValidator(_variable)], SecretKey] = Field(default_factory=dict)
    env_from: tuple[Name, ...] = ()
    """Secrets each of whose keys becomes a variable."""
    files: tuple[SecretFiles, ...] = ()


class ServiceAccount(Node):
    """Whom the pods are. Annotations bind it to a cloud's identity (IRSA, Workload Identity)."""

    name: Name
    create: Bool = True
    annotations: Annotations = Field(default_factory=dict)


class Volume(Node):
    """A volume claim that the head and every worker mount at the same place."""

    name: Name
    claim: Name
    mount: Text
    read_only: Bool = False
    size: Quantity | None = None
    """Where given, the claim is rendered too; else it exists."""
    storage_class: Name | None = None
    access: Literal["ReadWriteMany", "ReadOnlyMany", "ReadWriteOnce"] = "ReadWriteMany"


class Queue(Node):
    """Who admits the job."""

    kueue: Name | None = None
    volcano: Name | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Queue:
        if (self.kueue is None) == (self.volcano is None):
            fail("conflict", "a queue is either kueue's or volcano's", fix="write {kueue: NAME} or {volcano: NAME}")
        return self


class Head(Node):
    """The pod of the driver; no tensor passes through it."""

    cpu: Cpu = 2
    memory: Quantity = 8 << 30
    ephemeral_storage: Quantity = 20 << 30
    node_selector: Labels = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()


class Workers(Node):
    """Pods of one kind. What is not said is sized from the plan."""

    cpu: Cpu | None = None
    memory: Quantity | None = None
    ephemeral_storage: Quantity = 20 << 30
    min: Annotated[Int, Field(ge=0)] = 0
    """Pods that an autoscaled cluster keeps."""
    max: Annotated[Int, Field(ge=1)] | None = None
    """Pods at the most."""
    spot: Literal["karpenter", "eks", "gke", "aks"] | None = None
    """Whose spot machines to ask for."""
    node_selector: Labels = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()


class GpuWorkers(Workers):
    """Pods with GPUs."""

    gpus: Annotated[Int, Field(ge=1, le=16)] = 1
    resource: Text = "nvidia.com/gpu"


class NetworkPolicy(Node):
    """Who may speak with the pods, and with whom they may."""

    enabled: Bool = True
    operator_namespace: Name = "kuberay-operator"
    monitoring_namespace: Name | None = None
    """May scrape metrics (8080)."""
    egress_ports: tuple[Annotated[Int, Field(ge=1, le=65535)], ...] = (443, 6443)
    """Ports of the world outside: the Hub, S3, the API server."""


class Job(Node):
    """How KubeRay runs the merge."""

    submission: Literal["HTTPMode", "K8sJobMode", "SidecarMode"] = "HTTPMode"
    retries: Annotated[Int, Field(ge=0, le=20)] = 3
    """Each is a new cluster, which resumes."""
    deadline_seconds: Annotated[Int, Field(ge=60)] = 12 * 3600
    start_seconds: Annotated[Int, Field(ge=60)] = 1800
    """From creation until the job runs."""
    ttl_seconds: Annotated[Int, Field(ge=0)] = 600
    """How long the cluster stays when the job has ended."""


class Kubernetes(Node):
    """A site. `render` reads it; `merge` and `plan` do not."""

    says_defaults: ClassVar[bool] = False

    name: Name | None = None
    """What everything is called; default the manifest's file name."""
    namespace: Name | None = None
    image: Text | None = None
    """Required by `render`, with a tag or a digest."""
    gpu_image: Text | None = None
    """Of all pods, the head too, where some have GPUs: driver and workers need one build of torch. Default: image."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[Name, ...] = ()
    ray_version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")] | None = None
    """Of the image; default the one installed here."""
    service_account: ServiceAccount | None = None
    labels: Labels = Field(default_factory=dict)
    annotations: Annotations = Field(default_factory=dict)
    node_selector: Labels = Field(default_factory=dict)
    """Of every pod; a group's own go over it."""
    tolerations: tuple[Toleration, ...] = ()
    priority_class: Name | None = None
    queue: Queue | None = None
    volumes: tuple[Volume, ...] = ()
    env: Environment = Field(default_factory=dict)
    secrets: Secrets = Field(default_factory=Secrets)
    auth: Literal["token", "disabled"] = "token"
    auth_secret: Name | None = None
    """A Secret with the key auth_token; default: KubeRay makes one."""
    head: Head = Field(default_factory=Head)
    cpu_workers: Workers = Field(default_factory=Workers)
    gpu_workers: GpuWorkers | None = None
    autoscaling: Bool | None = None
    """None: true, but for Kueue."""
    idle_seconds: Annotated[Int, Field(ge=0)] = 120
    network_policy: NetworkPolicy = Field(default_factory=NetworkPolicy)
    job: Job = Field(default_factory=Job)

    @model_validator(mode="after")
    def _check_variables(self) -> Kubernetes:
        for name in self.secrets.env:
            if name in self.env:
                fail("conflict", f"{name} stands in env and in secrets.env", fix="keep one of them")
        return self

    @property
    def autoscales(self) -> bool:
        if self.autoscaling is not None:
            return self.autoscaling
        return self.queue is None or self.queue.kueue is None
