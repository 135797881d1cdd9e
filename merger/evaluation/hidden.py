"""Hidden states of prompts: the forward pass that the gates of a mixture of experts may be made from.

The whole model is instantiated, in float32 on the CPU: four bytes a parameter beside the largest tensor. Prompts go one
by one, so nothing is padded. Weights are read through the plan's own sources, wherever they lie, adapters folded in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from merger.errors import PlanError
from merger.operands import Arena, OperandReader
from merger.planning.nouns import DenseTerm, GateRecipe, LowRankTerm, MergePlan, Term
from merger.unit import one_torch_thread

States = npt.NDArray[np.float32]


def hidden_states(plan: MergePlan, groups: Sequence[Sequence[tuple[int, ...]]]) -> States:
    """What enters each layer for each group of prompts, averaged over them: (groups, layers, width).

    Of a prompt it is the state at its last token; under `hidden_avg` the mean over its tokens.
    Raises PlanError(code `forward-pass`) where transformers has no such model.
    """
    import torch

    recipe = plan.gates
    assert recipe is not None
    model = _model(plan, recipe)
    layers = len(recipe.gates)
    found = []
    with torch.no_grad():
        for prompts in groups:
            total = None
            for ids in prompts:
                states = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
                stacked = torch.stack(states[:layers])[:, 0].double()  # (layers, tokens, width)
                one = stacked.mean(dim=1) if recipe.mode == "hidden_avg" else stacked[:, -1]
                total = one if total is None else total + one
            assert total is not None
            found.append(total / len(prompts))
    return torch.stack(found).float().numpy()


def _model(plan: MergePlan, recipe: GateRecipe) -> Any:
    """The base as a transformers model, from the bytes of its source."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    catalog = plan.sources[recipe.base].catalog
    settings = {key: value for key, value in catalog.config.items() if key not in ("auto_map", "model_type")}
    try:
        config = AutoConfig.for_model(catalog.config["model_type"], **settings)
        model = cast("Any", AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError.of(
            "forward-pass", f"transformers cannot make this model: {error}", where=catalog.reference,
            fix="write gate_mode: cheap_embed or random",
        ) from error  # fmt: skip
    reader = OperandReader(plan, Arena(), factor_bytes=1 << 28)
    with one_torch_thread(plan):
        held = {name: _tensor(plan, recipe, reader, name) for name in catalog.tensors}
    missing, unexpected = model.load_state_dict(held, strict=False, assign=True)
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    lost = [name for name in missing if name not in tied]
    strange = [name for name in unexpected if "rotary_emb" not in name]
    if lost or strange:
        raise PlanError.of(
            "forward-pass", "the checkpoint does not hold the tensors that transformers expects",
            where=catalog.reference, why="; ".join([*lost[:4], *strange[:4]]),
            fix="write gate_mode: cheap_embed or random",
        )  # fmt: skip
    return model.eval()


def _tensor(plan: MergePlan, recipe: GateRecipe, reader: OperandReader, name: str) -> Any:
    """One tensor of the base as float32, with what its adapters add."""
    import torch

    spec = plan.sources[recipe.base].stored(name).spec
    terms: list[Term] = [DenseTerm(recipe.base, name)]
    for adapter in recipe.base_adapters:
        modules = plan.sources[adapter].catalog.modules.values()
        terms += [LowRankTerm(adapter, m.a, m.b, m.scaling) for m in modules if m.target == name]
    out = np.empty((spec.rows, spec.cols), np.float32)
    reader.operand(tuple(terms), 0, spec.rows, out)
    return torch.from_numpy(out.reshape(spec.shape))
