"""Whose names a merged adapter has, where its sources are LoRA files without a config. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Final

from merger.adapters.declare import AdapterModule
from merger.errors import PlanError, Problem
from merger.formats import bare_lora
from merger.formats.bare_lora import Spelling

Held = Sequence[tuple[str, Spelling, Mapping[str, AdapterModule]]]
"""(label, spelling, modules by name) of every source."""
_CONVOLUTION: Final = re.compile(r"(?:conv\w*|_op|in_layers_\d+|out_layers_\d+|skip_connection|input_blocks_0_0)$")


def common_spelling(held: Held) -> Spelling:
    """The sources' own spelling where they share one, else kohya's, whose names follow from all others."""
    found = {spelling for _, spelling, _ in held}
    return found.pop() if len(found) == 1 else "kohya"


def spelling_problems(held: Held) -> list[Problem]:
    """Why equal modules could not be told by these names."""
    peft = [label for label, spelling, _ in held if spelling == "peft"]
    bare = [f"{label} ({spelling})" for label, spelling, _ in held if spelling != "peft"]
    if not bare:
        return []
    if peft:
        return [
            Problem("spellings-differ", "adapters of PEFT and LoRA files of image trainers do not name modules alike",
                    f"PEFT: {', '.join(peft)}; others: {', '.join(bare)}",
                    "a module path of PEFT does not say which part of a pipeline it belongs to",
                    "save all of them in one spelling, for example with diffusers' save_lora_weights")
        ]  # fmt: skip
    problems = []
    for (one, _, first), (other, _, second) in combinations(held, 2):
        paths, others = _by_component(first), _by_component(second)
        for component in sorted(paths.keys() & others.keys()):
            if _comparable(set(paths[component]), set(others[component])):
                continue
            what = "denoiser" if component == "image" else f"text encoder ({component})"
            problems.append(
                Problem("spellings-differ", f"{one} and {other} do not name the modules of the {what or 'model'} alike",
                        f"{one}: {next(iter(paths[component].values()))}; "
                        f"{other}: {next(iter(others[component].values()))}",
                        "which modules are the same does not follow from the names alone",
                        "convert one of them to the other's names first, or check that both are for one model")
            )  # fmt: skip
    return problems


def _by_component(modules: Mapping[str, AdapterModule]) -> dict[str, dict[str, str]]:
    """Component → path with underscores → module."""
    found: dict[str, dict[str, str]] = {}
    for module in modules:
        component, path = bare_lora.component_of(module)
        if component:
            found.setdefault("te1" if component == "te" else component, {})[path] = module
    return found


def _comparable(one: set[str], other: set[str]) -> bool:
    schemes = [{bare_lora.scheme_of(path) for path in paths} - {""} for paths in (one, other)]
    return bool(one & other or (schemes[0] & schemes[1]))


def flat_names(held: Held) -> list[dict[str, str]]:
    """For every source: module → its name in kohya's spelling. Raises PlanError where two modules get one name."""
    every = [name for _, _, modules in held for name in modules]
    several = any(name.startswith(("lora_te1_", "lora_te2_", "text_encoder_2.")) for name in every)
    found = []
    for label, _, modules in held:
        made: dict[str, str] = {}
        taken: dict[str, str] = {}
        for module in modules:
            flat = bare_lora.flat_name(module)
            if several and module.startswith("text_encoder."):
                flat = flat.replace("lora_te_", "lora_te1_", 1)
            if flat in taken:
                raise PlanError.of(
                    "spellings-differ", f"two modules of {label} get one name in kohya's spelling", where=flat,
                    why=f"{taken[flat]} and {module} differ in dots and underscores only",
                    fix="merge files of one spelling",
                )  # fmt: skip
            taken[flat] = module
            made[module] = flat
        found.append(made)
    return found


def with_kernels(name: str, present: Sequence[AdapterModule]) -> list[AdapterModule]:
    """The modules of one layer, with the kernel of its convolution where one of them says it and another does not.

    LoHa, and LoKr of factors, hold a convolution as a matrix. Raises PlanError where nobody tells the kernel.
    """
    kernels = {module.kernel for module in present if module.kernel}
    silent = [module for module in present if module.tuner in {"loha", "lokr"} and not module.kernel]
    if silent and len(kernels) == 1:
        (kernel,) = kernels
        return [replace(m, layer="conv", kernel=kernel) if m in silent else m for m in present]
    if silent and not kernels and _CONVOLUTION.search(name):
        raise PlanError.of(
            "unknown-kernel", f"{name} seems to be a convolution, and no file says of what kernel", where=name,
            why=f"{silent[0].tuner} without a core holds it as a matrix, and a LoRA must be written with the kernel",
            fix="leave it out with exclude, or fold into the checkpoint (kind: tensors)",
        )  # fmt: skip
    return list(present)
