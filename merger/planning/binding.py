"""The catalog of an adapter against the catalog of a model. Pure; the rules are in merger/adapters/bind.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from merger.adapters.bind import HEAD, Base, Binding, bind_adapter
from merger.adapters.declare import AdapterModule, Saved
from merger.adapters.experts import MoeLayout
from merger.adapters.initial import with_initial
from merger.catalog import Catalog
from merger.errors import Problem
from merger.formats.bare_lora import tensors_of
from merger.formats.token_tensors import EMBEDDINGS, is_token_name
from merger.planning.inputs import SourceTable
from merger.tensors import TensorSpec


def modules_of(
    table: SourceTable, adapter: int, initial: int | None
) -> tuple[Mapping[str, AdapterModule], list[Problem]]:
    """An adapter's modules, with the first factors of the adapter before training where the manifest names it."""
    catalog = table.catalog(adapter)
    held = None if initial is None else table.catalog(initial).modules
    return with_initial(catalog.modules, held, table.sources[adapter].label)


def replication_of(catalog: Catalog) -> tuple[tuple[int, int], ...]:
    """The runs of the base's layers, [first, last), that an adapter was trained on, one after another; empty for the
    base as it is."""
    named = catalog.config.get("layer_replication") or ()
    return tuple((int(first), int(last)) for first, last in named)


def bind(
    modules: Mapping[str, AdapterModule], adapter: Catalog, label: str, model: Catalog, model_label: str,
    takes: Callable[[str], bool], moe_layout: MoeLayout | None = None, specs: dict[str, TensorSpec] | None = None,
) -> Binding:  # fmt: skip
    """What the modules of an adapter that `takes` lets through do to a model, in the model's names and orientation.

    `specs` are the model's tensors, where they are not those of its files (copied layers)."""
    if specs is None:
        specs = {name: stored.spec for name, stored in model.tensors.items()}
    specs = specs | _own_specs(modules, adapter, specs)
    base = Base(
        label=model_label, specs=specs,
        model_type=str(model.config.get("model_type") or ""), tied=tied_embedding(model),
        moe_layout=moe_layout,
        config=model.config,
    )  # fmt: skip
    if adapter.spelling != "peft":
        found = tensors_of([name for name in modules if takes(name)], specs)
        modules = {
            name: replace(module, changes=(replace(module.changes[0], target=found.get(name, module.target)),))
            for name, module in modules.items()
        }
    transposes = bool(adapter.config.get("fan_in_fan_out"))
    return bind_adapter(modules, base, label, takes, fan_in_fan_out=transposes)


def _own_specs(
    modules: Mapping[str, AdapterModule], adapter: Catalog, specs: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec]:
    """Embeddings and heads that an adapter holds whole in another size: what else it does to them is in that size."""
    found = {}
    for module in modules.values():
        step, target = module.changes[0].steps[0], module.target.replace(".base_layer.", ".")
        if isinstance(step, Saved) and is_token_name(target) and (target in specs or target == HEAD):
            found[target] = replace(adapter.tensors[step.tensor].spec, name=target)
    return found


def tied_embedding(catalog: Catalog) -> str | None:
    """The tensor that serves as a tied model's head, which its files leave out."""
    if not catalog.tied:
        return None
    found = [name for name in catalog.tensors if name.endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None
