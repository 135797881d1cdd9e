"""Small models of the popular families, and what each is fed: for tests that every checkpoint keeps its own layout.

DeepSeek-V3 in FP8 with its prediction layer, and gpt-oss in MXFP4, have files of their own under
tests/merger/quantization/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import transformers as tf
from torch import Tensor

IDS: Final = torch.arange(3, 19).reshape(2, 8)
_SPECIAL: Final[dict[str, Any]] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT: Final[dict[str, Any]] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1, **_SPECIAL,
}  # fmt: skip
_HEADS: Final[dict[str, Any]] = {**_TEXT, "num_key_value_heads": 4}


def _text() -> dict[str, Tensor]:
    return {"input_ids": IDS}


def _pairs() -> dict[str, Tensor]:
    return {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}


def _image(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size)}


@dataclass(frozen=True, slots=True)
class Family:
    """A model class, a small config, and an input."""

    model: Any
    config: Callable[[], Any]
    inputs: Callable[[], Mapping[str, Tensor]] = _text
    slow: bool = True
    """Whether it is left out of the default run."""
    adapts: str | list[str] = "all-linear"
    """PEFT's target_modules."""
    names: tuple[str, ...] = field(default=())
    """Parts of names that its checkpoints are known by: the original layout, not that of today's classes."""


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **more}}


_VISION: Final[dict[str, Any]] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def _qwen2_vl() -> Any:
    return tf.Qwen2VLConfig(
        text_config={**_TEXT, **_rope(mrope_section=[1, 1, 2])},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
        tie_word_embeddings=False,
    )  # fmt: skip


def _qwen2_5_vl() -> Any:
    return tf.Qwen2_5_VLConfig(
        text_config={**_TEXT, **_rope(mrope_section=[1, 1, 2])},
        vision_config={"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
                       "patch_size": 4, "fullatt_block_indexes": [1]},
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
        tie_word_embeddings=False,
    )  # fmt: skip


def _qwen3_vl() -> Any:
    return tf.Qwen3VLConfig(
        text_config={**_TEXT, "head_dim": 8, **_rope(mrope_section=[1, 1, 2], mrope_interleaved=True)},
        vision_config={"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
                       "patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
        tie_word_embeddings=False,
    )  # fmt: skip


def _llava() -> Any:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_VISION, projection_dim=32), text_config=tf.LlamaConfig(**_TEXT),
        image_token_index=90, vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip


