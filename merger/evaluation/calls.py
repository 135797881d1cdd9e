"""What a program calls of this package: `merger.moe`, `merger.compare`, `merger.tune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merger import api

if TYPE_CHECKING:
    from merger.evaluation.answers import Answers
    from merger.evaluation.changes import Changes
    from merger.evaluation.tune import Measure, Source, Tuning


def moe(manifest: api.ManifestLike, out: str | Path | None = None, **options: Any) -> Any:
    """Assemble a mixture of experts (a manifest with `experts:`), with hidden gates where it asks for them.

    Options are those of `merge`. A forward pass takes four bytes a parameter of the base, for as long as it runs.
    """
    from merger.evaluation.hidden import hidden_states

    return api.merge(manifest, out, hidden=hidden_states, **options)


def compare(
    outputs: Sequence[str | Path], *, base: str | Path | None = None, data: str | Path | None = None,
    device: str = "cpu",
) -> Changes | Answers:  # fmt: skip
    """What outputs changed, beside each other; with `data` (a file of items), what they answer, one model in memory at
    a time. See `merger.evaluation.changes.compare_changes` and `merger.evaluation.answers.compare_answers`."""
    names, on = list(map(str, outputs)), None if base is None else str(base)
    if data is None:
        from merger.evaluation.changes import compare_changes

        return compare_changes(names, base=on)
    from merger.evaluation.answers import compare_answers
    from merger.evaluation.items import load_items

    return compare_answers(names, load_items(str(data)), str(data), base=on, device=device)


def tune(
    manifest: Source, data: str | Path, *, over: Mapping[str, Sequence[Any]] | None = None, by: Measure = "nll",
    check: str | Path | None = None, base: str | Path | None = None, device: str = "cpu",
) -> Tuning:  # fmt: skip
    """Try every combination of `over` (manifest keys to values; default: of lambda) on the items of a file. See
    `merger.evaluation.tune.tune`."""
    from merger.evaluation.items import load_items
    from merger.evaluation.tune import tune as try_all

    return try_all(
        manifest, load_items(str(data)), str(data), over=over, by=by,
        check=() if check is None else load_items(str(check)), base=None if base is None else str(base), device=device,
    )  # fmt: skip
