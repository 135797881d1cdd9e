"""`merger.moe`: a merge whose gates may need a forward pass of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merger import api
from merger.evaluation.hidden import hidden_states


def moe(manifest: api.ManifestLike, out: str | Path | None = None, **options: Any) -> Any:
    """Assemble a mixture of experts (a manifest with `experts:`), with hidden gates where it asks for them.

    Options are those of `merge`. A forward pass takes four bytes a parameter of the base, for as long as it runs.
    """
    return api.merge(manifest, out, hidden=hidden_states, **options)
