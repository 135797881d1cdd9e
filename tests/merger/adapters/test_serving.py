"""What vLLM makes of adapters that PEFT saved: every rule met and not met, and its remedy done."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from jobs.cli import main
from merger.catalog import inspect_source
from merger.serving import RULES, VLLM_RANKS, Finding, Serving, for_vllm
from tests.conformance.folders import signals_kept
from tests.merger.adapters.conftest import Workshop

LINEAR = ["q_proj", "v_proj", "down_proj"]


def lora(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **fields})


def served(adapter: Path, base: Path | None = None) -> Serving:
    return for_vllm(inspect_source(str(adapter)), None if base is None else inspect_source(str(base)))


def edited(adapter: Path, to: Path, config: dict[str, Any] | None = None, **renamed: str) -> Path:
    """A copy with another config, and with parts of tensors' names replaced."""
    shutil.copytree(adapter, to)
    found = json.loads((to / "adapter_config.json").read_text())
    found = {k: v for k, v in {**found, **(config or {})}.items() if v != "absent"}
    (to / "adapter_config.json").write_text(json.dumps(found))
    tensors = load_file(to / "adapter_model.safetensors")
    for pattern, new in renamed.items():  # two underscores are a dot
        tensors = {re.sub(pattern.replace("__", r"\."), new, name): value for name, value in tensors.items()}
    save_file(tensors, to / "adapter_model.safetensors", {"format": "pt"})
    return to


def only(found: Serving, code: str) -> Finding:
    (one,) = [finding for finding in found.findings if finding.code == code]
    return one


def done(finding: Finding, base: Path, out: Path) -> Path:
    """What the finding's command makes."""
    arguments = [{"OUT": str(out), "BASE": str(base)}.get(word, word) for word in finding.command]
    assert arguments[0] == "raymerge"
    with signals_kept():
        assert main([*arguments[1:], "--on", "here"]) == 0
    return out


# ---------------------------------------------------------------- what is served as it is


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
     {"target_modules": ["q_proj"]}, {"layers_to_transform": [1]}, {"init_lora_weights": "orthogonal"}],
    ids=["plain", "rslora", "patterns", "q alone", "one layer", "orthogonal"],
)  # fmt: skip
def test_what_is_served_as_it_is(workshop: Workshop, fields: dict[str, Any]) -> None:
    base = workshop.base("llama")
    found = served(workshop.adapter(base, lora(**fields)), base)
    assert (found.verdict, found.max_lora_rank, found.findings, found.base) == ("served", 8, (), str(base))


def test_targets_that_no_tensor_has_are_passed_over(workshop: Workshop, tmp_path: Path) -> None:
    """The engine reads names of tensors, as here; target_modules may say more."""
    base = workshop.base("llama")
    adapter = edited(workshop.adapter(base, lora()), tmp_path / "a", {"target_modules": [*LINEAR, "fc9"]})
    assert served(adapter, base).verdict == "served"


@pytest.mark.parametrize("rank, fits", [(1, 1), (16, 16), (17, 32), (512, 512)])
def test_the_smallest_legal_rank(workshop: Workshop, rank: int, fits: int) -> None:
    adapter = workshop.adapter(workshop.base("layers"), lora(r=rank, target_modules=["out"]))
    found = served(adapter)
    assert found.max_lora_rank == fits
    assert fits in VLLM_RANKS
    assert found.verdict == "served"
    assert [f.effect for f in found.findings] == (["setting"] if fits > 16 else [])


def test_the_rank_is_the_configs_also_where_no_tensor_has_it(workshop: Workshop) -> None:
    """The engine compares r and rank_pattern, whatever the file holds."""
    ranks = {"q_proj": 4, "v_proj": 4, "down_proj": 4}
    assert served(workshop.adapter(workshop.base("llama"), lora(r=64, rank_pattern=ranks))).max_lora_rank == 64


def test_a_rank_above_all_is_cut(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("layers")
    found = served(workshop.adapter(base, lora(r=513, target_modules=["out"])))
    assert (found.verdict, found.max_lora_rank) == ("served after a change", None)
    after = served(done(only(found, "rank"), base, tmp_path / "out"))
    assert (after.verdict, after.max_lora_rank) == ("served", 16)


# ---------------------------------------------------------------- what is served after a change


CHANGED: dict[str, tuple[Callable[[], Any], str]] = {
    "dora": (lambda: lora(use_dora=True), "dora"),
    "pissa": (lambda: lora(init_lora_weights="pissa"), "initialisation"),
    "olora": (lambda: lora(init_lora_weights="olora"), "initialisation"),
    "loha": (lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=LINEAR), "tuner"),
    "adalora": (lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=LINEAR), "tuner"),
    "ia3": (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "tuner"),
    "oft": (lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=LINEAR), "tuner"),
}


