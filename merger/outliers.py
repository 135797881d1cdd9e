"""How large each adapter of a merge is, and whether one stands out: `sizes_of`, `outliers`. Pure.

A merge adds what it is given, and an adapter that is much larger than the others, or that lies in one module where
theirs lie in all, decides the result by itself. That is what a training that diverged looks like, a scaling that was
applied twice, and an adapter that was made to hide something. Norms prove none of these; they say where to look.

Each ‖scaling·B·A‖ is taken from the factors where they are read whole anyway (merger/pairs.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, Final

from merger.errors import Problem
from merger.planning.nouns import MergePlan
from merger.receipts import Receipt

NOTE: Final = "size."
"""A note of a receipt by this name and the position of a source is the squared norm of what it does to the module."""
_TIMES: Final = 10.0
"""How many times as large as the median of the others a source stands out."""
_SHARE: Final = 0.5
"""The share of its energy in one module above which a source may stand out."""
_MODULES: Final = 8
"""Modules below which such a share says nothing."""


def sizes_of(plan: MergePlan, output: int, receipts: Iterable[Receipt]) -> dict[str, dict[str, float]]:
    """Source → module → squared norm of its delta there, of the sources whose factors were read whole."""
    found: dict[str, dict[str, float]] = {}
    for receipt in receipts:
        task = plan.tasks[plan.units[receipt.unit].task]
        if not any(extent.output == output for extent in receipt.extents):
            continue
        for name, value in receipt.notes.items():
            if name.startswith(NOTE) and (terms := task.entries[int(name.removeprefix(NOTE))].terms):
                label = plan.sources[terms[0].source].label
                found.setdefault(label, {})[task.name] = value
    return found


def as_json(sizes: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """For the report: each source's ‖Δ‖, in how many modules, and which is the largest."""
    found = []
    for label, modules in sizes.items():
        largest = max(modules, key=lambda name: modules[name])
        found.append({
            "source": label, "norm": sum(modules.values()) ** 0.5, "modules": len(modules), "largest": largest,
            "largest_norm": modules[largest] ** 0.5,
        })  # fmt: skip
    return found


def outliers(sizes: Mapping[str, Mapping[str, float]]) -> list[Problem]:
    """Sources that stand out among the others. One has none to stand out among."""
    norms = {label: sum(modules.values()) ** 0.5 for label, modules in sizes.items()}
    found = []
    for label, modules in sizes.items():
        others = [norm for other, norm in norms.items() if other != label]
        if not others:
            continue
        median = statistics.median(others)
        if median > 0 and norms[label] > _TIMES * median:
            found.append(
                Problem(
                    "source-stands-out", f"‖Δ‖ of {label} is {norms[label]:.3g}, {norms[label] / median:.0f} times "
                    "that of the others", label, "the merge is that source with little beside it",
                    "look at its scaling and where it comes from; weigh it less, or balance: nan",
                )
            )  # fmt: skip
        name = max(modules, key=lambda each: modules[each])
        share = _share(modules, name)
        if len(modules) >= _MODULES and share > _SHARE and all(
            _share(theirs, name) < share / 2 for other, theirs in sizes.items() if other != label
        ):  # fmt: skip
            found.append(
                Problem(
                    "module-stands-out", f"{share:.0%} of the energy of {label} is in one of {len(modules)} modules",
                    name, "the others are not so; an adapter that was trained on text seldom is",
                    "look at where it comes from; leave the module out with exclude",
                )
            )  # fmt: skip
    return found


def _share(modules: Mapping[str, float], name: str) -> float:
    total = sum(modules.values())
    return modules.get(name, 0.0) / total if total > 0 else 0.0
