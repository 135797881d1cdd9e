"""LoRA on packed expert parameters (`target_parameters`). Declarations only; no torch.

    <module>.lora_A.weight (E·r, in)     expert by expert
    <module>.lora_B.weight (out, r·E)    PEFT: rank by rank, the experts of each side by side

    ΔW[e] = scaling · B[:, e::E] · A[e·r : (e+1)·r]

Two parameters of one module are nested: `<module>.base_layer` has the first, `<module>` the second, in the order in
which the module declares them. A checkpoint holds the parameter packed, (E, out, in) or (E, in, out), or expert by
expert under the names of transformers 4; both are bound here. Other writers pack otherwise: before 0.19 PEFT took `in`
for `out` where a model stores (E, out, in), and some trainers lay B out expert by expert. Shapes tell the first unless
in = out; nothing tells the second, so the manifest may say it (`options.moe_lora_layout`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from merger.adapters.declare import AdapterModule, AdapterReading, Change, Formula, LowRank, View
from merger.errors import Problem
from merger.formats import peft
from merger.tensors import TensorSpec

ORDER: Final = ("gate_up_proj", "down_proj")
"""The order in which experts of transformers declare their packed parameters."""
PARTS: Final[dict[str, tuple[tuple[str, ...], ...]]] = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "down_proj": (("down_proj", "w2"),),
}
"""What a packed parameter is made of, by its names in checkpoints that hold experts one by one."""
TRANSPOSED_MODELS: Final = ("gpt_oss", "aria", "openai_privacy_filter")
"""Models whose packed experts are (E, in, out), and say so to PEFT."""
MoeLayout = Literal["peft", "peft_0_18", "expert_major"]
_SWAPPED_BEFORE: Final = (0, 19)


def read_experts(
    config: Mapping[str, Any], keys: peft.ParsedKeys, specs: Mapping[str, TensorSpec], where: str, found: AdapterReading
) -> frozenset[str]:
    """Add the modules of packed parameters to `found`. Returns the module paths that were theirs."""
    named = [str(name) for name in config.get("target_parameters") or ()]
    taken: dict[str, list[str]] = {}
    for module in keys.modules:
        path = _unwrapped(module)
        if any(_holds(path, name, keys) for name in named):
            taken.setdefault(path, []).append(module)
    lacking = [name for name in named if not any(_holds(path, name, keys) for path in taken)]
    if lacking:
        found.problems.append(
            Problem("missing-tensor", f"the adapter has no factors for {lacking[0]}, which target_parameters names",
                    where, "every parameter that was trained has lora_A and lora_B", "fetch the file again")
        )  # fmt: skip
    for path, wrappers in taken.items():
        leaves = {name.rpartition(".")[2] for name in named if _holds(path, name, keys)}
        ordered = [n for n in ORDER if n in leaves] if len(leaves) > 1 else list(leaves)
        wrappers.sort(key=lambda module: -module.count(".base_layer"))
        if len(ordered) != len(leaves) or len(wrappers) != len(ordered):
            found.refuse(
                f"{path} has {len(wrappers)} factors for the parameters {', '.join(sorted(leaves))}", where,
                "which of them is whose is not said where their names are not known",
            )  # fmt: skip
            continue
        for wrapper, leaf in zip(wrappers, ordered, strict=True):
            _read_one(config, f"{path}.{leaf}", keys.modules[wrapper], specs, where, found)
    return frozenset(wrapper for wrappers in taken.values() for wrapper in wrappers)


def expert_pairs(module: AdapterModule, layout: MoeLayout | None, model_type: str | None) -> tuple[LowRank, ...] | str:
    """The product of each expert of a packed parameter, (out, in) as PEFT packs it since 0.19; or why none can be told.
    `model_type` is the base's, where it was read."""
    step = module.changes[0].steps[0]
    assert isinstance(step, Formula)
    numbers, tensors = dict(step.numbers), dict(step.tensors)
    if layout is None and numbers["swapped_by_version"] == "unknown":
        return "its config names no version of PEFT, and versions before 0.19 took in for out"
    old = layout == "peft_0_18" if layout is not None else numbers["swapped_by_version"] == "yes"
    if old and model_type is None:
        return "PEFT before 0.19 took in for out in some models and not in others, and the base was not read"
    swapped = old and model_type not in TRANSPOSED_MODELS
    packed = _Packed(
        tensors["a"], tensors["b"], int(str(numbers["experts"])), int(str(numbers["rank"])),
        float(str(numbers["scaling"])), swapped, layout == "expert_major",
    )  # fmt: skip
    return tuple(_pair(packed, expert, None) for expert in range(packed.experts))