def _gemma3() -> Any:
    text = {**_TEXT, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    return tf.Gemma3Config(
        text_config=text, vision_config={**_VISION, "vision_use_head": False}, mm_tokens_per_image=4,
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip


def _llama4() -> Any:
    text = {
        **_TEXT, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 16, "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        **_VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        "intermediate_size": 128, "pixel_shuffle_ratio": 0.5,
    }  # fmt: skip
    return tf.Llama4Config(text_config=text, vision_config=vision, boi_token_index=90, eoi_token_index=91,
                           image_token_index=92)  # fmt: skip


def _mixtral() -> Any:
    return tf.MixtralConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2)


def _qwen3_moe() -> Any:
    return tf.Qwen3MoeConfig(
        **{**_TEXT, "head_dim": 8},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=1,
    )


def _qwen3_next() -> Any:
    return tf.Qwen3NextConfig(
        **_TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


def _deepseek_v3() -> Any:
    return tf.DeepseekV3Config(
        **_HEADS, moe_intermediate_size=24, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip


def _gpt_oss() -> Any:
    return tf.GptOssConfig(**_TEXT, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)


def _glm4_moe() -> Any:
    return tf.Glm4MoeConfig(
        **{**_TEXT, "head_dim": 8}, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1,
        topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip


def _t5() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return tf.T5Config(**{**sizes, "decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0})


def _whisper() -> Any:
    return tf.WhisperConfig(
        vocab_size=96, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=16,
        max_target_positions=32, decoder_start_token_id=1, init_std=0.1, **_SPECIAL,
    )  # fmt: skip


def _sound() -> dict[str, Tensor]:
    return {"input_features": torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32), "decoder_input_ids": IDS[:, :4]}


def _clip() -> Any:
    return tf.CLIPConfig(
        text_config={**_HEADS, "projection_dim": 16}, vision_config={**_VISION, "projection_dim": 16}, projection_dim=16
    )


FAMILIES: Final[dict[str, Family]] = {
    # The eight shapes of checkpoints that go through every change.
    "mixtral": Family(tf.MixtralForCausalLM, _mixtral, slow=False, names=("block_sparse_moe.experts.3.w2.weight",)),
    "qwen3_moe": Family(tf.Qwen3MoeForCausalLM, _qwen3_moe, slow=False, names=("mlp.experts.3.down_proj.weight",)),
    "deepseek_v3": Family(tf.DeepseekV3ForCausalLM, _deepseek_v3, slow=False, names=("kv_a_proj_with_mqa.weight",)),
    "gpt_oss": Family(tf.GptOssForCausalLM, _gpt_oss, slow=False, names=("mlp.experts.gate_up_proj",)),
    "qwen2_vl": Family(tf.Qwen2VLForConditionalGeneration, _qwen2_vl, slow=False, names=("visual.blocks.1.",)),
    "t5": Family(
        tf.T5ForConditionalGeneration,
        _t5,
        _pairs, slow=False, names=("encoder.block.1.layer.0.SelfAttention.q.weight", "shared.weight"),
    ),
    "bert": Family(tf.BertForMaskedLM, lambda: tf.BertConfig(**_HEADS), slow=False,
                   names=("bert.encoder.layer.1.attention.self.query.weight",)),
    "gpt2": Family(
        tf.GPT2LMHeadModel,
        lambda: tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_SPECIAL),
        slow=False, names=("h.1.attn.c_attn.weight",),
    ),
    # Decoders with packed projections, and others of today.
    "phi3": Family(tf.Phi3ForCausalLM, lambda: tf.Phi3Config(**_TEXT), names=("qkv_proj", "gate_up_proj")),
    "falcon": Family(
        tf.FalconForCausalLM,
        lambda: tf.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                num_kv_heads=2, new_decoder_architecture=True, initializer_range=0.1, **_SPECIAL),
        names=("query_key_value",),
    ),
    "bloom": Family(
        tf.BloomForCausalLM,
        lambda: tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.1, **_SPECIAL),
        names=("query_key_value",),
    ),
    "gpt_neox": Family(tf.GPTNeoXForCausalLM, lambda: tf.GPTNeoXConfig(**_HEADS), names=("query_key_value",)),
    "opt": Family(
        tf.OPTForCausalLM,
        lambda: tf.OPTConfig(vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                             max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.1, **_SPECIAL),
    ),
    "olmo2": Family(tf.Olmo2ForCausalLM, lambda: tf.Olmo2Config(**_TEXT), names=("q_norm", "k_norm")),
    "gemma2": Family(tf.Gemma2ForCausalLM, lambda: tf.Gemma2Config(**_TEXT, head_dim=8, sliding_window=16)),
    "cohere": Family(tf.CohereForCausalLM, lambda: tf.CohereConfig(**_TEXT)),
    "llama_bias": Family(tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**_TEXT, attention_bias=True, mlp_bias=True),
                         slow=False, names=("q_proj.bias", "o_proj.bias", "down_proj.bias")),
    "qwen2_bias": Family(tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**_TEXT), names=("q_proj.bias",)),
    "qwen3_next": Family(tf.Qwen3NextForCausalLM, _qwen3_next, names=("linear_attn",)),
    "glm4_moe": Family(tf.Glm4MoeForCausalLM, _glm4_moe, names=("experts.3.down_proj",)),
    "mamba": Family(
        tf.MambaForCausalLM,
        lambda: tf.MambaConfig(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=2, **_SPECIAL),
        adapts=["in_proj", "x_proj"], names=("mixer.A_log",),
    ),
    "mamba2": Family(
        tf.Mamba2ForCausalLM,
        lambda: tf.Mamba2Config(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=4,
                                head_dim=16, n_groups=1, chunk_size=8, **_SPECIAL),
        adapts=["in_proj"], names=("mixer.A_log",),
    ),
    # Encoders, encoder-decoders, vision, sound.
    "modernbert": Family(
        tf.ModernBertForMaskedLM,
        lambda: tf.ModernBertConfig(**{**_HEADS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}),
        names=("attn.Wqkv",),
    ),
    "bert_model": Family(tf.BertModel, lambda: tf.BertConfig(**_HEADS), names=("pooler.dense.weight",)),
    "roberta": Family(tf.RobertaForMaskedLM, lambda: tf.RobertaConfig(**_HEADS)),
    "bart": Family(
        tf.BartForConditionalGeneration,
        lambda: tf.BartConfig(vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48,
                              decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
                              max_position_embeddings=64, init_std=0.1, decoder_start_token_id=2, **_SPECIAL),
        _pairs,
    ),
    "whisper": Family(tf.WhisperForConditionalGeneration, _whisper, _sound),
    "vit": Family(tf.ViTForImageClassification, lambda: tf.ViTConfig(**_VISION), _image),
    "clip": Family(tf.CLIPModel, _clip, lambda: {**_text(), **_image()}, names=("vision_model.", "text_model.")),
    # Vision with language.
    "llava": Family(tf.LlavaForConditionalGeneration, _llava, names=("multi_modal_projector",)),
    "qwen2_5_vl": Family(tf.Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl, names=("visual.blocks.1.",)),
    "qwen3_vl": Family(tf.Qwen3VLForConditionalGeneration, _qwen3_vl, names=("visual.blocks.1.",)),
    "gemma3": Family(tf.Gemma3ForConditionalGeneration, _gemma3, names=("multi_modal_projector",)),
    "llama4": Family(
        tf.Llama4ForConditionalGeneration, _llama4,
        adapts=["q_proj", "o_proj", "down_proj", "fc1"],  # its router gives two values, which PEFT's layer cannot wrap
        names=("vision_model.", "experts.gate_up_proj"),
    ),
}  # fmt: skip
