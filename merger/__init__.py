"""raymerge's core: all that a merge is, without a cluster.

    import merger
    merger.merge("manifest.yaml", "out")

Importing this package imports neither torch nor transformers nor ray; the functions import what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merger.api import add_weighted_adapter, extract, fold, load_plugin, merge, plan
    from merger.evaluation.calls import compare, moe, tune

__all__ = ["add_weighted_adapter", "compare", "extract", "fold", "load_plugin", "merge", "moe", "plan", "tune"]


def __getattr__(name: str) -> Any:
    if name in ("compare", "moe", "tune"):
        from merger.evaluation import calls

        return getattr(calls, name)
    if name in __all__:
        from merger import api

        return getattr(api, name)
    raise AttributeError(f"module 'merger' has no attribute {name!r}")