def expert_shape(module: AdapterModule, pairs: tuple[LowRank, ...]) -> tuple[int, int]:
    """(out, in) of one expert's product."""
    step = module.changes[0].steps[0]
    assert isinstance(step, Formula)
    numbers = dict(step.numbers)
    out, inner = int(str(numbers["out"])), int(str(numbers["in"]))
    return (inner, out) if pairs[0].a == dict(step.tensors)["b"] else (out, inner)


def wrapper_of(parameter: str, parameters: Iterable[str]) -> str | None:
    """The module that holds the factors of a packed parameter, where these are trained; None where their order is not
    known."""
    path, _, leaf = parameter.rpartition(".")
    leaves = {name.rpartition(".")[2] for name in parameters if name.rpartition(".")[0] == path}
    if len(leaves) == 1:
        return path
    if not leaves <= set(ORDER):
        return None
    ordered: list[str] = [name for name in ORDER if name in leaves]
    return f"{path}{'.base_layer' * (len(ordered) - 1 - ordered.index(leaf))}"


PACKED_SINCE: Final = "0.19.0"
"""The first PEFT that packs experts as this version writes them."""


def _holds(path: str, name: str, keys: peft.ParsedKeys) -> bool:
    """Whether a module has the parameter that target_parameters names by the end of its path.

    PEFT writes the parameter alone where it made the list itself (`all-linear` on a model of experts). Then modules of
    experts are meant: a linear layer may be called as the parameter is.
    """
    holder = name.rpartition(".")[0]
    if holder:
        return path == holder or path.endswith(f".{holder}")
    return path.rpartition(".")[2] == "experts" or f"{path}.base_layer" in keys.modules


