"""What is compared: every method that merges five adapters, at its defaults and at its paper's sparsity, and more.

A row is a manifest without sources and output. The scale that is tuned multiplies the merged delta, which is what
`lambda` does where a method has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

SCALES: Final = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.5, 4.0, 6.5, 10.0)
"""The grid that every row shares."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way to merge."""

    name: str
    group: str
    """sum, elements, spectral, wrapped, factors or stored: the table that shows it."""
    manifest: dict[str, Any]
    rank: int | None = None
    """Stored as an adapter of this rank first; otherwise the merged delta is folded as it is."""
    tuned: bool = True
    """Whether a scale is chosen on validation items too."""
    weights: Mapping[int, float] = field(default_factory=dict)
    """Weights that are not 1, by the source's position."""
    rotated: bool = False
    """Merged from copies of the adapters with the same deltas in other factors."""

    @property
    def by_adapter(self) -> bool:
        """Whether an adapter is made first, and folded."""
        return self.rank is not None or "combination_type" in self.manifest


def _named(group: str, method: str, label: str = "", *, rank: int | None = None, **parameters: Any) -> Row:
    said = {key.rstrip("_"): value for key, value in parameters.items()}
    manifest: dict[str, Any] = {"merge_method": method}
    if said:
        manifest["parameters"] = said
    return Row(f"{method}{f' {label}' if label else ''}", group, manifest, rank)


def _peft(kind: str, **keywords: Any) -> Row:
    label = " ".join(f"{key} {value}" for key, value in keywords.items())
    return Row(f"PEFT {kind}{f' {label}' if label else ''}", "factors", {"combination_type": kind, **keywords})


_BAND: Final[dict[str, Any]] = {"density": 0.9, "gamma": 0.01}
_PAPER_TIES: Final[dict[str, Any]] = {"density": 0.2, "scope": "model", "elect": "unweighted", "divisor": "count"}

ROWS: Final = (
    # --- linear combinations of the deltas, and means on spheres
    _named("sum", "task_arithmetic"),
    _named("sum", "linear"),
    _named("sum", "nan"),
    _named("sum", "model_stock"),
    _named("sum", "multislerp"),
    _named("sum", "karcher"),
    _named("sum", "lines", "α 0.2, β 0.8", alpha=0.2, beta=0.8),
    # --- element by element
    _named("elements", "ties"),
    _named("elements", "ties", "density 0.2", density=0.2),
    _named("elements", "ties", "density 0.2, as in its paper", **_PAPER_TIES),
    _named("elements", "dare_linear", "density 0.2, inverse", density=0.2, rescale="inverse"),
    _named("elements", "dare_ties"),
    _named("elements", "dare_ties", "density 0.2, inverse", density=0.2, rescale="inverse"),
    _named("elements", "magnitude_prune", "density 0.2", density=0.2),
    _named("elements", "breadcrumbs", "density 0.9", **_BAND),
    _named("elements", "breadcrumbs_ties", "density 0.9", **_BAND),
    _named("elements", "della", "density 0.5, inverse", density=0.5, rescale="inverse"),
    _named("elements", "della_linear", "density 0.5, inverse", density=0.5, rescale="inverse"),
    _named("elements", "sce"),
    _named("elements", "sce", "top 0.1", select_topk=0.1),
    _named("elements", "magmax"),
    _named("elements", "consensus_ta"),
    _named("elements", "pcb"),
    _named("elements", "ram"),
    # --- singular vectors, and elements of the exact core
    _named("spectral", "tsv_m"),
    _named("spectral", "iso_c"),
    _named("spectral", "iso_cts"),
    _named("spectral", "boost", "β 0.01", beta=0.01),
    _named("spectral", "wudi"),
    _named("spectral", "svc"),
    _named("spectral", "star", "η 0.4", eta=0.4),
    _named("spectral", "core_ties"),
    _named("spectral", "core_ties", "density 0.2", density=0.2),
    _named("spectral", "core_dare_ties", "density 0.2", density=0.2),
    _named("spectral", "knots_ties"),
    _named("spectral", "knots_ties", "density 0.2", density=0.2),
    _named("spectral", "knots_dare", "density 0.2", density=0.2),
    # --- steps around a rule
    _named("wrapped", "ties", "density 0.2, balance nan", density=0.2, balance="nan"),
    _named("wrapped", "ties", "density 0.2, calibrate svc", density=0.2, calibrate="svc"),
    _named("wrapped", "tsv_m", "balance nan", balance="nan"),
    _named("wrapped", "tsv_m", "calibrate svc", calibrate="svc"),
    # --- PEFT's combination types, most of which merge A with A and B with B
    _peft("linear"),
    _peft("ties", density=0.2),
    _peft("dare_linear", density=0.2),
    _peft("dare_ties", density=0.2),
    _peft("magnitude_prune", density=0.2),
    _peft("svd"),
    _peft("ties_svd", density=0.2),
    _peft("dare_linear_svd", density=0.2),
    _peft("dare_ties_svd", density=0.2),
    _peft("magnitude_prune_svd", density=0.2),
    # --- what an adapter of the sources' rank, or twice that, keeps
    _named("stored", "ties", "density 0.2, rank 8", rank=8, density=0.2),
    _named("stored", "tsv_m", "rank 8", rank=8),
    _named("stored", "knots_ties", "rank 8", rank=8),
)

SAME: Final = (
    (_named("same", "cat"), "task_arithmetic"),
    (_named("same", "dare_linear"), "task_arithmetic"),
    (_named("same", "magnitude_prune"), "task_arithmetic"),
    (_named("same", "breadcrumbs"), "task_arithmetic"),
    (_named("same", "della_linear"), "task_arithmetic"),
    (_named("same", "breadcrumbs_ties"), "dare_ties"),
    (_named("same", "della"), "ties"),
    (_named("same", "ramplus_tl"), "ram"),
    (_named("same", "core_tsv"), "tsv_m"),
    (_named("same", "core_iso"), "iso_c"),
)
"""Rows that are another row at their defaults; how far from it they are is measured, and they are not scored again."""


def _by_name(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


FLIPPED: Final = replace(
    _by_name("task_arithmetic"), name="task_arithmetic, date at −1", group="check", tuned=False, weights={1: -1.0}
)
ROTATED: Final = tuple(
    replace(_by_name(name), name=f"{name}, rotated", group="check", tuned=False, rotated=True)
    for name in (
        "task_arithmetic", "ties density 0.2", "tsv_m", "iso_c", "knots_ties", "core_ties density 0.2", "PEFT svd",
        "PEFT linear", "PEFT ties density 0.2",
    )
)  # fmt: skip
"""Deltas are the same, so only what is merged factor by factor may change."""
