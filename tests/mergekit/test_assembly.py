"""mergekit-moe, mergekit-multi and mergekit-pytorch 0.1.5 in a venv of their own, and raymerge here, on the same files.

Expert tensors are equal bit for bit (mergekit writes them fused, under the names that transformers 5 has in memory);
gates to the precision of bfloat16, in which mergekit runs its forward pass and writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import merger

pytestmark = [pytest.mark.mergekit, pytest.mark.filterwarnings("default")]

LAYERS = 3
MAKE_MODELS = """
import sys, torch
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig, PreTrainedTokenizerFast, Qwen2Config,
    Qwen2Tokenizer, Qwen3Config
)

root, kind = Path(sys.argv[1]), sys.argv[2]
kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
         "mixtral": MixtralConfig}
more = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "mixtral" else {}
config = kinds[kind](vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16, max_position_embeddings=64, **more)
special = {"bos_token": "<s>", "eos_token": "</s>"}
if kind.startswith("qwen"):  # transformers reads every tokenizer of a Qwen as byte-level BPE
    letters = {w: i for i, w in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "w1", "<s>", "</s>"])}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[("w", "1")], unk_token=None, pad_token="</s>", **special)
else:
    words = ["w0", "<s>", "</s>", *(f"w{i}" for i in range(3, 64))]
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="w0", **special)
for seed, name in enumerate(("base", "a", "b", "c")):
    torch.manual_seed(seed if kind != "mixtral" else 0)
    model = AutoModelForCausalLM.from_config(config)
    if kind == "mixtral":
        torch.manual_seed(100 + seed)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.006 * bool(seed) * torch.randn_like(value))
    model.to(torch.float32 if kind == "mixtral" else torch.bfloat16).save_pretrained(root / name)
    tokenizer.save_pretrained(root / name)
"""


@dataclass(frozen=True)
class Bench:
    root: Path
    bin: Path

    def family(self, kind: str) -> Path:
        folder = self.root / kind
        if not folder.exists():
            run([sys.executable, "-c", MAKE_MODELS, str(folder), kind])
        return folder

    def folder(self) -> Path:
        folder = self.root / f"run-{len(list(self.root.glob('run-*')))}"
        folder.mkdir()
        return folder


def run(command: list[str]) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, mergekit_python: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("mergekit"), mergekit_python.parent)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


# ---- experts ---------------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "mixtral-llama": ("llama", False, {}),
    "mixtral-mistral": ("mistral", False, {}),
    "deepseek": ("llama", False, {"architecture": "deepseek"}),
    "qwen-llama": ("llama", True, {"architecture": "qwen"}),
    "qwen-qwen2": ("qwen2", True, {}),
    "qwen3": ("qwen3", False, {}),
}


def recipe(folder: Path, form: str, mode: str) -> dict[str, Any]:
    _, shared, more = FORMS[form]
    prompts = [(["w3 w4", "w5 w6"], ["w8 w9"]), (["w9 w10 w11"], None), (["w12", "w13"], None)]
    experts = [
        {"source_model": str(folder / name), "positive_prompts": positive,
         **({"negative_prompts": negative} if negative else {})}
        for name, (positive, negative) in zip("abc", prompts, strict=True)
    ]  # fmt: skip
    aside = {"shared_experts": [{"source_model": str(folder / "base"), "positive_prompts": ["w14 w15"]}]}
    return {
        "base_model": str(folder / "base"), "gate_mode": mode, "dtype": "bfloat16", "experts": experts,
        **(aside if shared else {}), **more,
    }  # fmt: skip


def split(found: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """mergekit's names and fused experts as published checkpoints have them."""
    mixtral = form.startswith("mixtral")
    plain = {}
    for name, value in found.items():
        at = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            plain[at] = value
            continue
        stem = at.rpartition(".")[0]
        for number, one in enumerate(value):
            halves = one.chunk(2) if name.endswith("gate_up_proj") else (one,)
            words = (("w1", "w3") if mixtral else ("gate_proj", "up_proj")) if len(halves) == 2 else (
                ("w2",) if mixtral else ("down_proj",))  # fmt: skip
            plain |= {f"{stem}.{number}.{w}.weight": h for w, h in zip(words, halves, strict=True)}
    return plain


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden", "random"])
@pytest.mark.parametrize("form", FORMS)
def test_experts_are_equal_and_gates_nearly(bench: Bench, form: str, mode: str) -> None:
    models, folder = bench.family(FORMS[form][0]), bench.folder()
    file = folder / "moe.yml"
    file.write_text(yaml.safe_dump(recipe(models, form, mode)))
    run([str(bench.bin / "mergekit-moe"), str(file), str(folder / "theirs"), "--device", "cpu"])
    merger.moe(file, folder / "ours")
    theirs, ours = split(tensors(folder / "theirs"), form), tensors(folder / "ours")
    assert theirs.keys() == ours.keys()
    gates = {name for name in ours if name.endswith(("gate.weight", "expert_gate.weight"))}
    assert len(gates) == LAYERS * (2 if "qwen-" in form else 1)
    assert [name for name in ours.keys() - gates if not torch.equal(ours[name], theirs[name])] == []
    for name in gates:
        assert ours[name].shape == theirs[name].shape
        if mode == "random":
            continue
        one, other = ours[name].double(), theirs[name].double()
        # cheap_embed: both round float32 sums once. hidden: theirs is a forward pass in bfloat16, layer after layer.
        torch.testing.assert_close(one, other, atol=1e-3 if mode == "cheap_embed" else 2e-2, rtol=0.0)
        assert float(torch.cosine_similarity(one, other, dim=-1).min()) > (0.99999 if mode == "cheap_embed" else 0.999)


