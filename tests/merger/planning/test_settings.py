"""Models whose configs disagree on what a row means."""

from __future__ import annotations

from typing import Any

import pytest

from merger.planning.settings import settings_problems

LLAMA = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2, "rope_theta": 10000.0}


def _found(*configs: dict[str, Any]) -> tuple[list[str], list[str]]:
    refused, remarked = settings_problems([(f"m{i}", config) for i, config in enumerate(configs)])
    return [p.what for p in refused], [p.what for p in remarked]


@pytest.mark.parametrize(
    "other",
    [
        {"rope_theta": 500000.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0}},
        {"num_key_value_heads": 4},
        {"partial_rotary_factor": 0.5},
        {"text_config": {"rope_theta": 1.0}, "rope_theta": 20000},
    ],
)
def test_rotary_positions_and_heads_must_agree(other: dict[str, Any]) -> None:
    refused, remarked = _found(LLAMA, LLAMA | other)
    assert len(refused) == 1
    assert not remarked


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"rope_theta": 10000, "rope_scaling": None, "head_dim": None},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 1.0}},
        {"eos_token_id": 7, "use_cache": False, "transformers_version": "4.1"},
    ],
)
def test_one_setting_in_two_spellings_is_one(other: dict[str, Any]) -> None:
    assert _found(LLAMA, LLAMA | other) == ([], [])


def test_a_setting_that_one_leaves_out_is_not_compared() -> None:
    assert _found(LLAMA, {"model_type": "llama"}) == ([], [])


def test_layer_kinds_have_rotary_settings_of_their_own() -> None:
    gemma = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    other = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 2e4}}}
    assert _found(gemma, gemma) == ([], [])
    assert len(_found(gemma, other)[0]) == 1


def test_nested_configs_are_compared_by_part() -> None:
    first = {"text_config": LLAMA, "vision_config": {"num_heads": 4}}
    second = {"text_config": LLAMA | {"hidden_act": "silu"}, "vision_config": {"num_heads": 8}}
    assert _found(first, second) == (["the models differ in vision_config.num_heads"], [])
    third = {"text_config": LLAMA | {"hidden_act": "gelu"}}
    assert _found(second, third) == ([], ["the models differ in text_config.hidden_act"])
