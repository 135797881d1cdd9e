"""raymerge's core: all that a merge is, without a cluster.

    import merger
    merger.merge("manifest.yaml", "out")

Importing this package imports neither torch nor transformers nor ray; the functions import what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merger.api import add_weighted_adapter, extract, fold, load_plugin, merge, plan
    from merger.evaluation.assemble import moe

__all__ = ["add_weighted_adapter", "extract", "fold", "load_plugin", "merge", "moe", "plan"]


def __getattr__(name: str) -> Any:
    if name == "moe":
        from merger.evaluation import assemble

        return assemble.moe
    if name in __all__:
        from merger import api

        return getattr(api, name)
    raise AttributeError(f"module 'merger' has no attribute {name!r}")
