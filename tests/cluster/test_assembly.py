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
from tests.conformance.folders import content_digest, model

pytestmark = pytest.mark.ray

CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "num_hidden_layers": 2}
TOKENIZER: dict[str, Any] = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None, "decoder": None, "truncation": None, "padding": None,
    "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(40)}, "unk_token": "w0"},
}  # fmt: skip


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        object_store_memory=100 << 20, namespace="raymerge",
    )  # fmt: skip
    with quiet():
        yield
    ray.shutdown()


def llama(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (40, 32), "model.norm.weight": (32,), "lm_head.weight": (40, 32)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.q_proj.weight": (32, 32), f"{at}self_attn.k_proj.weight": (16, 32)}
        shapes |= {f"{at}mlp.{p}.weight": (48, 32) for p in ("gate_proj", "up_proj")}
        shapes |= {f"{at}mlp.down_proj.weight": (32, 48)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model(folder, seed, tensors=tensors, config=CONFIG)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


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