@pytest.mark.parametrize("form", FORMS)
def test_configs_name_the_same_model(bench: Bench, form: str) -> None:
    models, folder = bench.family(FORMS[form][0]), bench.folder()
    file = folder / "moe.yml"
    file.write_text(yaml.safe_dump(recipe(models, form, "random")))
    run([str(bench.bin / "mergekit-moe"), str(file), str(folder / "theirs"), "--device", "cpu"])
    merger.merge(file, folder / "ours")
    theirs, ours = (json.loads((folder / n / "config.json").read_text()) for n in ("theirs", "ours"))
    for key in (
        "model_type", "architectures", "num_local_experts", "n_routed_experts", "n_shared_experts",
        "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
        "norm_topk_prob", "decoder_sparse_step",
        "hidden_size", "intermediate_size", "num_key_value_heads", "rms_norm_eps", "vocab_size", "dtype", "auto_map",
    ):  # fmt: skip
        if key in theirs and (key in ours or key != "num_local_experts"):
            assert ours.get(key) == theirs[key], key


# ---- several documents -----------------------------------------------------------------------------------------------


def test_several_documents_give_what_mergekit_multi_gives(bench: Bench) -> None:
    models, folder = bench.family("llama"), bench.folder()

    def entry(name: str, **parameters: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"model": name if name == "mixed" else str(models / name)}
        return {**found, "parameters": parameters} if parameters else found

    last = {"merge_method": "slerp", "base_model": "mixed", "models": [entry("mixed"), entry("c")],
            "parameters": {"t": 0.4}, "dtype": "float32"}  # fmt: skip
    first = {"name": "mixed", "merge_method": "task_arithmetic", "base_model": str(models / "base"),
             "models": [entry("a", weight=0.7), entry("b", weight=0.5)], "dtype": "float32"}  # fmt: skip
    file = folder / "several.yml"
    file.write_text(yaml.safe_dump_all([last, first]))
    run([str(bench.bin / "mergekit-multi"), str(file), "-I", str(folder / "between"), "--out-path",
         str(folder / "theirs")])  # fmt: skip
    merger.merge(file, folder / "ours")
    theirs, ours = tensors(folder / "theirs"), tensors(folder / "ours")
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0.0)


