"""Rendering: sizes, sites, text. What is rendered of the examples is in test_examples.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.render.base import FORMS, Form, render_base
from cluster.render.pods import bytes_text, cpu_text
from cluster.render.rendering import Rendering
from cluster.render.sites import check_schedule, check_site, check_sizing, name_of
from cluster.render.sizing import GIB, RAY_OWN_BYTES, Demand, read_demand, size_cluster
from cluster.render.text import Noted, as_yaml, plain
from merger.errors import ManifestError, PlanError
from merger.manifest import Manifest, Schedule, load_manifest
from merger.manifest.placement import Cluster, Kubernetes
from merger.planning.memory import IDLE_BYTES
from tests.cluster.objects import check_object

IMAGE = "registry.example.com:5000/team/raymerge:0.1.0"
STREAMS = Demand(moved_bytes=100 * GIB, peak_bytes=10 << 20, flops=0.0, units=5000, device="cpu")
COMPUTES = Demand(moved_bytes=GIB, peak_bytes=20 * GIB, flops=2e15, units=300, device="cpu")


# ---- text ------------------------------------------------------------------------------------------------------------

_leaves = st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(
    ["", "yes", "0", "1e3", "a: b", "- a", "#", "x\ny", "x\ny\n", " x\n", "\n", "a\n\n", "2024-01-01", "~", "'", "{}"]
)  # fmt: skip
_trees = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=4)
        | st.tuples(inner, st.text("ab #:\n", max_size=200)).map(lambda pair: Noted(*pair))
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.text(min_size=1, max_size=8), _trees, max_size=5))
def test_yaml_reads_back_as_the_same_values(tree: dict[str, Any]) -> None:
    def unnested(value: Any) -> Any:
        """A note stands on a value, not on another note."""
        if isinstance(value, Noted):
            inner = unnested(value.value)
            return inner if isinstance(inner, Noted) else Noted(inner, value.note)
        if isinstance(value, dict):
            return {key: unnested(item) for key, item in value.items()}
        return [unnested(item) for item in value] if isinstance(value, list) else value

    tree = unnested(tree)
    assert (yaml.safe_load(as_yaml(tree, note="a\nnote")) or {}) == plain(tree)


def test_quantities_are_exact() -> None:
    assert [bytes_text(n) for n in (16 << 30, 1500 << 20, 10**6, 3 << 40)] == ["16Gi", "1500Mi", "1000000", "3Ti"]
    assert [cpu_text(n) for n in (4, 0.5, 1.25)] == ["4", "500m", "1250m"]


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_a_merge_that_streams_gets_workers_by_its_bytes_and_two_a_pod() -> None:
    found = size_cluster(STREAMS, Cluster(), Kubernetes())
    assert (found.workers, found.workers_per_pod, found.pods, found.pod_cpu) == (7, 2, 4, 4)
    assert found.memory == 7 * GIB


def test_a_merge_that_computes_gets_workers_by_its_operations_and_four_a_pod() -> None:
    found = size_cluster(COMPUTES, Cluster(), Kubernetes())
    assert (found.workers, found.workers_per_pod, found.pods, found.pod_cpu) == (20, 4, 5, 4)
    assert found.memory == 20 * 40 * GIB


def test_a_small_merge_gets_one_worker() -> None:
    found = size_cluster(Demand(10**6, 10**6, 0.0, 3, "cpu"), Cluster(), Kubernetes())
    assert (found.workers, found.pods, found.pod_memory) == (1, 1, 3 * GIB)


def test_no_worker_without_a_unit() -> None:
    assert size_cluster(Demand(10**12, 10**6, 0.0, 3, "cpu"), Cluster(), Kubernetes()).workers == 3


def test_what_the_manifest_says_wins() -> None:
    site = Kubernetes.model_validate({"cpu_workers": {"cpu": 3, "memory": "32Gi"}})
    found = size_cluster(STREAMS, Cluster(workers=10, memory=20 * GIB), site)
    assert (found.workers, found.memory, found.workers_per_pod, found.pods) == (10, 20 * GIB, 3, 4)
    assert (found.pod_cpu, found.pod_memory) == (3, 32 * GIB)


@pytest.mark.parametrize("share, gpus, per_pod", [(1.0, 1, 1), (0.5, 1, 2), (0.25, 2, 8), (1.0, 4, 4)])
def test_gpus_are_shared_as_asked(share: float, gpus: int, per_pod: int) -> None:
    site = Kubernetes.model_validate({"gpu_workers": {"gpus": gpus}})
    demand = Demand(10**12, 10**6, 1e16, 10**4, "cuda")
    found = size_cluster(demand, Cluster(workers=16, gpus_per_worker=share), site)
    assert (found.workers_per_pod, found.pods, found.pod_gpus) == (per_pod, 16 // per_pod, gpus)


@given(
    st.builds(
        Demand, st.integers(0, 10**14), st.integers(1, 10**11), st.floats(0, 1e18), st.integers(1, 10**5),
        st.sampled_from(["cpu", "cuda"]),
    ),
    st.builds(Cluster, workers=st.none() | st.integers(1, 100)),
)  # fmt: skip
def test_what_is_not_said_is_sized_to_fit(demand: Demand, cluster: Cluster) -> None:
    site = Kubernetes()
    found = size_cluster(demand, cluster, site)
    assert check_sizing(site, demand, found) == []
    assert found.pods * found.workers_per_pod >= found.workers > (found.pods - 1) * found.workers_per_pod
    assert found.workers_per_pod * (found.memory // found.workers + IDLE_BYTES) <= found.ray_memory
    assert found.ray_memory + RAY_OWN_BYTES == found.pod_memory


def test_pods_too_small_for_the_plan_are_refused_with_the_size_they_need() -> None:
    site = Kubernetes.model_validate({"cpu_workers": {"memory": "16Gi"}})
    (problem,) = check_sizing(site, COMPUTES, size_cluster(COMPUTES, Cluster(), site))
    assert (problem.code, problem.where, problem.fix) == (
        "memory", "kubernetes.cpu_workers.memory", "write memory: 22Gi or more",
    )  # fmt: skip


def test_too_little_memory_for_all_workers_is_refused() -> None:
    cluster = Cluster(workers=4, memory=4 * GIB)
    (problem,) = check_sizing(Kubernetes(), COMPUTES, size_cluster(COMPUTES, cluster, Kubernetes()))
    assert problem.where == "cluster.memory"


def test_more_workers_than_pods_are_allowed_for_is_refused() -> None:
    site = Kubernetes.model_validate({"cpu_workers": {"max": 2}})
    (problem,) = check_sizing(site, STREAMS, size_cluster(STREAMS, Cluster(), site))
    assert (problem.code, problem.where) == ("too-few-pods", "kubernetes.cpu_workers.max")


@pytest.mark.parametrize("document", [{}, [], {"problems": []}, "x", None, [{"read_bytes": "a"}]])
def test_what_is_no_plan_is_refused(document: Any) -> None:
    with pytest.raises(ManifestError, match="no plan"):
        read_demand(document, where="plan.json", device="cpu")


def test_a_plan_with_problems_is_refused() -> None:
    document = {
        "read_bytes": 1, "passes": 1, "write_bytes": 1, "peak_memory_bytes": 1, "spectral_flops": 0, "units": 1,
        "problems": [{"code": "shape", "what": "w", "where": "x", "why": "", "fix": ""}],
    }  # fmt: skip
    with pytest.raises(PlanError, match="shape"):
        read_demand(document, where="plan.json", device="cpu")


# ---- sites -----------------------------------------------------------------------------------------------------------


def merge(**keys: Any) -> Manifest:
    return load_manifest({"adapters": [{"adapter": "hf://o/a"}], "output": {"path": "s3://bucket/out"}, **keys})


def checked(form: Form = "rayjob", *, name: str = "merge", run_dir: str | None = None, manifest: Manifest | None = None,
            **site: Any) -> dict[str, str]:  # fmt: skip
    found = check_site(name, Kubernetes.model_validate({"image": IMAGE, **site}), form, run_dir=run_dir,
                       manifests=[("", manifest or merge())])  # fmt: skip
    return {problem.where: problem.code for problem in found}


def test_a_good_site_passes() -> None:
    assert checked() == {}


VOLUME = {"name": "data", "claim": "data", "mount": "/data"}


@pytest.mark.parametrize(
    "site, where",
    [
        ({"image": None}, "kubernetes.image"),
        ({"image": "raymerge"}, "kubernetes.image"),
        ({"image": "raymerge:latest"}, "kubernetes.image"),
        ({"image": "Raymerge:1"}, "kubernetes.image"),
        ({"image": "a:1@sha256:12"}, "kubernetes.image"),
        ({"gpu_image": "a"}, "kubernetes.gpu_image"),
        ({"labels": {"ray.io/cluster": "x"}}, "kubernetes.labels"),
        ({"labels": {"app.kubernetes.io/instance": "x"}}, "kubernetes.labels"),
        ({"queue": {"kueue": "q"}, "autoscaling": True}, "kubernetes.autoscaling"),
        ({"volumes": [{**VOLUME, "mount": "data"}]}, "kubernetes.volumes[0].mount"),
        ({"volumes": [{**VOLUME, "mount": "/data/../etc"}]}, "kubernetes.volumes[0].mount"),
        ({"volumes": [{**VOLUME, "mount": "/tmp/ray/x"}]}, "kubernetes.volumes[0].mount"),
        ({"volumes": [{**VOLUME, "mount": "/etc"}]}, "kubernetes.volumes[0].mount"),
        ({"volumes": [VOLUME, {**VOLUME, "name": "b"}]}, "kubernetes.volumes[1].mount"),
        ({"volumes": [VOLUME, {**VOLUME, "mount": "/b"}]}, "kubernetes.volumes[1].name"),
        ({"volumes": [{**VOLUME, "name": "ray-logs"}]}, "kubernetes.volumes[0].name"),
        ({"volumes": [{**VOLUME, "access": "ReadWriteOnce"}]}, "kubernetes.volumes[0].access"),
        ({"volumes": [{**VOLUME, "access": "ReadOnlyMany"}]}, "kubernetes.volumes[0].access"),
        ({"volumes": [VOLUME], "secrets": {"files": [{"secret": "s", "mount": "/data"}]}},
         "kubernetes.secrets.files[0].mount"),
        ({"cpu_workers": {"min": 5, "max": 2}}, "kubernetes.cpu_workers.min"),
        ({"gpu_workers": {"min": 5, "max": 2}}, "kubernetes.gpu_workers.min"),
    ],
)  # fmt: skip
def test_a_mistake_of_a_site_is_named_by_its_key(site: dict[str, Any], where: str) -> None:
    assert set(checked(**site)) == {where}


def test_names_have_the_length_that_is_left_of_kuberays_own() -> None:
    for form, longest in (("rayjob", 47), ("raycluster", 53), ("cronjob", 52), ("raycronjob", 36)):
        assert checked(form, name="a" * longest) == {}  # type: ignore[arg-type] # the four forms
        assert set(checked(form, name="a" * (longest + 1))) == {"kubernetes.name"}  # type: ignore[arg-type]
    assert set(checked(name="")) == set(checked(name="1a")) == {"kubernetes.name"}


def test_files_give_names() -> None:
    assert [name_of(text) for text in ("My Merge_v2", "70b-merge", "über", "--")] == [
        "my-merge-v2",
        "b-merge",
        "ber",
        "",
    ]


def test_a_queue_has_no_hold_on_a_raycronjob() -> None:
    assert set(checked("raycronjob", queue={"volcano": "q"})) == {"kubernetes.queue"}


def test_what_no_pod_would_find_is_refused() -> None:
    local = merge(
        base_model="/data/base", adapters=[{"adapter": "/data/a"}, {"adapter": "/elsewhere/b"}],
        output={"path": "/data/out"},
    )  # fmt: skip
    assert checked(manifest=local, volumes=[VOLUME]) == {"adapters[1].adapter": "not-shared"}
    assert checked(manifest=local, volumes=[{**VOLUME, "read_only": True}]) == {
        "adapters[1].adapter": "not-shared", "output.path": "not-shared",
    }  # fmt: skip
    assert set(checked(manifest=local)) == {"base_model", "adapters[0].adapter", "adapters[1].adapter", "output.path"}


def test_sources_of_every_form_are_looked_at() -> None:
    one = {"model": "/x/a", "layer_range": [0, 2]}
    sliced = load_manifest(
        {"merge_method": "passthrough", "slices": [{"sources": [one]}], "output": {"path": "s3://bucket/o"}}
    )
    assert set(checked(manifest=sliced)) == {"slices[0].sources[0].model"}
    listed = load_manifest({
        "merge_method": "linear", "output": {"path": "s3://bucket/o"},
        "models": [{"model": "o/a+/x/lora", "parameters": {"weight": 1}}],
    })  # fmt: skip
    assert set(checked(manifest=listed)) == {"models[0].model"}


def test_an_output_is_needed_and_a_repository_needs_a_place_for_its_state() -> None:
    assert checked(manifest=merge(output={"kind": "adapter"})) == {"output.path": "no-output"}
    hub = merge(output={"path": "hf://o/out"})
    assert checked(manifest=hub) == {"cluster.run_dir": "missing-key"}
    assert checked(manifest=hub, run_dir="s3://bucket/runs") == {}
    assert checked(manifest=hub, run_dir="/runs") == {"cluster.run_dir": "not-shared"}


def test_a_schedule_has_to_be_allowed_to_replace_or_to_version() -> None:
    merges = [
        (f"{i}: ", merge(output={"path": f"s3://bucket/{exists}", "exists": exists}))
        for i, exists in enumerate(("refuse", "version", "replace"))
    ]
    (problem,) = check_schedule(merges)
    assert (problem.code, problem.where) == ("schedule-refused", "0: output.exists")
    assert "s3://bucket/refuse" in problem.what


# ---- what comes out --------------------------------------------------------------------------------------------------

SITES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {
        "namespace": "merges", "image_pull_secrets": ["registry"], "image_pull_policy": "Always",
        "service_account": {"name": "runner", "annotations": {"iam.gke.io/gcp-service-account": "a@b.c"}},
        "labels": {"team": "x"}, "annotations": {"note": "true"}, "node_selector": {"pool": "a"},
        "tolerations": [{"key": "k", "value": "v", "effect": "NoSchedule"}, {"operator": "Exists"}],
        "priority_class": "batch", "queue": {"volcano": "q"},
        "volumes": [{**VOLUME, "size": "1Ti", "storage_class": "nfs"},
                    {**VOLUME, "name": "b", "mount": "/b", "read_only": True}],
        "env": {"AWS_REGION": "x", "HF_HUB_OFFLINE": "1"},
        "secrets": {"env": {"HF_TOKEN": {"secret": "hub", "key": "token"}}, "env_from": ["aws"],
                    "files": [{"secret": "ca", "mount": "/etc/ca"}]},
        "head": {"cpu": 0.5, "memory": "4Gi", "node_selector": {"pool": "b"}, "tolerations": [{"key": "h"}]},
        "cpu_workers": {"cpu": 2, "memory": "16Gi", "min": 1, "max": 20, "spot": "gke"},
        "gpu_workers": {"gpus": 2, "spot": "aks", "resource": "nvidia.com/gpu", "node_selector": {"gpu": "l4"}},
        "network_policy": {"monitoring_namespace": "monitoring", "egress_ports": [443]},
        "job": {"submission": "K8sJobMode", "retries": 0, "ttl_seconds": 0}, "idle_seconds": 0,
    },
    "kueue": {"queue": {"kueue": "q"}, "auth_secret": "token"},
    "open": {"auth": "disabled", "network_policy": {"enabled": False}, "job": {"submission": "SidecarMode"},
             "autoscaling": False, "service_account": {"name": "x", "create": False}},
}  # fmt: skip


def rendered(form: Form, site: str, device: str = "cpu", **more: Any) -> dict[str, str]:
    keys = Kubernetes.model_validate({"image": IMAGE, **SITES[site]})
    demand = Demand(10**11, 10**9, 1e15, 10**4, "cuda" if device == "cuda" else "cpu")
    both = keys.gpu_workers is not None and form in ("raycluster", "cronjob")
    rendering = Rendering(
        name="m", site=keys, sizing=size_cluster(demand, Cluster(), keys), ray_version="2.60.0",
        manifest_text="adapters:\n- adapter: o/a\n", schedule=Schedule(cron="0 3 * * *", timezone="Europe/Berlin"),
        other_sizing=size_cluster(STREAMS, Cluster(), keys) if both and device == "cuda" else None,
    )  # fmt: skip
    return render_base(rendering, form, command="x", **more)


@pytest.mark.parametrize(
    "form, site, device",
    [*((form, site, "cpu") for form in FORMS for site in SITES), *((f, "all", "cuda") for f in FORMS)],
)
def test_every_object_is_valid(form: Form, site: str, device: str) -> None:
    files = rendered(form, site, device)
    documents = {name: yaml.safe_load(text) for name, text in files.items()}
    assert [problem for document in documents.values() for problem in check_object(document)] == []
    assert documents["kustomization.yaml"]["resources"] == [name for name in files if name != "kustomization.yaml"]
    names = [(d["kind"], d["metadata"]["name"]) for d in documents.values() if d["kind"] != "Kustomization"]
    assert len(set(names)) == len(names)


def pods(value: Any) -> list[dict[str, Any]]:
    """Every pod's spec below a value."""
    if isinstance(value, list):
        return [pod for item in value for pod in pods(item)]
    if not isinstance(value, dict):
        return []
    own = [value] if "containers" in value else []
    return own + [pod for item in value.values() for pod in pods(item)]