@pytest.mark.parametrize("kind", ["dora", *(pytest.param(k, marks=pytest.mark.slow) for k in CHANGED if k != "dora")])
def test_the_remedy_makes_an_adapter_that_is_served(workshop: Workshop, kind: str, tmp_path: Path) -> None:
    config, code = CHANGED[kind]
    base = workshop.base("llama")
    found = served(workshop.adapter(base, config()), base)
    assert found.verdict == "served after a change"
    finding = only(found, code)
    assert (finding.effect, finding.stays_adapter) == ("refused", True)
    after = served(done(finding, base, tmp_path / "out"), base)
    assert (after.verdict, after.findings) == ("served", ())


def test_a_config_that_says_too_little(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    given = workshop.adapter(base, lora(r=8, lora_alpha=8))  # PEFT's defaults, which the engine has not
    for key in ("r", "lora_alpha", "target_modules"):
        found = served(edited(given, tmp_path / key, {key: "absent"}), base)
        finding = only(found, "config-keys")
        assert (found.verdict, finding.names) == ("served after a change", (key,))
    assert served(done(finding, base, tmp_path / "out"), base).verdict == "served"


def test_names_of_a_raw_state_dict(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    found = served(edited(workshop.adapter(base, lora()), tmp_path / "a", lora_A__weight="lora_A.default.weight"), base)
    finding = only(found, "names-infix")
    assert found.verdict == "served after a change"
    assert all(".default." in name for name in finding.names)
    assert served(done(finding, base, tmp_path / "out"), base).verdict == "served"


def test_first_factors_that_no_file_holds(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    for word, effect in (("corda", "refused"), ("lora_ga", "changed")):
        found = served(edited(workshop.adapter(base, lora()), tmp_path / word, {"init_lora_weights": word}), base)
        finding = only(found, "initialisation")
        assert (found.verdict, finding.effect, finding.command) == ("served after a change", effect, ())
        assert "`initial`" in finding.fix


# ---------------------------------------------------------------- what only a fold serves

FOLDED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "lora_bias": ("llama-bias", lambda: lora(lora_bias=True), "bias"),
    "bias all": ("llama-bias", lambda: lora(bias="all"), "bias"),
    "head saved whole": ("llama", lambda: lora(modules_to_save=["lm_head"]), "modules-to-save"),
    "layer_replication": ("llama", lambda: lora(layer_replication=[[0, 2], [1, 2]]), "layer-replication"),
    "trained tokens": ("llama", lambda: lora(trainable_token_indices={"embed_tokens": [3, 9]}), "names-tokens"),
    "convolution": ("layers", lambda: lora(target_modules=["conv1", "out"]), "layers"),
    "attention": ("layers", lambda: lora(target_modules=["attention", "out"]), "layers"),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_what_only_a_fold_serves(workshop: Workshop, kind: str, tmp_path: Path) -> None:
    of, config, code = FOLDED[kind]
    base = workshop.base(of)
    found = served(workshop.adapter(base, config()), base if of != "layers" else None)
    finding = only(found, code)
    assert (found.verdict, finding.effect, finding.stays_adapter) == ("refused", "refused", False)
    if kind in {"layer_replication", "convolution"}:
        assert served(done(finding, base, tmp_path / "out")).verdict == "model"


def test_heads_for_classification_may_be_saved_whole(workshop: Workshop, tmp_path: Path) -> None:
    adapter = edited(workshop.adapter(workshop.base("llama"), lora(modules_to_save=["lm_head"])), tmp_path / "a",
                     {"modules_to_save": ["score"]}, lm_head="score")  # fmt: skip
    assert served(adapter).verdict == "served"
    both = load_file(adapter / "adapter_model.safetensors")
    both["base_model.model.classifier.weight"] = both["base_model.model.score.weight"] + 1
    save_file(both, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": ["score", "classifier"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert only(served(adapter), "two-heads").effect == "refused"


def test_embeddings_saved_beside_adapted_ones_are_ignored(workshop: Workshop) -> None:
    base = workshop.base("llama")
    adapter = workshop.adapter(base, lora(target_modules=[*LINEAR, "embed_tokens"]), save_embedding_layers=True)
    found = served(adapter, base)
    finding = only(found, "embeddings")
    assert (found.verdict, finding.effect) == ("refused", "ignored")
    assert finding.names == ("base_model.model.model.embed_tokens.base_layer.weight",)


def test_embeddings_saved_for_new_tokens_are_refused(workshop: Workshop) -> None:
    base = workshop.base("llama")
    found = served(workshop.adapter(base, lora(), save_embedding_layers=True), base)
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in only(found, "names-saved").names} == {
        "embed_tokens", "lm_head"
    }  # fmt: skip


# ---------------------------------------------------------------- embeddings, heads, architectures


def _with_config(base: Path, to: Path, **config: Any) -> Path:
    """The same base under another config: what the rules look at."""
    shutil.copytree(base, to)
    found = json.loads((to / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(found))
    return to


def test_adapted_embeddings_are_served_by_some_architectures(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    adapter = workshop.adapter(base, lora(target_modules=["embed_tokens", "lm_head"]), save_embedding_layers=False)
    assert served(adapter, base).verdict == "served"
    unknown = served(adapter)
    assert unknown.verdict == "served"
    assert {f.effect for f in unknown.findings} == {"setting"}
    qwen = served(adapter, _with_config(base, tmp_path / "qwen2", architectures=["Qwen2ForCausalLM"]))
    assert (qwen.verdict, [f.code for f in qwen.findings]) == ("refused", ["vocabulary"] * 2)
    olmo = served(adapter, _with_config(base, tmp_path / "olmo2", architectures=["Olmo2ForCausalLM"]))
    assert only(olmo, "vocabulary").what.startswith("lm_head")
    larger = served(adapter, _with_config(base, tmp_path / "larger", vocab_size=161))
    assert "160 tokens" in only(larger, "vocabulary").what
    huge = served(adapter, _with_config(base, tmp_path / "huge", vocab_size=258_049))
    assert only(huge, "vocabulary-size").effect == "refused"


def test_an_architecture_without_adapters(workshop: Workshop) -> None:
    base = workshop.base("gpt2")
    found = served(workshop.adapter(base, lora(target_modules=["c_attn"], fan_in_fan_out=True)), base)
    assert (found.verdict, only(found, "architecture").what) == (
        "refused", "GPT2LMHeadModel is served without adapters"
    )  # fmt: skip


# ---------------------------------------------------------------- modules that the base has not


def test_a_wrong_prefix_serves_the_base(workshop: Workshop, tmp_path: Path) -> None:
    base = workshop.base("llama")
    given = workshop.adapter(base, lora())
    moved = edited(given, tmp_path / "a", base_model__model__model__="base_model.model.language_model.model.")
    assert served(moved).verdict == "served"  # which nobody can see without the base
    found = served(moved, base)
    finding = only(found, "modules")
    assert (found.verdict, finding.effect, len(finding.names)) == ("refused", "ignored", 6)
    done(finding, base, tmp_path / "out")
    right = load_file(workshop.fold(base, [given], tmp_path / "right") / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(right[name], ours[name]) for name in right)
    strange = edited(given, tmp_path / "b", q_proj="fc_q")
    assert {f.effect for f in served(strange, base).findings} == {"refused"}


def test_a_base_without_its_heads_prefix(workshop: Workshop, tmp_path: Path) -> None:
    base = _with_config(workshop.base("llama"), tmp_path / "bare")
    tensors = load_file(base / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, base / "model.safetensors")
    assert served(workshop.adapter(workshop.base("llama"), lora()), base).verdict == "served"


class Tower(nn.Module):
    """A language model with a vision tower, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.ModuleDict({"proj": nn.Linear(8, 8)})
        self.model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})


def test_towers_are_passed_over(tmp_path: Path) -> None:
    module: Any = Tower()
    model = peft.get_peft_model(module, lora(target_modules=["proj", "q_proj"]))
    model.save_pretrained(str(tmp_path / "a"))
    found = served(tmp_path / "a")
    finding = only(found, "towers")
    assert (found.verdict, finding.effect, finding.names) == ("refused", "ignored", ("visual.proj",))


# ---------------------------------------------------------------- experts


def _experts(tmp_path: Path, names: list[str], ranks: dict[str, int] | None = None) -> Path:
    """An adapter of single experts, as trainers save it."""
    kinds = ("gate_proj", "up_proj", "down_proj")
    experts = nn.ModuleList(nn.ModuleDict({kind: nn.Linear(8, 8) for kind in kinds}) for _ in range(3))
    stack: Any = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
    model = peft.get_peft_model(stack, lora(target_modules=names, rank_pattern=ranks or {}))
    model.save_pretrained(str(tmp_path / "a"))
    return tmp_path / "a"


EVERY = [f"mlp.experts.{i}.{p}_proj" for i in range(3) for p in ("gate", "up", "down")]


def test_every_expert_or_none(tmp_path: Path) -> None:
    assert served(_experts(tmp_path / "all", EVERY)).verdict == "served"
    for at, names in enumerate((EVERY[3:], EVERY[:-1], [n for n in EVERY if "down" not in n])):
        found = served(_experts(tmp_path / f"part-{at}", names))
        assert (found.verdict, only(found, "experts").names) == ("refused", ("mlp.experts",))
    unlike = served(_experts(tmp_path / "unlike", EVERY, {r"experts\.1\.up_proj": 2}))
    assert only(unlike, "experts").effect == "refused"


def test_experts_without_a_gate_are_whole_where_the_base_has_none(workshop: Workshop, tmp_path: Path) -> None:
    adapter = _experts(tmp_path, [name for name in EVERY if "gate" not in name])
    assert only(served(adapter), "experts").effect == "refused"
    base = _with_config(workshop.base("llama"), tmp_path / "base")
    save_file({f"{name}.weight": torch.ones(8, 8) for name in EVERY if "gate" not in name}, base / "model.safetensors")
    assert not [f for f in served(adapter, base).findings if f.code == "experts"]


def test_the_base_says_how_many_experts_there_are(workshop: Workshop, tmp_path: Path) -> None:
    adapter = _experts(tmp_path, EVERY)
    four = _with_config(workshop.base("llama"), tmp_path / "four", num_experts=4)
    assert only(served(adapter, four), "experts").effect == "refused"


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(3, 8, 16))
        self.experts.down_proj = nn.Parameter(torch.randn(3, 8, 8))


def test_packed_experts(workshop: Workshop, tmp_path: Path) -> None:
    both = ["experts.gate_up_proj", "experts.down_proj"]
    for name, parameters in (("both", both), ("one", both[:1])):
        module: Any = nn.ModuleDict({"mlp": Packed()})
        model = peft.get_peft_model(module, lora(target_modules=[], target_parameters=parameters))
        model.save_pretrained(str(tmp_path / name))
    assert only(served(tmp_path / "one"), "packed-experts").effect == "refused"
    asked = only(served(tmp_path / "both"), "packed-experts")
    assert (asked.effect, "unless" in asked.what) == ("setting", True)
    packed = _with_config(workshop.base("llama"), tmp_path / "oss", architectures=["GptOssForCausalLM"])
    assert not [f for f in served(tmp_path / "both", packed).findings if f.code == "packed-experts"]


# ---------------------------------------------------------------- kinds, spellings, models


@pytest.mark.parametrize("key, value, effect", [
    ("alora_invocation_tokens", [1, 2], "refused"), ("use_qalora", True, "refused"),
    ("use_bdlora", {"target_modules_bd_a": []}, "refused"), ("arrow_config", {"top_k": 2}, "changed"),
])  # fmt: skip
def test_kinds_that_are_no_fixed_change(workshop: Workshop, key: str, value: Any, effect: str, tmp_path: Path) -> None:
    adapter = edited(workshop.adapter(workshop.base("llama"), lora()), tmp_path / "a", {key: value})
    found = served(adapter)
    assert (found.verdict, only(found, "kind").effect) == ("refused", effect)


def test_a_file_of_other_tools(tmp_path: Path) -> None:
    name = "lora_unet_block_attn_to_q"
    tensors = {f"{name}.lora_down.weight": torch.randn(4, 8), f"{name}.lora_up.weight": torch.randn(8, 4),
               f"{name}.alpha": torch.tensor(4.0)}  # fmt: skip
    save_file(tensors, tmp_path / "k.safetensors")
    assert only(served(tmp_path / "k.safetensors"), "spelling").effect == "refused"


def test_a_full_model_needs_no_rules(workshop: Workshop, tmp_path: Path) -> None:
    assert served(workshop.base("llama")) == Serving(verdict="model")
    scheme = {"quantization_config": {"quant_method": "hqq"}}
    path = _with_config(workshop.base("llama"), tmp_path / "q", **scheme)
    assert only(served(path), "quantisation").effect == "refused"


def test_every_rule_is_met_somewhere_here() -> None:
    text = Path(__file__).read_text()
    source = Path(for_vllm.__code__.co_filename).read_text()
    codes = set(re.findall(r'code="([\w-]+)"', source)) | {"names-infix", "names-saved", "names-tokens"}
    assert len(RULES) == 19
    for code in codes:
        assert f'"{code}"' in text, code
