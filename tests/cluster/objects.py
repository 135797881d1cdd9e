"""What Kubernetes and KubeRay would refuse, without either: strict schemas, the rules in them, and the operator's own.

An API server prunes unknown fields of a custom resource in silence; here they are errors.
"""

from __future__ import annotations

import functools
import json
import lzma
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cel
import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.35"
SCHEMAS = Path(__file__).parent / "kuberay"
KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}
_OPEN = ("format", "default", "description", "nullable")


@functools.cache
def schema_of(kind: str) -> dict[str, Any]:
    """The schema of a custom resource, as KubeRay has it."""
    document = json.loads(lzma.decompress((SCHEMAS / f"{KINDS[kind]}.json.xz").read_bytes()))
    assert document["kind"] == kind
    found: dict[str, Any] = document["schema"]
    return found


@functools.cache
def _validator(kind: str) -> Any:
    schema = _strict(schema_of(kind))
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def _strict(node: Any) -> Any:
    """A structural schema as a JSON schema that takes no unknown field."""
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: value for key, value in node.items() if not key.startswith("x-") and key not in _OPEN}
    if node.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    if "properties" in node:
        made["properties"] = {key: _strict(value) for key, value in node["properties"].items()}
        if "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    if isinstance(node.get("additionalProperties"), dict):
        made["additionalProperties"] = _strict(node["additionalProperties"])
    if "items" in node:
        made["items"] = _strict(node["items"])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in node:
            made[key] = [_strict(part) for part in node[key]]
    return made


def check_object(document: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with one object; empty where nothing is."""
    kind = document["kind"]
    if kind == "Kustomization":
        return []
    metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
    if kind not in KINDS:
        return _core(document)
    wrong = [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in _validator(kind).iter_errors(document)]
    wrong += _core(metadata)
    if not wrong:
        wrong += list(_rules(schema_of(kind), document, ""))
        for path, template in _templates(document):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
            wrong += [f"{path}: {problem}" for problem in _core(pod)]
        wrong += list(_operator(document))
    return wrong


def _core(document: Mapping[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.path}: {error.message}"]
    return []


def _rules(schema: Any, value: Any, path: str) -> Iterator[str]:
    """The rules that the schema's authors wrote beside the types; those about an update have nothing to compare."""
    if not isinstance(schema, dict):
        return
    for rule in schema.get("x-kubernetes-validations", ()):
        if "oldSelf" not in rule["rule"] and not cel.evaluate(rule["rule"], {"self": value}):
            yield f"{path}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            yield from _rules(inner, item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _rules(schema.get("items"), item, f"{path}[{index}]")


def _templates(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("template", "submitterPodTemplate"):
                yield f"{path}.{key}", item
            else:
                yield from _templates(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _templates(item, f"{path}[{index}]")


# ---- what the operator refuses though the schema allows it (KubeRay 1.7.0) -------------------------------------------


def _operator(document: Mapping[str, Any]) -> Iterator[str]:
    kind, name, spec = document["kind"], document["metadata"]["name"], document["spec"]
    longest = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}[kind]
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"metadata.name: {name} is no DNS-1035 label of {longest} characters"
    if kind == "RayCluster":
        yield from _operator_cluster(spec)
        return
    if kind == "RayCronJob":
        if "TZ" in spec["schedule"]:
            yield "spec.schedule: the zone stands in timeZone"
        spec = spec["jobTemplate"]
    yield from _operator_job(spec)
    yield from _operator_cluster(spec["rayClusterSpec"])


def _operator_job(spec: Mapping[str, Any]) -> Iterator[str]:
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    rules = spec.get("deletionStrategy", {}).get("deletionRules")
    if spec.get("ttlSecondsAfterFinished", 0) and not shuts_down:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if rules and shuts_down:
        yield "deletionRules exclude shutdownAfterJobFinishes"
    order = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
    times: dict[str, dict[str, int]] = {}
    for rule in rules or ():
        condition = {key: value for key, value in rule["condition"].items() if key != "ttlSeconds"}
        of = times.setdefault(json.dumps(condition, sort_keys=True), {})
        if rule["policy"] in of:
            yield f"two rules {rule['policy']} for {condition}"
        of[rule["policy"]] = rule["condition"].get("ttlSeconds", 0)
        if rule["policy"] == "DeleteWorkers" and spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
            yield "DeleteWorkers excludes autoscaling"
    for of in times.values():
        found = [of[policy] for policy in order if policy in of]
        if found != sorted(found):
            yield "what is removed later has to have the longer time"
    if spec.get("activeDeadlineSeconds", 1) <= 0 or spec.get("preRunningDeadlineSeconds", 1) <= 0:
        yield "deadlines are positive"
    if spec.get("submitterPodTemplate") and spec.get("submissionMode", "K8sJobMode") != "K8sJobMode":
        yield "submitterPodTemplate is for K8sJobMode"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"


def _operator_cluster(spec: Mapping[str, Any]) -> Iterator[str]:
    autoscales = spec.get("enableInTreeAutoscaling", False)
    v2 = autoscales and spec.get("autoscalerOptions", {}).get("version") == "v2"
    if spec.get("authOptions", {}).get("mode") == "token":
        version = tuple(map(int, spec.get("rayVersion", "0").split(".")))
        if version < (2, 52, 0):
            yield "tokens need Ray 2.52"
    for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", ())):
        name = group.get("groupName", "head")
        start = group.get("rayStartParams", {})
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
            yield f"{name}: resources stand in rayStartParams and in resources"
        if "labels" in start:
            yield f"{name}: labels stand in rayStartParams"
        containers = group["template"]["spec"]["containers"]
        if not containers:
            yield f"{name}: there is no container"
            continue
        if v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy is Never under autoscaler v2"
        environment = {entry["name"] for entry in containers[0].get("env", ())}
        if environment & {"RAY_REDIS_ADDRESS", "REDIS_USERNAME"} or (v2 and "RAY_enable_autoscaler_v2" in environment):
            yield f"{name}: a variable that the operator keeps for itself"
    for group in spec.get("workerGroupSpecs", ()):
        if not autoscales and not {"minReplicas", "maxReplicas"} <= set(group):
            yield f"{group['groupName']}: minReplicas and maxReplicas are missing"
        if not 0 <= group.get("minReplicas", 0) <= group.get("maxReplicas", 2**31 - 1):
            yield f"{group['groupName']}: minReplicas is above maxReplicas"
        if "idleTimeoutSeconds" in group and not v2:
            yield f"{group['groupName']}: idleTimeoutSeconds needs autoscaler v2"
