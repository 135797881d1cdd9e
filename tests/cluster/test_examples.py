"""The examples under manifests/: what is rendered of them, the clusters of machines, the images.

The Hub of the tests stands in for the Hub: its repositories hold the demo's adapters under the examples' names. The
models of models.yaml are files of the right headers and no content: planning reads no tensor.

`RAYMERGE_UPDATE_DOCS=1` renders the examples again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.render.sizing import read_demand
from jobs.cli import main
from merger import api
from merger.manifest import BulkManifest, load_documents
from merger.planning.summary import plan_json
from tests.cluster.objects import check_object
from tests.conformance.remote import enter_hub
from tests.counterparts.hub import HubServer

ROOT = Path(__file__).parents[2]
KUBERAY = "manifests/kuberay"
SITE = ["--values", f"{KUBERAY}/site.yaml"]
RENDERED = {
    "adapters": ["kuberay", f"{KUBERAY}/adapters.yaml", *SITE],
    "models": ["kuberay", f"{KUBERAY}/models.yaml", *SITE, "--plan", f"{KUBERAY}/models.plan.json"],
    "shared": ["kuberay", f"{KUBERAY}/nightly.yaml", "--as", "raycluster", *SITE],
    "nightly": ["cron", f"{KUBERAY}/nightly.yaml", *SITE],
    "nightly-raycronjob": ["cron", f"{KUBERAY}/nightly.yaml", "--as", "raycronjob", *SITE],
}
"""Folders under manifests/kuberay/rendered, and the command that makes each."""
CANARIES = {"HF_TOKEN": "hf_" + "Z" * 34, "AWS_SECRET_ACCESS_KEY": "canary/" + "y" * 33}


@pytest.fixture(scope="module")
def published(hub_server: HubServer) -> HubServer:
    """A Hub with the examples' sources."""
    for name in ("json", "sql", "triage"):
        hub_server.create(f"example/{name}-lora", ROOT / "manifests" / "demo" / "adapters" / name)
    return hub_server