@pytest.mark.parametrize("form, site", list(itertools.product(FORMS, SITES)))
def test_no_pod_runs_as_root_or_without_limits(form: Form, site: str) -> None:
    found = [pod for text in rendered(form, site).values() for pod in pods(yaml.safe_load(text))]
    assert found
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["limits"])
            assert container["image"] == IMAGE
            mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounted == {volume["name"] for volume in pod.get("volumes", ())}


@pytest.mark.parametrize("form", FORMS)
def test_secrets_are_named_where_they_are_needed(form: Form) -> None:
    found = [pod for text in rendered(form, "all").values() for pod in pods(yaml.safe_load(text))]
    ray = [c for pod in found for c in pod["containers"] if c["name"] in ("ray-head", "ray-worker", "submit")]
    assert {"ray-head", "ray-worker"} <= {c["name"] for c in ray}
    for container in ray:
        named = {entry["name"]: entry for entry in container["env"]}
        assert named["HF_TOKEN"] == {
            "name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}},
        }  # fmt: skip
        assert container["envFrom"] == [{"secretRef": {"name": "aws"}}]


def test_the_policy_takes_hold_of_the_pods_and_of_nothing_else() -> None:
    for form in FORMS:
        files = rendered(form, "all")
        policy = yaml.safe_load(files["networkpolicy.yaml"])["spec"]
        chosen = policy["podSelector"]["matchLabels"]
        document = yaml.safe_load(files["raycluster.yaml" if "raycluster.yaml" in files else f"{form}.yaml"])
        spec = document["spec"].get("jobTemplate", document["spec"])
        spec = spec.get("rayClusterSpec", spec)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert chosen.items() <= group["template"]["metadata"]["labels"].items()
        opened = [port["port"] for rule in policy["ingress"] for port in rule.get("ports", ())]
        assert opened == [8265, 8080]
        assert all(rule.get("from") for rule in policy["ingress"])