def _unwrapped(module: str) -> str:
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def _read_one(
    config: Mapping[str, Any], parameter: str, roles: Mapping[str, str], specs: Mapping[str, TensorSpec], where: str,
    found: AdapterReading,
) -> None:  # fmt: skip
    if set(roles) != {"lora_A", "lora_B"}:
        found.refuse(f"{parameter} has {', '.join(sorted(roles))}", where, "a packed parameter has lora_A and lora_B")
        return
    a, b = specs[roles["lora_A"]], specs[roles["lora_B"]]
    rank, _, scaling = peft.lora_scaling(config, parameter)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
        found.problems.append(
            Problem("rank-mismatch", f"the factors of {parameter} do not belong together", where,
                    f"lora_A is {a.shape}, lora_B is {b.shape}, of rank {rank} an expert",
                    "mend r or rank_pattern in adapter_config.json, or fetch the file again")
        )  # fmt: skip
        return
    numbers = (
        ("experts", a.shape[0] // rank), ("rank", rank), ("scaling", scaling), ("in", a.shape[1]),
        ("out", b.shape[0]), ("swapped_by_version", _swapped_by_version(config)),
    )  # fmt: skip
    step = Formula("experts", (("a", a.name), ("b", b.name)), numbers, adds=True)
    found.add(
        AdapterModule(
            module=parameter, tuner="lora", layer="experts", rank=rank, scaling=scaling,
            changes=(Change(target=parameter, steps=(step,)),),
        )
    )  # fmt: skip


def _swapped_by_version(config: Mapping[str, Any]) -> str:
    """Whether the PEFT that wrote this took `in` for `out`: yes, no, or unknown."""
    written = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    if written is None:
        return "unknown"
    return "yes" if (int(written[1]), int(written[2])) < _SWAPPED_BEFORE else "no"


# ---------------------------------------------------------------- against a base


@dataclass(frozen=True, slots=True)
class _Packed:
    """One module's factors and what they mean."""

    a: str
    b: str
    experts: int
    rank: int
    scaling: float
    swapped: bool
    """Whether B·A is (in, out)."""
    expert_major: bool


def bind_experts(
    module: AdapterModule, specs: Mapping[str, TensorSpec], model_type: str, layout: MoeLayout | None
) -> list[Change] | str | None:
    """The changes of a packed parameter under the base's names; why it does not fit; or None where it is not there."""
    change = module.changes[0]
    step = change.steps[0]
    assert isinstance(step, Formula)
    stored = specs.get(change.target)
    square = _square_is_swapped(step, layout, transposes=stored is not None and model_type in TRANSPOSED_MODELS)
    if stored is not None:
        return _bind_packed(change, step, stored, layout, square)
    return _bind_one_by_one(change, step, specs, layout, square)


def as_matrix(module: AdapterModule) -> Change | None:
    """The change of a parameter that is one matrix, such as a router's weight: a plain product. None of several."""
    change = module.changes[0]
    (step,) = change.steps
    assert isinstance(step, Formula)
    numbers, tensors = dict(step.numbers), dict(step.tensors)
    if numbers["experts"] != 1 or numbers["swapped_by_version"] != "no":
        return None
    pair = LowRank(tensors["a"], tensors["b"], float(str(numbers["scaling"])), int(str(numbers["rank"])))
    return replace(change, steps=(pair,), shape=(int(str(numbers["out"])), int(str(numbers["in"]))))


def _square_is_swapped(step: Formula, layout: MoeLayout | None, *, transposes: bool) -> bool | None:
    """Whether B·A is (in, out) where shapes cannot tell; None where nothing can."""
    if layout is not None:
        return layout == "peft_0_18" or transposes
    by_version = dict(step.numbers)["swapped_by_version"]
    return {"yes": True, "no": transposes}.get(str(by_version), True if transposes else None)


def _bind_packed(
    change: Change, step: Formula, stored: TensorSpec, layout: MoeLayout | None, square: bool | None
) -> list[Change] | str:
    numbers = dict(step.numbers)
    shape = stored.shape if len(stored.shape) == 3 else (1, *stored.shape)
    if len(shape) != 3 or shape[0] != numbers["experts"]:
        return (
            f"{change.target} is {' × '.join(map(str, stored.shape))}, and the adapter has {numbers['experts']} experts"
        )
    packed = _orient(step, (shape[1], shape[2]), layout, square)
    if isinstance(packed, str):
        return f"{change.target}: {packed}"
    if shape[0] == 1:
        return [replace(change, steps=(_pair(packed, 0, None),), shape=(shape[1], shape[2]))]
    made = (
        *((name, numbers[name]) for name in ("experts", "rank", "scaling")), ("swapped", packed.swapped),
        ("expert_major", packed.expert_major),
    )  # fmt: skip
    return [replace(change, steps=(replace(step, numbers=made),), shape=(shape[0], shape[1] * shape[2]))]


def _bind_one_by_one(
    change: Change, step: Formula, specs: Mapping[str, TensorSpec], layout: MoeLayout | None, square: bool | None
) -> list[Change] | str | None:
    path, _, leaf = change.target.rpartition(".")
    parts = PARTS.get(leaf)
    found = re.match(r"(.*\.\d+\.)", path)
    if parts is None or found is None:
        return None
    names = _named_experts(specs, found[1], [name for part in parts for name in part])
    experts = sorted({expert for expert, _ in names})
    if not experts:
        return None
    columns = [next((n for n in part if (0, n) in names), part[0]) for part in parts]
    lacking = [f"{e}.{n}" for e in experts for n in columns if (e, n) not in names]
    numbers = dict(step.numbers)
    if lacking or experts != list(range(int(str(numbers["experts"])))):
        return f"{change.target} is of {numbers['experts']} experts, the base has {len(experts)}"
    sizes = {specs[names[0, n]].shape for n in columns}
    if len(sizes) != 1 or len(shape := sizes.pop()) != 2:
        return f"the experts of {path} have parts of different shapes"
    packed = _orient(step, (shape[0] * len(columns), shape[1]), layout, square)
    if isinstance(packed, str):
        return f"{change.target}: {packed}"
    return [
        replace(
            change, target=names[e, n], shape=(shape[0], shape[1]),
            steps=(_pair(packed, e, (i * shape[0], (i + 1) * shape[0], 1)),),
        )
        for e in experts for i, n in enumerate(columns)
    ]  # fmt: skip


EXPERT: Final = re.compile(r"\bexperts\.\d+\.")
"""In the names of what belongs to one expert."""
_ONE: Final = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)\.weight")
_BEFORE: Final = re.compile(r"\bblock_sparse_moe\.")
"""What transformers 4 called the module that holds Mixtral's experts."""


