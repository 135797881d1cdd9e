"""A small DeepSeek-V3 as it is released: FP8 in blocks, an expert a module, and a layer for multi-token prediction that
no transformers class loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

import merger
from tests.merger.quantization.test_fp8 import blocked
from tests.quantised import QuantBench, decoded, delta, stored

BLOCK = 32
LAYERS = 2


def deepseek(bench: QuantBench, seed: int = 0) -> Path:
    path = bench.root / f"deepseek-{seed}"
    if path.exists():
        return path
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=160, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=32,
        qk_nope_head_dim=32, v_head_dim=32, max_position_embeddings=64, initializer_range=0.1, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model: Any = DeepseekV3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(str(path))
    dense = load_file(path / "model.safetensors")
    # The prediction layer: one more layer of experts, and what joins it to the stack.
    last, extra = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    for name in [n for n in dense if n.startswith(last)]:
        dense[name.replace(last, extra)] = dense[name] * 0.5
    dense[f"{extra}eh_proj.weight"] = torch.randn(64, 128).bfloat16() * 0.1
    dense[f"{extra}enorm.weight"] = torch.ones(64).bfloat16()
    tensors: dict[str, Tensor] = {}
    for name, value in dense.items():
        if name.endswith("proj.weight") or "kv_a_proj" in name:
            codes, grid = blocked(value, BLOCK, BLOCK)
            tensors |= {name: codes, f"{name}_scale_inv": grid}
        else:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    written |= {"quantization_config": scheme, "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(written))
    return path


def adapter(bench: QuantBench) -> Path:
    path = bench.root / "deepseek-adapter"
    if path.exists():
        return path
    model: Any = AutoModelForCausalLM.from_pretrained(str(deepseek(bench)), dtype=torch.bfloat16)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_a_proj", "o_proj", "kv_b_proj"])
    tuned = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if ".lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(str(path))
    return path


def test_a_fold_keeps_layout_and_names(quant_bench: QuantBench, tmp_path: Path) -> None:
    path = deepseek(quant_bench)
    made, before = quant_bench.fold(path, tmp_path / "out", adapter(quant_bench)), stored(path)
    deltas = delta(adapter(quant_bench))
    assert len(deltas) == 3 * LAYERS
    assert {n: (t.dtype, t.shape) for n, t in made.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    touched = {*deltas, *(f"{name}_scale_inv" for name in deltas)}
    for name, value in before.items():
        if name not in touched:
            assert torch.equal(made[name].view(torch.uint8), value.view(torch.uint8)), name
    ours, old = decoded(tmp_path / "out"), decoded(path)
    for name, change in deltas.items():
        exact = old[name].double() + change
        error = (ours[name] - exact).abs()
        assert bool((error <= 1.01 * torch.clamp(exact.abs() / 16, min=float(exact.abs().max()) / 1024)).all())
    expected = quant_bench.logits(path, torch.bfloat16, adapter(quant_bench))
    found = quant_bench.logits(tmp_path / "out", torch.bfloat16)
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_a_dense_fold_has_every_tensor_and_the_logits_of_the_unmerged_model(
    quant_bench: QuantBench, tmp_path: Path
) -> None:
    path = deepseek(quant_bench)
    made = quant_bench.fold(path, tmp_path / "out", adapter(quant_bench), quantization="none")
    assert set(made) == {n for n in stored(path) if not n.endswith("_scale_inv")}
    assert all(t.dtype in (torch.bfloat16, torch.float32) for t in made.values())
    expected = quant_bench.logits(path, torch.bfloat16, adapter(quant_bench))
    found = quant_bench.logits(tmp_path / "out", torch.bfloat16)
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_two_models_merge_in_their_own_layout(quant_bench: QuantBench, tmp_path: Path) -> None:
    paths = [deepseek(quant_bench, seed) for seed in (0, 1)]
    merger.merge({
        "merge_method": "slerp", "base_model": str(paths[0]), "models": [{"model": str(paths[1])}],
        "parameters": {"t": 0.5}, "output": {"path": str(tmp_path / "out")},
    })  # fmt: skip
    made, before = stored(tmp_path / "out"), stored(paths[0])
    assert {n: (t.dtype, t.shape) for n, t in made.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert bool(quant_bench.logits(tmp_path / "out", torch.bfloat16).isfinite().all())


def test_a_touched_expert_makes_its_layers_experts_dense_under_mixed(quant_bench: QuantBench, tmp_path: Path) -> None:
    """Engines run a layer's experts as one; so they are all codes or all dense."""
    path, one = deepseek(quant_bench), tmp_path / "adapter"
    one.mkdir()
    module = f"model.layers.{LAYERS - 1}.mlp.experts.2.down_proj"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"],
              "base_model_name_or_path": str(path)}  # fmt: skip
    (one / "adapter_config.json").write_text(json.dumps(config))
    factors = {f"base_model.model.{module}.lora_A.weight": torch.randn(2, 32),
               f"base_model.model.{module}.lora_B.weight": torch.randn(64, 2)}  # fmt: skip
    save_file(factors, one / "adapter_model.safetensors")
    made = quant_bench.fold(path, tmp_path / "out", one, quantization="mixed")
    dense = {n for n, t in made.items() if "mlp.experts" in n and t.dtype == torch.bfloat16}
    experts = f"model.layers.{LAYERS - 1}.mlp.experts"
    assert dense == {f"{experts}.{i}.{p}_proj.weight" for i in range(4) for p in ("gate", "up", "down")}
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert experts in scheme["modules_to_not_convert"]
    assert bool(quant_bench.logits(tmp_path / "out", torch.bfloat16).isfinite().all())