def test_who_submits_may_reach_the_cluster_and_knows_its_token() -> None:
    files = {name: yaml.safe_load(text) for name, text in rendered("cronjob", "plain").items()}
    template = files["cronjob.yaml"]["spec"]["jobTemplate"]["spec"]["template"]
    allowed = files["networkpolicy.yaml"]["spec"]["ingress"][1]["from"][1]["podSelector"]["matchLabels"]
    assert allowed.items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    assert container["command"] == [
        "raymerge", "submit", "/etc/raymerge/manifest.yaml", "--address", "http://m-head-svc:8265", "--follow",
        "--insecure",
    ]  # fmt: skip
    token = container["env"][1]["valueFrom"]["secretKeyRef"]
    assert token == {"name": files["raycluster.yaml"]["metadata"]["name"], "key": "auth_token"}
    (volume,) = template["spec"]["volumes"]
    assert volume["configMap"]["name"] == files["manifest.yaml"]["metadata"]["name"]


def test_who_submits_sees_what_the_workers_see() -> None:
    (pod,) = pods(yaml.safe_load(rendered("cronjob", "all")["cronjob.yaml"]))
    (worker,) = pods(yaml.safe_load(rendered("cronjob", "all")["raycluster.yaml"])["spec"]["workerGroupSpecs"])
    theirs = {mount["mountPath"] for mount in worker["containers"][0]["volumeMounts"]} - {"/tmp/ray"}
    assert theirs < {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}


