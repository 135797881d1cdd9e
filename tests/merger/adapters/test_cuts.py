"""The same bytes for any --memory and any number of workers, and plans without torch, for every kind of term."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import merger
from merger.planning.memory import peak_bytes

if TYPE_CHECKING:
    from tests.merger.adapters.conftest import Workshop

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[3]
TARGETS = ["q_proj", "up_proj", "embed_tokens"]
LINEAR = ["q_proj", "up_proj", "down_proj"]
KINDS: dict[str, peft.PeftConfig] = {
    "lora on embeddings": peft.LoraConfig(r=4, target_modules=TARGETS),
    "dora": peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "ia3": peft.IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR),
    "lokr": peft.LoKrConfig(r=3, alpha=5, target_modules=LINEAR),
    "oft": peft.OFTConfig(r=0, oft_block_size=8, target_modules=LINEAR),
    "tokens": peft.TrainableTokensConfig(token_indices=[4, 1900]),
    "pissa": peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa"),
    "bridge": peft.HRAConfig(r=4, target_modules=LINEAR),
}


@pytest.fixture(scope="module")
def tall(workshop: Workshop) -> Path:
    """A model with tensors of several tiles."""
    path = workshop.root / "tall"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=160, intermediate_size=1500, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    made: Any = LlamaForCausalLM(config)
    made.to(torch.bfloat16).save_pretrained(str(path))
    return path


@pytest.mark.parametrize("method", [pytest.param("task_arithmetic", marks=pytest.mark.slow), "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_cut_changes_a_bit(workshop: Workshop, tall: Path, kind: str, method: str, tmp_path: Path) -> None:
    adapters = [workshop.adapter(tall, KINDS[kind], seed, save_embedding_layers=False) for seed in (1, 2)]
    manifest = {
        "merge_method": method, "base_model": str(tall), "output": {"kind": "model"},
        "adapters": [{"adapter": str(a), "parameters": {"weight": 0.5}} for a in adapters],
    } | ({"parameters": {"density": 0.3}} if method == "ties" else {})  # fmt: skip
    merger.merge(manifest, tmp_path / "one", workers=1, memory=peak_bytes(merger.plan(manifest)))
    merger.merge(manifest, tmp_path / "three", workers=3, memory=2 * 10**9)
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "three"))
    assert first == second
    assert first != (tall / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pissa"])  # its base is rounded midway, as PEFT's
def test_a_half_precision_base_is_rounded_once(workshop: Workshop, tall: Path, kind: str, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    tensors = load_file(tall / "model.safetensors")
    save_file({k: v.float() for k, v in tensors.items()}, wide / "model.safetensors", {"format": "pt"})
    (wide / "config.json").write_bytes((tall / "config.json").read_bytes())
    adapter = workshop.adapter(tall, KINDS[kind], save_embedding_layers=False)
    exact, rounded = (
        load_file(workshop.fold(base, [adapter], tmp_path / base.name / "out") / "model.safetensors")
        for base in (wide, tall)
    )
    for name, value in exact.items():
        assert value.dtype == torch.float32
        assert torch.equal(value.to(torch.bfloat16), rounded[name]), name


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "ray", "peft", "numba"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import merger, json
for manifest in json.loads(sys.argv[1]):
    planned = merger.plan(manifest)
    assert not planned.problems, planned.problems
    assert planned.tasks
"""


def test_plans_need_no_torch(workshop: Workshop, tall: Path) -> None:
    manifests = [
        {"merge_method": "task_arithmetic", "base_model": str(tall), "output": {"kind": "model"},
         "adapters": [{"adapter": str(workshop.adapter(tall, config))}]}
        for config in KINDS.values()
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(manifests)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
