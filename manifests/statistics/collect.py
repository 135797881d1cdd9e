"""What `fisher` and `regmean` need of each source, collected with a model in memory and saved as safetensors.

    from safetensors.torch import save_file

    model = AutoModelForCausalLM.from_pretrained("org/a")      # or PeftModel(...).merge_and_unload() for an adapter
    save_file(collect_grams(model, batches), "a-grams.safetensors")
    save_file(collect_fisher(model, batches), "a-fisher.safetensors")

`batches` are token ids of what this source is good at; the same number of tokens for every source, or weights to match.
Tensors go by the names of the model's own parameters. Copy this file and change it: nothing imports it but a test.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def collect_grams(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """XᵀX of the inputs of every linear layer, (inputs, inputs), float32, by the name of the layer's weight."""
    grams: dict[str, Tensor] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            key = f"{name}.weight"

            def add(_: nn.Module, inputs: tuple[Any, ...], key: str = key) -> None:
                x = inputs[0].flatten(0, -2).double()
                grams[key] = grams.get(key, 0) + x.T @ x

            hooks.append(layer.register_forward_pre_hook(add))
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {key: gram.float() for key, gram in grams.items()}


def collect_fisher(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """The mean over samples of the squared gradient of the loss on what the model itself would say, by parameter."""
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    count = 0
    for sample in (sample for batch in batches for sample in batch):
        logits = model(sample[None]).logits[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                total[name] += gradient.float() ** 2
        count += 1
    return {name: squares / max(1, count) for name, squares in total.items()}