def test_a_schedule_for_a_cluster_elsewhere_brings_none() -> None:
    files = rendered("cronjob", "kueue", address="https://ray.example.com")
    assert set(files) == {"kustomization.yaml", "manifest.yaml", "cronjob.yaml"}
    (pod,) = pods(yaml.safe_load(files["cronjob.yaml"]))
    command = pod["containers"][0]["command"]
    assert command[3:] == ["--address", "https://ray.example.com", "--follow"]
    assert pod["containers"][0]["env"][1]["valueFrom"]["secretKeyRef"]["name"] == "token"


def test_ticks_never_overlap_and_only_what_is_worth_it_is_retried() -> None:
    spec = yaml.safe_load(rendered("cronjob", "plain")["cronjob.yaml"])["spec"]
    assert (spec["concurrencyPolicy"], spec["timeZone"]) == ("Forbid", "Europe/Berlin")
    rules = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[1]["onExitCodes"]["values"] == [1, 2, 3]


def test_another_manifest_is_another_config_map() -> None:
    def name(text: str) -> str:
        site = Kubernetes(image=IMAGE)
        sizing = size_cluster(STREAMS, Cluster(), site)
        return Rendering(name="m", site=site, sizing=sizing, ray_version="2.60.0", manifest_text=text).config_name

    assert name("a: 1") == name("a: 1") != name("a: 2")