@pytest.fixture
def hub(published: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    enter_hub(monkeypatch, published, tmp_path / "cache")
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("folder", RENDERED)
def test_the_rendered_examples_are_what_would_be_rendered(hub: None, folder: str) -> None:
    out = f"{KUBERAY}/rendered/{folder}"
    check = [] if os.environ.get("RAYMERGE_UPDATE_DOCS") else ["--check"]
    assert main(["render", *RENDERED[folder], "-o", out, *check]) == 0


@pytest.mark.parametrize("folder", RENDERED)
def test_the_rendered_examples_are_valid(folder: str) -> None:
    files = sorted((ROOT / KUBERAY / "rendered" / folder).iterdir())
    documents = {file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    assert {name: found for name, document in documents.items() if (found := check_object(document))} == {}
    assert set(documents["kustomization.yaml"]["resources"]) == set(documents) - {"kustomization.yaml"}
    assert not set((ROOT / KUBERAY / "rendered").iterdir()) - {ROOT / KUBERAY / "rendered" / f for f in RENDERED}


@pytest.mark.parametrize("folder", [folder for folder in RENDERED if folder != "shared"])
def test_the_manifest_inside_is_the_one_that_was_rendered(folder: str) -> None:
    config = yaml.safe_load((ROOT / KUBERAY / "rendered" / folder / "manifest.yaml").read_text())
    (inside,) = load_documents(config["data"]["manifest.yaml"])
    (given,) = load_documents(ROOT / RENDERED[folder][1], site=ROOT / KUBERAY / "site.yaml")
    assert inside.cluster.workers is not None
    assert inside.cluster.memory is not None
    ours, theirs = (document.model_dump(mode="json") for document in (inside, given))
    for document in (ours, theirs):
        document.pop("cluster", None)
        document.pop("kubernetes", None)
    assert ours == theirs
    if isinstance(given, BulkManifest):
        assert given.schedule is not None


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", RENDERED)
def test_kustomize_builds_the_rendered_examples(folder: str) -> None:
    at = ROOT / KUBERAY / "rendered" / folder
    done = subprocess.run(["kubectl", "kustomize", str(at)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(list(at.iterdir())) - 1
    assert [found for document in built for found in check_object(document)] == []


@pytest.mark.parametrize("folder", RENDERED)
def test_no_value_of_a_secret_is_in_any_file(
    hub: None, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    hub_server: HubServer,
) -> None:  # fmt: skip
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARIES["AWS_SECRET_ACCESS_KEY"])
    assert main(["render", *RENDERED[folder], "-o", str(tmp_path / "out"), "--json"]) == 0
    text = "".join(file.read_text() for file in (tmp_path / "out").iterdir()) + "".join(capfd.readouterr())
    for value in (CANARIES["AWS_SECRET_ACCESS_KEY"], hub_server.write_token):
        assert value not in text


def test_the_plan_of_the_models_is_that_of_models_of_this_shape(tmp_path: Path) -> None:
    """manifests/kuberay/models.plan.json, made again from headers alone."""
    for name in ("base", "chat", "code", "math"):
        _headers_of_a_model(tmp_path / name)
    text = (ROOT / KUBERAY / "models.yaml").read_text().replace("/models/", f"{tmp_path}/")
    made = plan_json(api.plan(yaml.safe_load(text), device="cuda"))
    plan = ROOT / KUBERAY / "models.plan.json"
    if os.environ.get("RAYMERGE_UPDATE_DOCS") and made["read_bytes"] != json.loads(plan.read_text())["read_bytes"]:
        plan.write_text(json.dumps(made, indent=1).replace(str(tmp_path), "/models") + "\n")
    kept = json.loads(plan.read_text())
    assert read_demand(made, where="", device="cuda") == read_demand(kept, where="", device="cuda")


def _headers_of_a_model(folder: Path) -> None:
    """A model of seven billion parameters in the shape of Llama 2: a config, and a file that is a header and a hole."""
    hidden, inner, vocabulary, layers = 4096, 11008, 32000, 32
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden],
        "lm_head.weight": [vocabulary, hidden],
    }  # fmt: skip
    for layer in range(layers):
        lead = f"model.layers.{layer}"
        shapes |= {f"{lead}.self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
        shapes |= {f"{lead}.mlp.{name}_proj.weight": [inner, hidden] for name in ("gate", "up")}
        shapes[f"{lead}.mlp.down_proj.weight"] = [hidden, inner]
        shapes |= {f"{lead}.{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    written = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(written)) + written)
        file.truncate(8 + len(written) + at)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": vocabulary,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


# ---- machines --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validate() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Ray's own validator of `ray up` files; it speaks with no cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    def checked(document: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = prepare_config(document)
        validate_config(prepared)
        return prepared

    return checked


CLUSTERS = sorted((ROOT / "manifests" / "ray-cluster").glob("*.yaml"))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_ray_takes_the_machines(path: Path, validate: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    given = yaml.safe_load(path.read_text())
    prepared = validate(yaml.safe_load(path.read_text()))
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "initialization_commands"):
        assert prepared[key] == given[key], "Ray's defaults would install a nightly build"
    starts = [
        command for key, commands in prepared.items() if key.endswith("start_ray_commands") for command in commands
    ]
    started = [command for command in starts if "ray start" in command]
    assert len(started) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in started)
    assert not any("0.0.0.0" in command for command in started)
    assert prepared["file_mounts"].keys() == {"~/.ray/auth_token"}


@pytest.mark.parametrize(
    "mistake",
    [{"availible_node_types": {}}, {"max_workers": "eight"}, {"provider": {"type": "aws", "region": 3}}],
)
def test_ray_refuses_mistakes(mistake: dict[str, Any], validate: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    document = yaml.safe_load((ROOT / "manifests" / "ray-cluster" / "aws.yaml").read_text())
    with pytest.raises(Exception, match=r".+"):
        validate({**document, **mistake})


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_images_are_pinned_and_run_as_nobody_special(name: str) -> None:
    text = (ROOT / KUBERAY / name).read_text()
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    (image,) = [line.split("=", 1)[1] for line in lines if line.startswith("ARG RAY_IMAGE=")]
    assert image.startswith(f"rayproject/ray:{pins['ray']}-py311-")
    assert f"ray.__version__ == '{pins['ray']}'" in text
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["root", "1000:100"]
    installs = [line for line in lines if "pip install" in line]
    assert installs
    assert all("--constraint" in line for line in installs)
    assert not re.search(r"(?i)(token|secret|password|key)=", text)
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert all((ROOT / word).exists() for word in copied)
    ignored = (ROOT / KUBERAY / f"{name}.dockerignore").read_text().splitlines()
    assert {f"!{word}" for word in copied} <= set(ignored)
    assert set((ROOT / "pyproject.toml").read_text().splitlines()) >= {
        'readme = "README.md"',
        'license-files = ["LICENSE"]',
    }


def test_the_images_differ_in_their_base_alone() -> None:
    cpu, gpu = (
        [line for line in (ROOT / KUBERAY / name).read_text().splitlines() if not line.startswith("#")]
        for name in ("Dockerfile", "Dockerfile.gpu")
    )
    assert [line for line in cpu if line not in gpu] == [next(line for line in cpu if line.startswith("ARG RAY_IMAGE"))]
