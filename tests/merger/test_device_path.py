"""What a GPU runs is the plain kernels through the same executor: the same bytes, on the CPU and on CUDA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merger
from merger import run, unit
from merger.kernels.dispatch import Kernels, PlainKernels, kernels_for
from merger.planning.devices import device_bytes
from merger.planning.nouns import Task

METHODS: list[dict[str, Any]] = [
    {"merge_method": "ties", "parameters": {"density": 0.3}},
    {
        "merge_method": "ties",
        "parameters": {"density": 0.3, "scope": "model", "elect": "unweighted", "divisor": "count"},
    },
    {"merge_method": "dare_ties", "parameters": {"density": 0.4}},
    {"merge_method": "dare_linear", "parameters": {"density": 0.4, "rescale": "inverse"}},
    {"merge_method": "magnitude_prune", "parameters": {"density": 0.5, "rescale": "l1"}},
    {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.7}},
    {"merge_method": "breadcrumbs", "parameters": {"density": 0.4, "gamma": 0.1}},
    {"merge_method": "breadcrumbs_ties", "parameters": {"density": 0.4, "gamma": 0.1}},
    {"merge_method": "della", "parameters": {"density": 0.4, "rescale": "inverse"}},
    {"merge_method": "della_linear", "parameters": {"density": 0.4, "rescale": "none"}},
    {"merge_method": "nuslerp", "parameters": {"nuslerp_flatten": False}},
    {"merge_method": "multislerp", "parameters": {"normalize_weights": False}},
    {"merge_method": "magmax", "parameters": {"lambda": 0.7}},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    base = {
        "model.embed_tokens.weight": torch.randn(300, 64, generator=generator),
        "model.layers.0.mlp.up_proj.weight": torch.randn(130, 64, generator=generator),
        "model.norm.weight": torch.randn(64, generator=generator),
    }
    paths = []
    for k in range(3):
        path = folder / f"m{k}"
        path.mkdir()
        tensors = {
            name: (t + (0.01 * torch.randn(t.shape, generator=generator) if k else 0)).bfloat16()
            for name, t in base.items()
        }
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
        paths.append(str(path))
    return paths


def _manifest(method: dict[str, Any], models: list[str]) -> dict[str, Any]:
    base, *others = models
    entries = [{"model": m, "parameters": {"weight": w}} for m, w in zip(others, (1.0, -0.5), strict=True)]
    return {**method, "base_model": base, "models": entries}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, [m["merge_method"], *m["parameters"]])))
def test_plain_kernels_give_the_same_bytes(
    method: dict[str, Any], models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = merger.merge(_manifest(method, models), tmp_path / "compiled", workers=1)

    def plain(device: object) -> Kernels:
        del device
        return PlainKernels()

    monkeypatch.setattr(unit, "kernels_for", plain)
    again = merger.merge(_manifest(method, models), tmp_path / "plain", workers=1)
    assert again.content_digest == compiled.content_digest


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, [m["merge_method"], *m["parameters"]])))
def test_cuda_gives_the_bytes_of_the_cpu(
    method: dict[str, Any], models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rescale: l1 sums in another order on a GPU, so its factor may differ in the last bit of a float64.
    here = merger.merge(_manifest(method, models), tmp_path / "cpu", workers=1)

    def on_gpu(device: object) -> Kernels:
        del device
        return PlainKernels("cuda")

    monkeypatch.setattr(unit, "kernels_for", on_gpu)
    there = merger.merge(_manifest(method, models), tmp_path / "cuda", workers=1)
    assert there.content_digest == here.content_digest


SPECTRAL: list[dict[str, Any]] = [
    {"merge_method": "tsv_m"}, {"merge_method": "iso_c"}, {"merge_method": "wudi"},
    {"merge_method": "boost", "parameters": {"beta": 0.5}},
    {"merge_method": "task_arithmetic", "parameters": {"calibrate": "svc"}},
    {"merge_method": "ties", "output": {"kind": "adapter", "modules_to_save": "all", "store": {"svd": {"rank": 8}}}},
]  # fmt: skip


def _loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an output; of pairs, their products, since signs and rotations are no part of a result."""
    found = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for name in [name for name in found if ".lora_B." in name]:
        b, a = found.pop(name), found.pop(name.replace(".lora_B.", ".lora_A."))
        found[name] = b.double() @ a.double()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("method", SPECTRAL, ids=lambda m: m["merge_method"])
def test_spectral_work_on_cuda_is_that_of_the_cpu(method: dict[str, Any], models: list[str], tmp_path: Path) -> None:
    """To a tolerance: products and decompositions of another library. 2⁻⁷ is one unit in the last place of bfloat16."""
    merger.merge(_manifest(method, models), tmp_path / "cpu", workers=1)
    merger.merge(_manifest(method, models), tmp_path / "cuda", workers=1, device="cuda")
    there = _loaded(tmp_path / "cuda")
    for name, here in _loaded(tmp_path / "cpu").items():
        torch.testing.assert_close(there[name].double(), here.double(), rtol=2.0**-7, atol=1e-5)


@pytest.mark.parametrize("method", SPECTRAL, ids=lambda m: m["merge_method"])
def test_a_plan_for_gpus_takes_the_same_steps(
    method: dict[str, Any], models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way over a device, with the CPU in its place: the same tensors, and only spectral tasks take it."""
    here = merger.merge(_manifest(method, models), tmp_path / "cpu", workers=1)
    seen: dict[str, str] = {}
    spectral_device = unit.UnitRunner.spectral_device

    def instead(self: unit.UnitRunner, task: Task) -> str:
        seen[task.name] = spectral_device(self, task)
        return "cpu"

    monkeypatch.setattr(unit.UnitRunner, "spectral_device", instead)
    monkeypatch.setattr(run, "limit_gpu", lambda plan, **_: device_bytes(plan))  # there is no GPU to ask
    there = merger.merge(_manifest(method, models), tmp_path / "cuda", workers=1, device="cuda")
    assert there.plan_digest != here.plan_digest  # the kind of device is part of a plan
    found = _loaded(tmp_path / "cuda")
    for name, tensor in _loaded(tmp_path / "cpu").items():
        assert torch.equal(found[name], tensor)
    assert set(seen.values()) == {"cuda", "cpu"}
    assert seen["model.norm.weight"] == "cpu"


def test_the_cpu_runs_the_compiled_kernels() -> None:
    assert not isinstance(kernels_for(torch.device("cpu")), PlainKernels)
