"""Several documents, experts and bare files on Ray: the same bytes as in one process, in folders that workers share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import save_file

from cluster.connect import quiet
from cluster.run import run_on_ray
from merger import api
from tests.conformance.folders import content_digest
from tests.conformance.llamas import llama

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        object_store_memory=100 << 20, namespace="raymerge",
    )  # fmt: skip
    with quiet():
        yield
    ray.shutdown()


def documents(folder: Path) -> str:
    """Two models mixed, and the mix one of two experts with noise, its gates from prompts."""
    for seed, name in enumerate(("base", "a", "b")):
        llama(folder / name, seed)
    mixed = {
        "name": "mixed", "merge_method": "ties", "base_model": str(folder / "base"), "parameters": {"density": 0.5},
        "models": [{"model": str(folder / n), "parameters": {"weight": 1.0}} for n in ("a", "b")], "dtype": "bfloat16",
    }  # fmt: skip
    experts = {
        "base_model": str(folder / "base"), "gate_mode": "cheap_embed", "experts": [
            {"source_model": "mixed", "positive_prompts": ["w3 w4"], "noise_scale": 0.1},
            {"source_model": str(folder / "b"), "positive_prompts": ["w5"], "negative_prompts": ["w6"]},
        ],
    }  # fmt: skip
    return "\n---\n".join(json.dumps(d) for d in (mixed, experts)) + "\n"


@pytest.mark.usefixtures("private_ray")
def test_documents_and_experts_on_ray(tmp_path: Path) -> None:
    manifest = documents(tmp_path)
    here = api.merge(manifest, tmp_path / "here")
    seen: set[str] = set()

    def listen(progress: Any) -> None:
        seen.update(str(p) for p in (tmp_path / "out").rglob("*"))

    report = api.merge(manifest, tmp_path / "out", workers=2, runner=run_on_ray, listener=listen)
    assert report.content_digest == here.content_digest == content_digest(tmp_path / "out")
    assert any("/intermediates/mixed/" in name for name in seen)  # workers cannot see the driver's memory
    assert not (tmp_path / "out" / ".raymerge").exists()


@pytest.mark.usefixtures("private_ray")
def test_random_gates_and_bare_files_on_ray(tmp_path: Path) -> None:
    documents(tmp_path)
    experts = {"base_model": str(tmp_path / "base"), "gate_mode": "random",
               "experts": [{"source_model": str(tmp_path / n)} for n in ("a", "b")]}  # fmt: skip
    for seed, name in enumerate(("x", "y")):
        values = torch.randn(64, 48, generator=torch.Generator().manual_seed(seed)).half()
        save_file({"down_blocks.0.conv.weight": values}, tmp_path / f"{name}.safetensors")
    entries = [{"model": str(tmp_path / f"{n}.safetensors"), "parameters": {"weight": 1.0}} for n in ("x", "y")]
    bare = {"merge_method": "linear", "models": entries}
    for number, document in enumerate((experts, bare)):
        here = api.merge(document, tmp_path / f"here-{number}")
        there = api.merge(document, tmp_path / f"there-{number}", workers=2, runner=run_on_ray)
        assert here.content_digest == there.content_digest
