"""LoRA on packed experts that is written back to an adapter: what can be, and where it lies. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merger.adapters.declare import AdapterModule, LowRank
from merger.adapters.experts import EXPERT, MoeLayout, expert_pairs, wrapper_of
from merger.errors import PlanError
from merger.formats import peft
from merger.manifest import Manifest
from merger.methods import MethodSpec
from merger.planning.nouns import ExpertStore
from merger.tensors import DType, TensorSpec


def products_of(
    label: str, module: AdapterModule, layout: MoeLayout | None, model_type: str | None
) -> tuple[LowRank, ...]:
    """The product of each expert. Raises PlanError(code `unknown-packing`)."""
    found = expert_pairs(module, layout, model_type)
    if isinstance(found, str):
        raise PlanError.of(
            "unknown-packing", f"how {label} packs the experts of {module.module} is not known", where=label, why=found,
            fix="set options.moe_lora_layout: peft, peft_0_18 or expert_major, and name a base_model to read",
        )  # fmt: skip
    return found


def check_packed(
    manifest: Manifest, spec: MethodSpec, name: str, present: Sequence[AdapterModule],
    every: Mapping[str, AdapterModule],
) -> None:  # fmt: skip
    """Raise PlanError(code `packed-experts`) for what cannot be merged expert by expert into a packed pair.

    `present` are the sources' modules of this parameter, `every` is all that they have."""
    wanted = manifest.output.store
    packed = [other for other, module in every.items() if module.layer == "experts"]
    why = ""
    if any(module.layer != "experts" for module in present) or any(EXPERT.search(other) for other in every):
        why = "some adapters hold its experts one by one, and PEFT loads one packing"
    elif manifest.combination_type is not None:
        why = "PEFT merges no target_parameters; merge_method does, on each expert's ΔW"
    elif wanted is not None and wanted.energy is not None:
        why = "the ranks that energy asks for differ from expert to expert, and PEFT packs experts of one rank"
    elif spec.statistics != "none":
        why = "statistics are of whole tensors"
    elif wrapper_of(name, packed) is None:
        why = "which of its module's parameters comes first is not known, and PEFT nests their factors in order"
    if why:
        raise PlanError.of(
            "packed-experts", f"the packed experts {name} cannot be written to an adapter", where=name, why=why,
            fix="write store: {svd: {rank: …}} with a merge_method, or merge into a model (kind: model)",
        )  # fmt: skip


def packed_specs(
    wrapper: str, shape: tuple[int, int], store: ExpertStore, dtype: DType
) -> tuple[TensorSpec, TensorSpec]:
    """A and B of packed experts as PEFT stores them. `shape` is one expert's (out, in)."""
    rank = store.rank * store.experts
    a = TensorSpec(peft.output_key(wrapper, "lora_A"), dtype, (rank, shape[1]))
    return a, TensorSpec(peft.output_key(wrapper, "lora_B"), dtype, (shape[0], rank))