# ---- bare tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp", "karcher", "model_stock"])
def test_bare_files_give_what_mergekit_pytorch_gives(bench: Bench, method: str) -> None:
    folder = bench.folder()
    shapes = {
        "conv_in.weight": (8, 4, 3, 3),
        "norm.bias": (9,),
        "blocks.0.attn.qkv.weight": (36, 12),
        "cls": (1, 1, 12),
    }
    base = {n: torch.randn(s, generator=torch.Generator().manual_seed(0)) for n, s in shapes.items()}
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        changed = {n: v + bool(seed) * 0.1 * torch.randn(v.shape, generator=generator) for n, v in base.items()}
        save_file(changed, folder / f"{name}.safetensors")

    def entry(name: str) -> dict[str, Any]:
        weighted = method in ("linear", "task_arithmetic")
        return {"model": str(folder / f"{name}.safetensors"), **({"parameters": {"weight": 0.5}} if weighted else {})}

    found: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
    found["models"] = [entry("a"), entry("b")] if method != "slerp" else [entry("a")]
    if method in ("task_arithmetic", "slerp", "model_stock"):
        found["base_model"] = str(folder / "base.safetensors")
    if method == "slerp":
        found["parameters"] = {"t": 0.3}
    file = folder / "raw.yml"
    file.write_text(yaml.safe_dump(found))
    run([str(bench.bin / "mergekit-pytorch"), str(file), str(folder / "theirs")])
    merger.merge(file, folder / "ours")
    theirs, ours = tensors(folder / "theirs"), tensors(folder / "ours")
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0.0)


# ---- a model of experts as a source ----------------------------------------------------------------------------------


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 0.4}},
    "task_arithmetic": {"each": {"weight": 0.4}, "base": True},
    "ties": {"each": {"weight": 0.4, "density": 0.5}, "base": True},
    "slerp": {"shared": {"t": 0.3}, "base": True, "models": "a"},
    "karcher": {},
    "model_stock": {"base": True},
    "breadcrumbs": {"each": {"weight": 0.4, "density": 0.8}, "base": True},
}


def stacked(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Mixtral's tensors as its code holds them, whichever way its files do."""
    plain = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, value in found.items():
        at = name.replace(".block_sparse_moe.", ".mlp.")
        head, experts_at, tail = at.partition(".experts.")
        if not experts_at or not tail[0].isdigit():
            plain[at] = value
            continue
        number, word, _ = tail.split(".")
        experts.setdefault(head, {}).setdefault(int(number), {})[word] = value
    for head, of in experts.items():
        ordered = [of[i] for i in sorted(of)]
        plain[f"{head}.experts.gate_up_proj"] = torch.stack([torch.cat([e["w1"], e["w3"]]) for e in ordered])
        plain[f"{head}.experts.down_proj"] = torch.stack([e["w2"] for e in ordered])
    return plain


@pytest.mark.parametrize("method", METHODS)
def test_models_of_experts_merge_as_in_mergekit(bench: Bench, method: str) -> None:
    """Where mergekit's unit is the stack of all experts and ours a tensor of the file, elementwise methods agree; the
    others differ by what the unit is (see the assertion)."""
    models, folder, form = bench.family("mixtral"), bench.folder(), METHODS[method]
    each = {"parameters": form["each"]} if "each" in form else {}
    found: dict[str, Any] = {
        "merge_method": method, "dtype": "float32",
        "models": [{"model": str(models / n), **each} for n in form.get("models", "abc")],
        **({"base_model": str(models / "base")} if form.get("base") else {}),
        **({"parameters": form["shared"]} if "shared" in form else {}),
    }  # fmt: skip
    file = folder / "merge.yml"
    file.write_text(yaml.safe_dump(found))
    run([str(bench.bin / "mergekit-yaml"), str(file), str(folder / "theirs")])
    merger.merge(file, folder / "ours")
    theirs, ours = stacked(tensors(folder / "theirs")), stacked(tensors(folder / "ours"))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        if ".experts." in name and method not in ("linear", "task_arithmetic"):
            continue
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0.0)
