"""Every kind of adapter, made and saved by PEFT 0.21.2 and folded: the same logits as PEFT's unmerged model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch

if TYPE_CHECKING:
    from tests.merger.adapters.conftest import Workshop

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets or EVERY), **options})


def ia3(*outputs: str, inputs: list[str]) -> peft.IA3Config:
    return peft.IA3Config(target_modules=[*outputs, *inputs], feedforward_modules=inputs)


def oft(block: int, **options: Any) -> peft.OFTConfig:
    return peft.OFTConfig(**{"r": 0, "oft_block_size": block, "target_modules": EVERY, **options})


CASES: dict[str, tuple[str, peft.PeftConfig]] = {
    "lora": ("llama", lora()),
    "lora, Conv1D": ("gpt2", lora(*GPT2, fan_in_fan_out=True)),
    "lora, Conv1D, the config says Linear": ("gpt2", lora(*GPT2)),
    "lora, embedding": ("llama", lora("q_proj", "embed_tokens")),
    "lora, embedding, tied": ("llama-tied", lora("q_proj", "embed_tokens")),
    "lora, embedding of GPT-2": ("gpt2", lora("wte", "c_attn")),
    "lora, convolutions": ("layers", lora("conv1", "conv2", "point", "conv3", "words", "out")),
    "rslora, convolutions": ("layers", lora("conv1", "conv2", "words", use_rslora=True)),
    "lora_bias": ("llama-bias", lora("q_proj", "up_proj", lora_bias=True)),
    "bias: all": ("llama-bias", lora("q_proj", bias="all")),
    "bias: lora_only": ("llama-bias", lora("q_proj", "o_proj", bias="lora_only")),
    "trained tokens": ("llama", lora("q_proj", trainable_token_indices=[5, 1, 30])),
    "trained tokens, tied": ("llama-tied", lora("q_proj", trainable_token_indices=[5, 1, 30])),
    "trained tokens alone": ("llama", peft.TrainableTokensConfig(token_indices=[4, 33])),
    "modules_to_save": ("llama", lora("q_proj", modules_to_save=["lm_head", "norm"])),
    "modules_to_save, tied head": ("llama-tied", lora("q_proj", modules_to_save=["lm_head"])),
    "modules_to_save, tied embeddings": ("llama-tied", lora("q_proj", modules_to_save=["embed_tokens"])),
    "modules_to_save, module with a bias": ("llama-bias", lora("q_proj", modules_to_save=["layers.1.mlp.up_proj"])),
    "dora": ("llama", lora(use_dora=True)),
    "dora, Conv1D": ("gpt2", lora(*GPT2, fan_in_fan_out=True, use_dora=True)),
    "dora, embedding": ("llama", lora("embed_tokens", "q_proj", use_dora=True)),
    "dora, convolutions": ("layers", lora("conv1", "conv2", "point", "conv3", "out", use_dora=True)),
    "rsdora with patterns": ("llama", lora(use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2})),
    "ia3": ("llama", ia3("k_proj", "v_proj", inputs=["down_proj"])),
    "ia3 with biases": (
        "llama-bias", ia3("k_proj", "v_proj", inputs=["down_proj"]),
    ),
    "ia3, Conv1D": ("gpt2", ia3("c_attn", inputs=["mlp.c_proj"])),
    "ia3, convolutions": (
        "layers", ia3("conv2", "out", inputs=["point"]),
    ),
    "loha": ("llama", peft.LoHaConfig(r=3, alpha=5, target_modules=EVERY)),
    "loha, convolutions": ("layers", peft.LoHaConfig(r=3, alpha=5, target_modules=["conv1", "conv2", "point", "out"])),
    "loha, convolutions with cores": (
        "layers", peft.LoHaConfig(r=3, alpha=5, target_modules=["conv1", "conv2", "point"], use_effective_conv2d=True),
    ),
    "lokr": ("llama", peft.LoKrConfig(r=3, alpha=5, target_modules=EVERY)),
    "lokr, decomposed twice": ("llama", peft.LoKrConfig(r=2, alpha=5, target_modules=EVERY, decompose_both=True)),
    "lokr, whole": ("llama", peft.LoKrConfig(r=64, alpha=5, target_modules=EVERY)),
    "lokr, convolutions": ("layers", peft.LoKrConfig(r=2, alpha=5, target_modules=["conv1", "conv2", "point", "out"])),
    "lokr, convolutions with cores": (
        "layers", peft.LoKrConfig(r=1, alpha=5, target_modules=["conv2"], use_effective_conv2d=True),
    ),
    "oft": ("llama", oft(8)),
    "oft, Cayley": ("llama", oft(8, use_cayley_neumann=False)),
    "oft, seven terms": ("llama", oft(4, num_cayley_neumann_terms=7)),
    "oft, three terms": ("llama", oft(4, num_cayley_neumann_terms=3)),
    "oft, shared": ("llama", oft(8, target_modules=["q_proj"], block_share=True)),
    "adalora": ("llama", peft.AdaLoraConfig(init_r=5, target_r=3, lora_alpha=7, total_step=10, target_modules=EVERY)),
    "eva-like": ("llama", lora("q_proj", init_lora_weights="gaussian")),
    "orthogonal": ("llama", lora("q_proj", init_lora_weights="orthogonal")),
    "pissa": ("llama", lora(init_lora_weights="pissa")),
    "pissa, Conv1D": ("gpt2", lora(*GPT2, fan_in_fan_out=True, init_lora_weights="pissa")),
    "olora": ("llama", lora(init_lora_weights="olora")),
}  # fmt: skip
CASES["copied layers"] = ("llama", lora(layer_replication=[(0, 2), (1, 2), (0, 1)]))
CASES["copied layers, tied"] = ("llama-tied", lora("q_proj", "lm_head", layer_replication=[(0, 2), (0, 2)]))
TOLERANCE = 3e-6
"""Of the largest logit."""
LOOSER = {"pissa": 3e-5, "pissa, Conv1D": 3e-5}
"""PEFT takes PiSSA's singular vectors in float32; here they are float64's."""


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_fold_says_what_the_unmerged_model_says(workshop: Workshop, name: str, tmp_path: Path) -> None:
    kind, config = CASES[name]
    base = workshop.base(kind)
    adapter = workshop.adapter(base, config)
    out = workshop.fold(base, [adapter], tmp_path / "out")
    ours = workshop.logits(workshop.model(out))
    theirs = workshop.logits(workshop.loaded(base, adapter))
    plain = workshop.logits(workshop.model(base))
    scale = float(theirs.abs().max())
    assert float((theirs - plain).abs().max()) > 1e-3 * scale, "the adapter does nothing, so nothing is tested"
    assert float((ours - theirs).abs().max()) < LOOSER.get(name, TOLERANCE) * scale
    assert torch.isfinite(ours).all()
