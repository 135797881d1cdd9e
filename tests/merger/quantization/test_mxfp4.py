"""gpt-oss in MXFP4, small: its experts against transformers' own dequantisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import merger
from tests.quantised import QuantBench, decoded, delta, stored

EXPERTS = ("gate_up_proj", "down_proj")


def packed(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Random codes and exponents of experts (experts, out, in)."""
    generator = torch.Generator().manual_seed(seed)
    experts, out, inputs = shape
    blocks = torch.randint(0, 256, (experts, out, inputs // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(119, 124, (experts, out, inputs // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


def gpt_oss(bench: QuantBench, seed: int = 0) -> Path:
    """Two layers, four experts, in the layout of the released checkpoints."""
    path = bench.root / f"gpt-oss-{seed}"
    if path.exists():
        return path
    torch.manual_seed(seed)
    config = GptOssConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        sliding_window=16, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model: Any = GptOssForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(str(path))
    tensors = load_file(path / "model.safetensors")
    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts"
        for number, (name, out, inputs) in enumerate((("gate_up_proj", 192, 64), ("down_proj", 64, 96))):
            assert tensors.pop(f"{base}.{name}").shape == (4, inputs, out)
            blocks, scales = packed((4, out, inputs), 100 * seed + 10 * layer + number)
            tensors |= {f"{base}.{name}_blocks": blocks, f"{base}.{name}_scales": scales}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    scheme = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (path / "config.json").write_text(json.dumps(written | {"quantization_config": scheme}))
    return path


def adapter(bench: QuantBench) -> Path:
    """On attention, as most adapters of gpt-oss are."""
    path = bench.root / "gpt-oss-adapter"
    if path.exists():
        return path
    model: Any = AutoModelForCausalLM.from_pretrained(str(gpt_oss(bench)), dtype=torch.bfloat16)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if ".lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(str(path))
    return path


@pytest.mark.parametrize("step", [0, 1, 33])
def test_experts_are_those_of_transformers(quant_bench: QuantBench, step: int) -> None:
    path = gpt_oss(quant_bench)
    ours, tensors = decoded(path, step=step), stored(path)
    assert len(ours) == 4
    for name, value in ours.items():
        theirs = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
        assert torch.equal(value, theirs.float())


def test_a_dense_fold_gives_the_logits_of_the_unmerged_model(quant_bench: QuantBench, tmp_path: Path) -> None:
    path = gpt_oss(quant_bench)
    made = quant_bench.fold(path, tmp_path / "out", adapter(quant_bench), quantization="none")
    deltas = delta(adapter(quant_bench))
    before = stored(path)
    for name, change in deltas.items():
        torch.testing.assert_close(made[name].double(), before[name].double() + change, rtol=2**-8, atol=1e-6)
    for name, value in decoded(path).items():
        assert torch.equal(made[name], value.bfloat16())
    expected = quant_bench.logits(path, torch.bfloat16, adapter(quant_bench))
    found = quant_bench.logits(tmp_path / "out", torch.bfloat16)
    assert float((found - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_two_quantised_models_merge_by_weight(quant_bench: QuantBench, tmp_path: Path) -> None:
    paths = [gpt_oss(quant_bench, seed) for seed in (0, 1)]
    merger.merge({
        "merge_method": "linear", "models": [{"model": str(p), "parameters": {"weight": 1.0}} for p in paths],
        "output": {"path": str(tmp_path / "out"), "quantization": "none"},
    })  # fmt: skip
    made = stored(tmp_path / "out")
    first, second = (decoded(p) for p in paths)
    for name, value in first.items():
        assert torch.equal(made[name], ((value + second[name]) / 2).bfloat16())
