"""Adapter folders, tensor names and configs, against PEFT itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merger.errors import SourceError
from merger.formats.peft import (
    OtherKey,
    build_adapter_config,
    find_adapter,
    lora_scaling,
    output_key,
    parse_adapter_keys,
    read_adapter_config,
)
from merger.storage.memory import MemoryStore
from merger.tensors import F32, TensorSpec

M = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


def keys(*names: str) -> list[TensorSpec]:
    return [TensorSpec(name, F32, (1,)) for name in names]


# ------------------------------------------------------------------------------------------------------------- folders


def store_of(name: str, *files: str) -> MemoryStore:
    store = MemoryStore(f"peft-{name}")
    for file in files:
        store.put(file, json.dumps({"at": file}).encode())
    return store


def test_an_adapter_at_the_root_comes_before_subfolders() -> None:
    store = store_of("root", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin",
                     "checkpoint-5/adapter_config.json", "checkpoint-5/adapter_model.safetensors")  # fmt: skip
    found = find_adapter(store)
    assert (found.folder, found.config, found.weights, found.kind) == (
        "", "adapter_config.json", "adapter_model.safetensors", "safetensors",
    )  # fmt: skip
    assert read_adapter_config(store) == {"at": "adapter_config.json"}


def test_the_only_adapter_in_a_subfolder_is_found() -> None:
    store = store_of("sub", "README.md", "support/adapter_config.json", "support/adapter_model.bin")
    found = find_adapter(store)
    assert (found.folder, found.weights, found.kind) == ("support", "support/adapter_model.bin", "bin")
    assert read_adapter_config(store) == {"at": "support/adapter_config.json"}


def test_several_adapters_are_refused_and_listed() -> None:
    store = store_of("two", "one/adapter_config.json", "two/adapter_config.json", "xadapter_config.json")
    for call in (find_adapter, read_adapter_config):
        with pytest.raises(SourceError, match=r"several-adapters.*one, two"):
            call(store)


def test_an_adapter_that_lacks_a_part_is_refused() -> None:
    with pytest.raises(SourceError, match="no-adapter:"):
        find_adapter(store_of("model", "config.json", "model.safetensors"))
    with pytest.raises(SourceError, match="no-adapter-weights"):
        find_adapter(store_of("bare", "adapter_config.json", "other/adapter_model.safetensors"))


# ---------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "name,module,role",
    [
        (f"{M}{Q}.lora_A.weight", Q, "lora_A"),
        (f"{M}{Q}.lora_A.default.weight", Q, "lora_A"),
        (f"{M}{Q}.lora_B.my-adapter.weight", Q, "lora_B"),
        (f"{M}{Q}.lora_B.bias", Q, "lora_bias"),
        (f"{M}{Q}.lora_B.default.bias", Q, "lora_bias"),
        (f"{M}wte.lora_embedding_A", "wte", "lora_embedding_A"),
        (f"{M}wte.lora_embedding_B.default", "wte", "lora_embedding_B"),
        (f"{M}{Q}.lora_magnitude_vector", Q, "lora_magnitude_vector"),
        (f"{M}{Q}.lora_magnitude_vector.default.weight", Q, "lora_magnitude_vector"),
        (f"{M}{Q}.ia3_l", Q, "ia3_l"),
        (f"{M}{Q}.lokr_w1_a", Q, "lokr_w1_a"),
        (f"{M}{Q}.hada_t1.default", Q, "hada_t1"),
        (f"{M}{Q}.oft_R.weight", Q, "oft_R"),
        (f"{M}{Q}.vera_lambda_b", Q, "vera_lambda_b"),
        (f"{M}mlp.experts.base_layer.lora_A.weight", "mlp.experts.base_layer", "lora_A"),
    ],
)
def test_tuner_keys_are_grouped_by_module_and_role(name: str, module: str, role: str) -> None:
    found = parse_adapter_keys(keys(name))
    assert found.modules == {module: {role: name}}
    assert found.other == ()


@pytest.mark.parametrize(
    "name,path,kind",
    [
        (f"{M}lm_head.weight", "lm_head.weight", "saved_module"),
        (f"{M}lm_head.modules_to_save.default.weight", "lm_head.weight", "saved_module"),
        (f"{M}cls.modules_to_save.default.gamma", "cls.gamma", "saved_module"),
        (f"{M}model.embed_tokens.base_layer.weight", "model.embed_tokens.weight", "saved_module"),
        (f"{M}{Q}.bias", f"{Q}.bias", "bias"),
        (f"{M}{Q}.base_layer.bias", f"{Q}.bias", "bias"),
        (f"{M}wte.token_adapter.trainable_tokens_delta", "wte", "trainable_tokens"),
        (f"{M}wte.trainable_tokens_delta.default", "wte", "trainable_tokens"),
        ("base_model.vera_A", "base_model.vera_A", "shared"),
        ("base_model.vblora_vector_bank.default", "base_model.vblora_vector_bank.default", "shared"),
        ("prompt_embeddings", "prompt_embeddings", "unknown"),
        ("lora_unet_down.alpha", "lora_unet_down.alpha", "unknown"),
        ("unet.x.lora.down.weight", "unet.x.lora.down.weight", "unknown"),
        (f"{M}{Q}.lora_A.default.extra.weight", f"{Q}.lora_A.default.extra.weight", "saved_module"),
        (f"{M}lora_A.weight", "lora_A.weight", "saved_module"),
        (f"{M}{Q}.gamma", f"{Q}.gamma", "unknown"),
    ],
)
def test_other_keys_keep_their_name_and_get_a_kind(name: str, path: str, kind: Any) -> None:
    assert parse_adapter_keys(keys(name)).other == (OtherKey(name, path, kind),)


def test_a_bias_beside_a_saved_weight_is_part_of_the_saved_module() -> None:
    found = parse_adapter_keys(keys(f"{M}score.bias", f"{M}score.weight", f"{M}{Q}.bias"))
    assert [key.kind for key in found.other] == ["saved_module", "saved_module", "bias"]


def test_two_adapters_in_one_file_are_refused() -> None:
    with pytest.raises(SourceError, match="duplicate-role"):
        parse_adapter_keys(keys(f"{M}{Q}.lora_A.one.weight", f"{M}{Q}.lora_A.two.weight"))


@pytest.mark.parametrize(
    "role", ["lora_A", "lora_B", "lora_bias", "lora_embedding_A", "lora_magnitude_vector", "ia3_l"]
)
def test_output_keys_are_read_back(role: str) -> None:
    assert parse_adapter_keys(keys(output_key(Q, role))).modules == {Q: {role: output_key(Q, role)}}


def test_output_keys_are_spelled_as_peft_spells_them() -> None:
    assert output_key(Q, "lora_A") == f"{M}{Q}.lora_A.weight"
    assert output_key(Q, "lora_bias") == f"{M}{Q}.lora_B.bias"
    assert output_key("wte", "lora_embedding_B") == f"{M}wte.lora_embedding_B"


# -------------------------------------------------------------------------------------------------------------- config

parts = st.sampled_from(["q", "k", "qq", "layers", "0", "1", "model"])
paths = st.lists(parts, min_size=1, max_size=4).map(".".join)
patterns = st.one_of(paths, st.sampled_from([r".*q", r"^model\.q", r"q|k", r"layers\.\d+\.q", "(q", r"model.*k"]))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(patterns, st.integers(1, 64), max_size=4), st.dictionaries(patterns, st.integers(1, 64)), paths)
def test_scaling_follows_peft(rank_pattern: dict[str, int], alpha_pattern: dict[str, int], module: str) -> None:
    import re

    from peft.utils.other import get_pattern_key

    config = {"r": 7, "lora_alpha": 14, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    try:
        rank = rank_pattern.get(get_pattern_key(list(rank_pattern), module), 7)
        alpha = alpha_pattern.get(get_pattern_key(list(alpha_pattern), module), 14)
    except re.error:
        with pytest.raises(SourceError, match="bad-adapter-config"):
            lora_scaling(config, module)
        return
    assert lora_scaling(config, module) == (rank, alpha, alpha / rank)
    assert lora_scaling({**config, "use_rslora": True}, module) == (rank, alpha, alpha / rank**0.5)


def test_a_config_that_says_nothing_has_pefts_defaults() -> None:
    from peft import LoraConfig

    assert lora_scaling({}, Q)[:2] == (LoraConfig().r, LoraConfig().lora_alpha)


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0},
        {"r": True},
        {"r": 8.0},
        {"r": None},
        {"r": "8"},
        {"lora_alpha": None},
        {"lora_alpha": "16"},
        {"lora_alpha": float("inf")},
        {"rank_pattern": [1]},
        {"use_rslora": "no"},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="bad-adapter-config"):
        lora_scaling(config, Q)


def built(ranks: dict[str, int], **options: Any) -> dict[str, Any]:
    options.setdefault("base_model_name_or_path", "acme/base")
    found: dict[str, Any] = json.loads(build_adapter_config(ranks, **options))
    return found


def test_modules_of_one_rank_need_no_pattern() -> None:
    config = built({"b.q": 8, "a.q": 8})
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == ["a.q", "b.q"]


def test_the_bytes_do_not_depend_on_the_order_of_modules() -> None:
    one = build_adapter_config({"a": 1, "b": 2, "c": 3}, base_model_name_or_path=None)
    assert one == build_adapter_config({"c": 3, "b": 2, "a": 1}, base_model_name_or_path=None)
    assert one.endswith(b"}\n")


@given(st.dictionaries(paths, st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8), st.sets(paths))
def test_built_configs_say_of_each_module_what_was_asked_and_target_no_other(
    modules: dict[str, tuple[int, int]], base: set[str]
) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = built(
        {module: rank for module, (rank, _) in modules.items()},
        alphas={module: float(alpha) for module, (_, alpha) in modules.items()},
        base_modules=base | modules.keys(),
    )
    for module, (rank, alpha) in modules.items():
        assert lora_scaling(config, module) == (rank, alpha, alpha / rank)
    peft_config = LoraConfig(target_modules=config["target_modules"])
    for module in base | modules.keys():
        assert bool(check_target_module_exists(peft_config, module)) == (module in modules)


def test_an_adapter_has_modules_of_positive_rank() -> None:
    for ranks in ({}, {"a": 0}):
        with pytest.raises(ValueError, match="at least"):
            built(ranks)


def test_peft_loads_what_is_built(tmp_path: Path) -> None:
    """Different ranks and alphas, one layer left out: PEFT finds every tensor, wants no other, and scales as asked."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                    num_key_value_heads=1, vocab_size=32)
    )  # fmt: skip
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    chosen = {name: module for name, module in linears.items() if ".layers.1." not in name and "up_proj" not in name}
    ranks = {name: 1 + number % 4 for number, name in enumerate(chosen)}
    alphas = {name: 2.0 * (1 + number % 3) for number, name in enumerate(chosen)}
    state = {}
    for name, module in chosen.items():
        state[output_key(name, "lora_A")] = torch.randn(ranks[name], module.in_features)
        state[output_key(name, "lora_B")] = torch.randn(module.out_features, ranks[name])
    safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes(
        build_adapter_config(ranks, alphas=alphas, base_model_name_or_path=None, task_type="CAUSAL_LM",
                             base_modules=[name for name, _ in model.named_modules()])
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model, str(tmp_path))
    assert not [str(w.message) for w in caught if "adapter" in str(w.message) or "pattern" in str(w.message)]
    layers = {n.removeprefix(M): m for n, m in loaded.named_modules() if isinstance(m, LoraLayer)}
    assert layers.keys() == chosen.keys()
    for name, layer in layers.items():
        assert layer.r["default"] == ranks[name]
        assert layer.scaling["default"] == alphas[name] / ranks[name]
        for role in ("lora_A", "lora_B"):
            assert torch.equal(getattr(layer, role)["default"].weight, state[output_key(name, role)])
