"""Adapters whose initialisation changed the base: PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ. Declarations only; no torch.

They were trained on W − s·B₀·A₀, so that on the base as it lies on disk ΔW = s·B·A − s·B₀·A₀. PiSSA and OLoRA take
B₀·A₀ from W alone, and it is taken from there again; for all of them the adapter before training gives it, which the
manifest names as `initial`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from merger.adapters.declare import AdapterModule, Change, Formula, LowRank, Step
from merger.errors import Problem

STARTS: Final = ("pissa", "olora", "initial")
"""Formulas that stand for −s·B₀·A₀."""


def with_initial(
    modules: Mapping[str, AdapterModule], initial: Mapping[str, AdapterModule] | None, where: str
) -> tuple[Mapping[str, AdapterModule], list[Problem]]:
    """The modules with −s·B₀·A₀ from the adapter before training, and what stands against that."""
    started = {name: module for name, module in modules.items() if _start(module) is not None}
    if initial is None:
        return modules, _unknown(started, where)
    if not started:
        return modules, [
            Problem("no-effect", f"`initial` is given for {where}, whose initialisation left the base alone",
                    "adapters[].initial", "its deltas do not depend on how it began", "drop initial")
        ]  # fmt: skip
    made, problems = dict(modules), []
    for name, module in started.items():
        first = initial.get(name)
        pair = None if first is None or len(first.pairs) != 1 else first.pairs[0]
        if first is None or pair is None or first.shape != module.shape:
            problems.append(
                Problem("initial-differs", f"the adapter before training has no plain LoRA for {name}", where,
                        "its factors are what the base was reduced by, module by module",
                        "give the adapter that was saved before the first step, with init_lora_weights: true")
            )  # fmt: skip
            continue
        made[name] = _started(module, pair)
    return made, problems


def _start(module: AdapterModule) -> Formula | None:
    step = module.changes[0].steps[0]
    return step if isinstance(step, Formula) and step.kind in STARTS else None


def _started(module: AdapterModule, pair: LowRank) -> AdapterModule:
    first, *others = module.changes
    start = replace(pair, scaling=-pair.scaling, initial=True)
    steps: tuple[Step, ...] = (*first.steps[1:2], start, *first.steps[2:])
    change: Change = replace(first, steps=steps)
    return replace(module, changes=(change, *others), rank=module.rank + pair.rank)


def _unknown(started: Mapping[str, AdapterModule], where: str) -> list[Problem]:
    for module in started.values():
        start = _start(module)
        if start is not None and start.kind == "initial":
            init = dict(start.numbers)["init"]
            return [
                Problem("needs-initial", f"an adapter whose init_lora_weights is {init!r} needs `initial`", where,
                        "that initialisation changed the base by what cannot be found from the base again",
                        "name the adapter before training as adapters[].initial; or, where base_model is the changed "
                        "base itself, write init_lora_weights: true in adapter_config.json")
            ]  # fmt: skip
    return []
