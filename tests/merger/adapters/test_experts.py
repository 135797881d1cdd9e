"""LoRA on packed experts, in every packing, on checkpoints that hold experts one by one and packed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import merger
from merger.errors import RefusedError
from tests import reference
from tests.reference_adapters import expert_deltas

if TYPE_CHECKING:
    from tests.merger.adapters.conftest import Workshop

pytestmark = pytest.mark.filterwarnings("ignore")
PACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SMALL: dict[str, Any] = {
    "vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.1, "head_dim": 8,
}  # fmt: skip


def make(workshop: Workshop, kind: str, *, hidden: int = 32, inner: int = 24) -> Path:
    path = workshop.root / f"{kind}-{hidden}-{inner}"
    if path.exists():
        return path
    torch.manual_seed(0)
    model: Any
    if kind == "mixtral":
        model = MixtralForCausalLM(
            MixtralConfig(**SMALL, hidden_size=hidden, intermediate_size=inner, num_local_experts=4)
        )
    elif kind == "qwen3":
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SMALL, hidden_size=hidden, intermediate_size=40, moe_intermediate_size=inner,
                           num_experts=4, num_experts_per_tok=2)
        )  # fmt: skip
    else:
        model = GptOssForCausalLM(
            GptOssConfig(**SMALL, hidden_size=hidden, intermediate_size=inner, num_local_experts=4,
                         num_experts_per_tok=2, layer_types=["full_attention"] * 2)
        )  # fmt: skip
    model.save_pretrained(str(path))
    return path


def config(*parameters: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": list(parameters or PACKED),
           **options}
    )  # fmt: skip


def assert_folded(workshop: Workshop, base: Path, adapter: Path, out: Path, unmerged: Any = None) -> None:
    theirs = workshop.logits(workshop.loaded(base, adapter) if unmerged is None else unmerged)
    ours = workshop.logits(workshop.model(out))
    assert float((theirs - workshop.logits(workshop.model(base))).abs().max()) > 1e-3
    assert float((ours - theirs).abs().max()) < 3e-6 * float(theirs.abs().max())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
@pytest.mark.parametrize("parameters", [PACKED, PACKED[:1], PACKED[1:]], ids=["both", "gate_up", "down"])
def test_packed_experts(workshop: Workshop, kind: str, parameters: list[str], tmp_path: Path) -> None:
    base = make(workshop, kind)
    adapter = workshop.adapter(base, config(*parameters))
    assert_folded(workshop, base, adapter, workshop.fold(base, [adapter], tmp_path / "out"))


@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
def test_square_experts_of_a_named_version(workshop: Workshop, kind: str, tmp_path: Path) -> None:
    base = make(workshop, kind, hidden=32, inner=32)
    adapter = workshop.adapter(base, config("mlp.experts.down_proj", rank_pattern={"q_proj": 4}))
    assert_folded(workshop, base, adapter, workshop.fold(base, [adapter], tmp_path / "out"))


def edited(adapter: Path, **fields: object) -> None:
    found = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(found | fields))


def test_square_experts_of_an_unnamed_version_need_a_word(workshop: Workshop, tmp_path: Path) -> None:
    base = make(workshop, "qwen3", hidden=32, inner=32)
    adapter = workshop.adapter(base, config("mlp.experts.down_proj"))
    edited(adapter, peft_version=None)
    with pytest.raises(RefusedError, match=r"options\.moe_lora_layout"):
        workshop.fold(base, [adapter], tmp_path / "out")
    manifest = {"base_model": str(base), "adapters": [{"adapter": str(adapter)}], "output": {"kind": "model"}}
    out = workshop.merge(manifest | {"options": {"moe_lora_layout": "peft"}}, tmp_path / "out")
    assert_folded(workshop, base, adapter, out)


@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
@pytest.mark.parametrize("inner", [24, 32])
def test_experts_of_peft_before_0_19(workshop: Workshop, kind: str, inner: int, tmp_path: Path) -> None:
    """It took in for out where a model stores (experts, out, in): its A and B are another's B and A."""
    base = make(workshop, kind, inner=inner)
    adapter = workshop.adapter(base, config("mlp.experts.down_proj"))
    swaps = kind == "qwen3"
    old = tmp_path / "old"
    old.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    experts, rank = 4, 2
    for name in [n for n in tensors if "experts.lora_A" in n and swaps]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        # ΔW[e] = (B'[e]·A'[e])ᵀ with A' = Bᵀ and B' = Aᵀ, each packed in its own way.
        by_expert = b.reshape(b.shape[0], rank, experts).permute(2, 1, 0)  # (experts, rank, out)
        tensors[name] = by_expert.reshape(-1, b.shape[0]).contiguous()
        swapped = a.reshape(experts, rank, -1).permute(2, 1, 0).reshape(a.shape[1], -1)
        tensors[name.replace("lora_A", "lora_B")] = swapped.contiguous()
    save_file(tensors, old / "adapter_model.safetensors")
    (old / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    edited(old, peft_version="0.18.1")
    out = workshop.fold(base, [old], tmp_path / "out")
    assert_folded(workshop, base, adapter, out)


def test_experts_laid_out_one_after_another(workshop: Workshop, tmp_path: Path) -> None:
    base = make(workshop, "qwen3")
    adapter = workshop.adapter(base, config())
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [n for n in tensors if "experts" in n and "lora_B" in n]:
        b = tensors[name]
        tensors[name] = b.reshape(b.shape[0], 2, 4).transpose(1, 2).reshape(b.shape).contiguous()
    save_file(tensors, other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    out = workshop.merge(
        {"base_model": str(base), "adapters": [{"adapter": str(other)}], "output": {"kind": "model"},
         "options": {"moe_lora_layout": "expert_major"}},
        tmp_path / "out",
    )  # fmt: skip
    assert_folded(workshop, base, adapter, out)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_experts_named_one_by_one_on_a_packed_checkpoint(workshop: Workshop, kind: str, tmp_path: Path) -> None:
    """An adapter of transformers 4, and a checkpoint that holds what transformers 5 does in memory."""
    base = make(workshop, kind)
    packed = tmp_path / "packed"
    packed.mkdir()
    state = {name: value.contiguous() for name, value in workshop.model(base).state_dict().items()}
    save_file(state, packed / "model.safetensors", {"format": "pt"})
    (packed / "config.json").write_bytes((base / "config.json").read_bytes())
    names = [n.removesuffix(".weight") for n in load_file(base / "model.safetensors") if ".experts." in n]
    old = tmp_path / "old"
    old.mkdir()
    shapes = {n: load_file(base / "model.safetensors")[f"{n}.weight"].shape for n in names}
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for name, (rows, cols) in shapes.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = 0.1 * torch.randn(2, cols, generator=generator)
        factors[f"base_model.model.{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 2, generator=generator)
    save_file(factors, old / "adapter_model.safetensors")
    leaves = sorted({n.rpartition(".")[2] for n in names})
    (old / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": leaves})
    )
    one_by_one = workshop.fold(base, [old], tmp_path / "one-by-one")
    whole = workshop.fold(packed, [old], tmp_path / "whole")
    assert sorted(load_file(whole / "model.safetensors")) == sorted(state)
    expected = workshop.model(one_by_one).state_dict()
    for name, value in load_file(whole / "model.safetensors").items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
    assert any(not torch.equal(value, state[name]) for name, value in expected.items())


def test_another_number_of_experts_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    adapter = workshop.adapter(make(workshop, "qwen3"), config(target_modules=[], r=4))
    edited(adapter, r=2)
    for base in (make(workshop, "qwen3"), make(workshop, "gpt-oss")):
        with pytest.raises(RefusedError, match="experts"):
            workshop.fold(base, [adapter], tmp_path / "out")


def test_attention_of_torch(workshop: Workshop, tmp_path: Path) -> None:
    """PEFT counts the output projection's delta twice, in training and in its merge alike."""
    base = workshop.base("layers")
    adapter = workshop.adapter(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["attention", "out"]))
    assert_folded(workshop, base, adapter, workshop.fold(base, [adapter], tmp_path / "out"))


# ---------------------------------------------------------------- written back


def experts_of(adapter: Path, rank: int = 2, scaling: float = 3.0) -> dict[str, list[Any]]:
    """Parameter → each expert's ΔW, float64, as (out, in)."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    named = {
        name.removesuffix("lora_A.weight"): name
        for name in tensors if ".experts." in name and name.endswith("lora_A.weight")
    }  # fmt: skip
    found = {}
    for stem, name in named.items():
        a, b = tensors[name].numpy().astype("f8"), tensors[f"{stem}lora_B.weight"].numpy().astype("f8")
        found[stem] = expert_deltas(a, b, 4, rank, scaling)
    return found


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("mixtral", marks=pytest.mark.slow), "gpt-oss"])
@pytest.mark.parametrize("parameters", [PACKED, PACKED[1:]], ids=["both", "down"])
def test_packed_experts_are_joined_into_an_adapter(
    workshop: Workshop, kind: str, parameters: list[str], tmp_path: Path
) -> None:
    """concat is exact: PEFT's model of the merge says what the merge into a model says."""
    base = make(workshop, kind)
    adapters = [workshop.adapter(base, config(*parameters, r=r, lora_alpha=3 * r), r) for r in (2, 3)]
    manifest = {
        "merge_method": "task_arithmetic", "base_model": str(base),
        "adapters": [
            {"adapter": str(a), "parameters": {"weight": w}} for a, w in zip(adapters, (0.7, -0.4), strict=True)
        ],
    }  # fmt: skip
    out = workshop.merge(manifest, tmp_path / "out")
    written = json.loads((out / "adapter_config.json").read_text())
    assert (written["r"], len(written["target_parameters"])) == (5, 2 * len(parameters))
    model = workshop.merge(manifest | {"output": {"kind": "model"}}, tmp_path / "model")
    wanted, got = workshop.logits(workshop.model(model)), workshop.logits(workshop.loaded(base, out))
    assert float((wanted - workshop.logits(workshop.model(base))).abs().max()) > 1e-3
    assert float((wanted - got).abs().max()) < 3e-6 * float(wanted.abs().max())
    again = workshop.fold(base, [out], tmp_path / "again")
    for name, value in load_file(model / "model.safetensors").items():
        assert torch.allclose(load_file(again / "model.safetensors")[name], value, atol=1e-6), name


@pytest.mark.parametrize("method", ["svd", "ties", pytest.param("tsv_m", marks=pytest.mark.slow)])
def test_each_expert_is_merged_by_itself(workshop: Workshop, method: str, tmp_path: Path) -> None:
    base = make(workshop, "qwen3")
    adapters = [workshop.adapter(base, config(target_modules=[]), seed) for seed in (1, 2)]
    out = workshop.merge(
        {
            "merge_method": method, "base_model": str(base), "parameters": {"density": 0.4} if method == "ties" else {},
            "adapters": [{"adapter": str(a), "parameters": {"weight": 0.5}} for a in adapters],
            "output": {"kind": "adapter", "store": {"svd": {"rank": 3}}},
        },
        tmp_path / "out",
    )  # fmt: skip
    first, second = map(experts_of, adapters)
    merged = experts_of(out, rank=3, scaling=1.0)
    assert merged.keys() == first.keys()
    for stem, experts in merged.items():
        for number, ours in enumerate(experts):
            deltas = [first[stem][number], second[stem][number]]
            if method == "svd":
                whole = reference.summed(deltas, (0.5, 0.5))
            elif method == "ties":
                whole = reference.ties(0 * deltas[0], deltas, (0.5, 0.5), (0.4, 0.4))
            else:
                assert 0 < np.linalg.matrix_rank(ours, 1e-5 * np.linalg.norm(ours)) <= 3
                continue
            u, s, vt = np.linalg.svd(whole, full_matrices=False)
            np.testing.assert_allclose(ours, (u[:, :3] * s[:3]) @ vt[:3], rtol=0, atol=2e-5 * s[0])
    loaded = workshop.logits(workshop.loaded(base, out))
    folded = workshop.logits(workshop.model(workshop.fold(base, [out], tmp_path / "folded")))
    assert float((loaded - folded).abs().max()) < 3e-6 * float(folded.abs().max())


def test_packed_experts_of_old_and_new_versions_meet(workshop: Workshop, tmp_path: Path) -> None:
    """A file in which PEFT 0.18 took in for out, merged with itself as it is written now."""
    base = make(workshop, "qwen3")
    adapter = workshop.adapter(base, config("mlp.experts.down_proj"))
    old = tmp_path / "old"
    shutil.copytree(adapter, old)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in [n for n in tensors if "experts.lora_A" in n]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        tensors[name] = b.reshape(b.shape[0], 2, 4).permute(2, 1, 0).reshape(-1, b.shape[0]).contiguous()
        swapped = a.reshape(4, 2, -1).permute(2, 1, 0).reshape(a.shape[1], -1)
        tensors[name.replace("lora_A", "lora_B")] = swapped.contiguous()
    save_file(tensors, old / "adapter_model.safetensors")
    edited(old, peft_version="0.18.1")
    entries = [{"adapter": str(a), "parameters": {"weight": 0.5}} for a in (adapter, old)]
    out = workshop.merge({"base_model": str(base), "adapters": entries}, tmp_path / "out")
    wanted, got = workshop.logits(workshop.loaded(base, adapter)), workshop.logits(workshop.loaded(base, out))
    assert float((wanted - got).abs().max()) < 3e-6 * float(wanted.abs().max())
    edited(adapter, peft_version=None)
    plan = merger.plan({"base_model": str(base), "adapters": entries})
    assert {p.code for p in plan.problems} == {"unknown-packing"}


@pytest.mark.parametrize(
    "more, why",
    [
        ({"output": {"store": {"svd": {"energy": 0.9}}}}, "differ from expert to expert"),
        ({"combination_type": "cat", "merge_method": None}, "PEFT merges no target_parameters"),
        ({"merge_method": "ties", "parameters": {"density": 0.5, "scope": "model"}}, "matrix of its own"),
    ],
)
def test_what_cannot_be_packed_is_refused(workshop: Workshop, more: dict[str, Any], why: str, tmp_path: Path) -> None:
    base = make(workshop, "qwen3")
    adapters = [workshop.adapter(base, config(), seed) for seed in (1, 2)]
    manifest = {
        "merge_method": "task_arithmetic", "base_model": str(base), "adapters": [{"adapter": str(a)} for a in adapters],
    }  # fmt: skip
    made = {key: value for key, value in (manifest | more).items() if value is not None}
    problems = merger.plan(made).problems
    assert problems
    assert {why in p.why for p in problems} == {True}
