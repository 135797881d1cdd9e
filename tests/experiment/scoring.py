"""How well a model answers, by teacher forcing: whether every token of the answer and its end is likeliest, and NLL.

Adapters touch the last layers alone, so what reaches these layers is computed once an item and kept. A model under test
is the base with the deltas of a merged checkpoint on these layers, at any scale: W + scale·(merged − W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.demo.train import TARGETS, encode
from tests.experiment.tasks import TASKS, TEST, VALIDATION

FIRST_LAYER: Final = 22
"""The first of the layers that are adapted: the last eight."""
BATCH: Final = 32
DTYPE: Final = torch.bfloat16
"""What models are run in, merged weights rounded once to it; merges themselves are float32."""
Split = str
"""validation or test."""
Deltas = Mapping[str, Tensor]
"""By the weight's name in the checkpoint: float32 [out, in]."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model makes of the items of one task, in their order."""

    right: tuple[bool, ...]
    """Whether the likeliest tokens are the whole answer and its end."""
    loss: tuple[float, ...]
    """Mean negative log-likelihood of the answer's tokens and its end, in nats."""


@dataclass(frozen=True, slots=True)
class _Batch:
    hidden_BLD: Tensor
    answer_BL: Tensor
    """Positions whose next token is the answer's."""
    wanted_N: Tensor
    item_N: Tensor


def is_adapted(name: str) -> bool:
    """Whether a weight of the checkpoint is one that the adapters change."""
    parts = name.split(".")
    return parts[1] == "layers" and parts[-2] in TARGETS and int(parts[2]) >= FIRST_LAYER


def prepare_tail(base: Path, folder: Path) -> Path:
    """The adapted weights of the base alone, in float32: what merges fold into, so that nothing is rounded to bf16."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.float() for name, w in load_file(base / "model.safetensors").items() if is_adapted(name)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((base / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def read_deltas(folder: Path, tail: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A merged model's weights minus the base's."""
    merged = load_file(folder / "model.safetensors")
    return {name: merged[name] - weight for name, weight in tail.items()}


class Bench:
    """The base, and every held-out item's states where the adapted layers begin."""

    def __init__(self, base: Path, tail: Path, tasks: Sequence[str]) -> None:
        """Read the base and compute the states."""
        tokenizer = AutoTokenizer.from_pretrained(base)
        self.tail = load_file(tail / "model.safetensors")
        auto: Any = AutoModelForCausalLM
        model = auto.from_pretrained(base, dtype=torch.float32).eval()
        model.config.use_cache = False
        layers, norm = model.model.layers, model.model.norm
        model.model.layers, model.model.norm = layers[:FIRST_LAYER], nn.Identity()
        self._items: dict[tuple[str, Split], list[_Batch]] = {}
        with torch.inference_mode():
            for task in tasks:
                held_out = TASKS[task].held_out(VALIDATION + TEST)
                for split, part in (("validation", held_out[:VALIDATION]), ("test", held_out[VALIDATION:])):
                    self._items[task, split] = _batches(model.model, tokenizer, [(e.prompt, e.answer) for e in part])
        model.model.layers, model.model.norm = layers[FIRST_LAYER:], norm
        self._models = {torch.float32: model}
        self._weights = {torch.float32: _adapted_weights(model)}

    def _model(self, dtype: torch.dtype) -> Any:
        if dtype not in self._models:
            import copy

            self._models[dtype] = copy.deepcopy(self._models[torch.float32]).to(dtype)
            self._weights[dtype] = _adapted_weights(self._models[dtype])
        return self._models[dtype]

    def score(
        self, deltas: Deltas, tasks: Sequence[str], split: Split, *, scale: float = 1.0,
        dtype: torch.dtype = DTYPE,
    ) -> dict[str, Scores]:  # fmt: skip
        """The scores of base + scale·deltas."""
        model = self._model(dtype)
        with torch.inference_mode():
            for name, weight in self._weights[dtype].items():
                weight.copy_(torch.add(self.tail[name], deltas[name], alpha=scale) if deltas else self.tail[name])
            return {task: _score(model, self._items[task, split], dtype) for task in tasks}


def _adapted_weights(model: Any) -> dict[str, Tensor]:
    return {
        f"model.layers.{int(layer) + FIRST_LAYER}.{rest}": weight.data
        for name, weight in model.model.layers.named_parameters()
        for layer, rest in (name.split(".", 1),)
        if rest.split(".")[-2] in TARGETS
    }


def _batches(below: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[_Batch]:
    """The items in batches of like length; `encode` sorts by length, so each item is found again by its tokens."""
    found = []
    lengths = [len(encode([text], 1, tokenizer)[0].tokens[0]) for text in texts]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    for at in range(0, len(order), BATCH):
        items = order[at : at + BATCH]
        (batch,) = encode([texts[i] for i in items], len(items), tokenizer)
        # Padded on the right under a causal mask: no position of an item sees the padding.
        hidden = below(input_ids=batch.tokens).last_hidden_state
        wanted = batch.tokens.roll(-1, dims=1)[batch.answer]
        found.append(_Batch(hidden, batch.answer, wanted, torch.tensor(items)[batch.answer.nonzero()[:, 0]]))
    return found


def _score(model: Any, batches: Sequence[_Batch], dtype: torch.dtype) -> Scores:
    count = 1 + max(int(batch.item_N.max()) for batch in batches)
    wrong, total, tokens = torch.zeros(count), torch.zeros(count), torch.zeros(count)
    for batch in batches:
        states = model.model(inputs_embeds=batch.hidden_BLD.to(dtype)).last_hidden_state
        logits_NV = model.lm_head(states[batch.answer_BL])
        loss = nn.functional.cross_entropy(logits_NV.float(), batch.wanted_N, reduction="none")
        wrong.index_add_(0, batch.item_N, (logits_NV.argmax(1) != batch.wanted_N).float())
        total.index_add_(0, batch.item_N, loss)
        tokens.index_add_(0, batch.item_N, torch.ones_like(loss))
    return Scores(tuple(not x for x in wrong), tuple(round(float(x), 4) for x in total / tokens))
