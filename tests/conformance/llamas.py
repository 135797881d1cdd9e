"""Checkpoints with the tensors and the tokenizer of a Llama, without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.conformance.folders import model

CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "num_hidden_layers": 2}
TOKENIZER: dict[str, Any] = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None, "decoder": None, "truncation": None, "padding": None,
    "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(40)}, "unk_token": "w0"},
}  # fmt: skip


def llama(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (40, 32), "model.norm.weight": (32,), "lm_head.weight": (40, 32)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.q_proj.weight": (32, 32), f"{at}self_attn.k_proj.weight": (16, 32)}
        shapes |= {f"{at}mlp.{p}.weight": (48, 32) for p in ("gate_proj", "up_proj")}
        shapes |= {f"{at}mlp.down_proj.weight": (32, 48)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    model(folder, seed, tensors=tensors, config=CONFIG)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder
