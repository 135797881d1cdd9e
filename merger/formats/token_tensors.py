"""What tensors are called in checkpoints whose rows are tokens: embeddings and heads."""

from __future__ import annotations

from typing import Final

EMBEDDINGS: Final = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight",
)  # fmt: skip
_NAMES: Final = (
    *EMBEDDINGS, "shared.weight", "lm_head.weight", "lm_head.bias", "embed_out.weight", "output.weight",
    "predictions.decoder.weight", "predictions.decoder.bias", "predictions.bias",
)  # fmt: skip


def is_token_name(target: str) -> bool:
    """Whether a tensor, of a model or as an adapter calls it, is named as those whose rows are tokens."""
    return target.replace(".base_layer.", ".").endswith(_NAMES)