def bind_one_expert(
    module: AdapterModule, change: Change, specs: Mapping[str, TensorSpec], model_type: str
) -> Change | str | None:
    """LoRA on one expert by its name in transformers 4, where the checkpoint has the parameter packed. None where it
    does not; why it does not fit, where it does not."""
    named = _ONE.fullmatch(change.target)
    if named is None or len(module.pairs) != 1:
        return None
    for leaf, parts in PARTS.items():
        part = next((i for i, names in enumerate(parts) if named[3] in names), None)
        target = next(
            (t for t in (f"{named[1]}.{leaf}", _BEFORE.sub("mlp.", f"{named[1]}.{leaf}")) if t in specs), None
        )
        if part is None or target is None:
            continue
        shape, pair, swapped = specs[target].shape, module.pairs[0], model_type in TRANSPOSED_MODELS
        if len(shape) != 3 or change.shape is None:
            return None
        rows, cols = (shape[2], shape[1]) if swapped else (shape[1], shape[2])
        if change.shape != (rows // len(parts), cols) or int(named[2]) >= shape[0]:
            return f"{change.target} is {change.shape[0]} × {change.shape[1]}, and {target} of the base {shape}"
        if swapped and len(parts) > 1:
            return f"{target} of the base interleaves what {change.target} is a part of"
        numbers = (
            ("expert", int(named[2])), ("start", part * change.shape[0]), ("rows", shape[1]), ("cols", shape[2]),
            ("scaling", pair.scaling), ("swapped", swapped),
        )  # fmt: skip
        step = Formula("expert", (("a", pair.a), ("b", pair.b)), numbers, adds=True)
        return replace(change, target=target, steps=(step,), shape=(shape[0], shape[1] * shape[2]))
    return None


def _named_experts(specs: Mapping[str, TensorSpec], layer: str, leaves: list[str]) -> dict[tuple[int, str], str]:
    """(expert, part) → tensor, of the experts of one layer."""
    pattern = re.compile(re.escape(layer) + r"(?:.*\.)?experts\.(\d+)\.(" + "|".join(leaves) + r")\.weight")
    found = ((pattern.fullmatch(name), name) for name in specs if name.startswith(layer))
    return {(int(match[1]), match[2]): name for match, name in found if match is not None}


def _orient(step: Formula, shape: tuple[int, int], layout: MoeLayout | None, square: bool | None) -> _Packed | str:
    """What the factors mean for a parameter of (rows, columns) an expert."""
    numbers, tensors = dict(step.numbers), dict(step.tensors)
    ours = (numbers["out"], numbers["in"])
    fits, fits_swapped = ours == shape, ours[::-1] == shape
    if not fits and not fits_swapped:
        return f"the adapter changes experts of {ours[0]} × {ours[1]}, the base has {shape[0]} × {shape[1]}"
    swapped = fits_swapped
    if fits and fits_swapped:
        if square is None:
            return "experts are square and the adapter names no version of PEFT: set options.moe_lora_layout"
        swapped = square
    rank, experts = int(str(numbers["rank"])), int(str(numbers["experts"]))
    scaling = float(str(numbers["scaling"]))
    return _Packed(tensors["a"], tensors["b"], experts, rank, scaling, swapped, layout == "expert_major")


def _pair(packed: _Packed, expert: int, rows: tuple[int, int, int] | None) -> LowRank:
    """One expert's product, or some rows of it."""
    first, rank = expert * packed.rank, packed.rank
    own = (first, first + rank, 1)
    side = own if packed.expert_major else (expert, packed.rank * packed.experts, packed.experts)
    if packed.swapped:
        return LowRank(
            packed.b, packed.a, packed.scaling, rank, View(cols=side, transposed=True),
            View(rows=own, cols=rows, transposed=True),
        )  # fmt: skip
    return LowRank(packed.a, packed.b, packed.scaling, rank, View(rows=own), View(rows=rows, cols=side))