def test_a_shared_cluster_has_a_group_for_each_kind_of_pod() -> None:
    spec = yaml.safe_load(rendered("raycluster", "all", "cuda")["raycluster.yaml"])["spec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    assert (groups["cpu"]["minReplicas"], groups["cpu"]["maxReplicas"]) == (1, 20)
    limits = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "2"
    assert {t.get("key") for t in groups["gpu"]["template"]["spec"]["tolerations"]} >= {
        "nvidia.com/gpu", "kubernetes.azure.com/scalesetpriority",
    }  # fmt: skip


def test_one_build_of_torch_for_driver_and_workers() -> None:
    site = Kubernetes.model_validate({"image": IMAGE, "gpu_image": f"{IMAGE}-gpu", "gpu_workers": {}})
    for device, image in (("cpu", IMAGE), ("cuda", f"{IMAGE}-gpu")):
        demand = read_demand(
            {"read_bytes": 1, "passes": 1, "write_bytes": 1, "peak_memory_bytes": 1, "spectral_flops": 0, "units": 1,
             "problems": []},
            where="", device="cuda" if device == "cuda" else "cpu",
        )  # fmt: skip
        made = Rendering(name="m", site=site, sizing=size_cluster(demand, Cluster(), site), ray_version="2.60.0",
                         manifest_text="a")  # fmt: skip
        found = [
            pod for text in render_base(made, "rayjob", command="x").values() for pod in pods(yaml.safe_load(text))
        ]
        assert {container["image"] for pod in found for container in pod["containers"]} == {image}


def test_a_secret_in_what_would_be_written_is_refused() -> None:
    site = Kubernetes(image=IMAGE)
    rendering = Rendering(
        name="m", site=site, sizing=size_cluster(STREAMS, Cluster(), site), ray_version="2.60.0",
        manifest_text="note: hf_" + "a" * 34,
    )  # fmt: skip
    with pytest.raises(PlanError, match="secret"):
        render_base(rendering, "rayjob", command="x")
