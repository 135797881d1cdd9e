"""What a scheme says of a quantised checkpoint: which stored tensors make which tensor. No torch.

A scheme's file has one function, `read_…(source)`, which takes codes and their scales out of the stored tensors and
puts in the tensors they stand for. Arithmetic is in `decode.py`, and back in `encode.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from merger.errors import Problem
from merger.tensors import (
    BF16,
    UNREAD,
    Coded,
    DType,
    Part,
    StoredTensor,
    TensorSpec,
    dtype_from_torch_name,
    part_key,
)

ReadSmall = Callable[[Sequence[StoredTensor]], list[bytes]]
"""The bytes of a few small tensors that say how others lie, such as a JSON text or a shape."""

DECODE_ELEMENTS: Final = 1 << 18
"""Elements decoded at once: it bounds scratch."""
SCRATCH_BYTES: Final = 24
"""Scratch that an element takes while it is decoded, at most."""

PARTNERS: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Layers that engines run as one product: one of them cannot be dense while another is quantised."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that a quantised weight can have, as bitsandbytes makes them (see grid.py)."""

    kind: Literal["nf4", "fp4", "int8"]
    block: int = 64
    """Elements that share an absmax; int8 has one a row."""
    double: bool = False
    """Whether the absmaxes are quantised, too."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """The scheme of a checkpoint, and what its output may be."""

    method: str
    """`quant_method` of its config."""
    label: str
    """For people: `nf4, blocks of 64, double-quantised`."""
    default: Literal["keep", "none"]
    """What output.quantization is where the manifest says nothing."""
    skip_key: str | None = None
    """Key of quantization_config that lists modules which are not quantised; None: it has no list of single ones."""
    skip_suffix: str = ""
    """What follows a module's name in that list for some readers; others take the name alone, so both are written."""
    beside: Mapping[str, Any] | None = field(default=None, compare=False)
    """hf_quant_config.json, which says the scheme as well as the config, or in its place."""

    def as_json(self, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
        """What `inspect` says."""
        coded = sum(tensor.coded is not None for tensor in tensors.values())
        return {"method": self.method, "kind": self.label, "tensors": coded, "default": self.default}


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint's tensors as they are to be merged."""

    tensors: dict[str, StoredTensor]
    parts: dict[str, StoredTensor] = field(default_factory=dict)
    """By `part_key` of their names."""
    quantization: Quantization | None = None
    problems: tuple[Problem, ...] = ()


@dataclass(slots=True)
class QuantisedSource:
    """What a scheme reads, and what it has found so far."""

    scheme: Mapping[str, Any]
    """quantization_config."""
    config: Mapping[str, Any]
    """config.json."""
    stored: Mapping[str, StoredTensor]
    read_small: ReadSmall
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the headers of the files say beside their tensors."""
    beside: Mapping[str, Any] | None = None
    """hf_quant_config.json, where there is one."""
    made: dict[str, StoredTensor] = field(default_factory=dict)
    """Name of the codes → the tensor that they stand for."""
    taken: dict[str, StoredTensor] = field(default_factory=dict)
    """Stored tensors that are parts, by name."""
    problems: list[Problem] = field(default_factory=list)

    def named(self, suffix: str) -> list[tuple[str, StoredTensor]]:
        """(name without the suffix, tensor) of every stored tensor whose name ends so."""
        return [(name.removesuffix(suffix), t) for name, t in self.stored.items() if name.endswith(suffix)]

    def get(self, name: str) -> StoredTensor | None:
        return self.stored.get(name)

    def refuse(self, what: str, why: str, fix: str = "use the unquantised checkpoint") -> None:
        """What cannot be read right. Said once, however many tensors it is true of."""
        problem = Problem("quantised-source", what, "", why, fix)
        if problem not in self.problems:
            self.problems.append(problem)

    def add(self, spec: TensorSpec, coded: Coded) -> None:
        """One tensor that is stored as codes."""
        first = coded.parts[0].stored
        for part in coded.parts:
            if part.stored.decoder == "strided":
                self.refuse(f"{part.stored.spec.name} lies as a view of its storage", "codes are read in file order",
                            "save the checkpoint as safetensors")  # fmt: skip
            self.taken[part.stored.spec.name] = part.stored
        self.made[first.spec.name] = StoredTensor(spec, first.file, first.start, "coded", (), coded)

    def unread(self, *names: str) -> tuple[Part, ...]:
        """Parts that go with a tensor's codes and decide none of its values."""
        return tuple(Part("beside", self.stored[n], covers=UNREAD) for n in names if n in self.stored)

    def dtype(self) -> DType:
        """What the unquantised tensors are computed in: the config's word, else the commonest float type."""
        nested = self.config.get("text_config")
        for place in (self.config, nested if isinstance(nested, Mapping) else {}):
            for key in ("dtype", "torch_dtype"):
                found = dtype_from_torch_name(str(place.get(key, "")))
                if found is not None and found.is_float:
                    return found
        floats = [t.spec.dtype for t in self.stored.values() if t.spec.dtype.code in ("F16", "BF16")]
        return max(set(floats), key=lambda d: (floats.count(d), d.code)) if floats else BF16

    def found(self, quantization: Quantization) -> Found:
        """All tensors, coded ones in the place of their codes."""
        tensors: dict[str, StoredTensor] = {}
        for name, tensor in self.stored.items():
            if name in self.made:
                made = self.made[name]
                tensors[made.spec.name] = made
            elif name not in self.taken:
                tensors[name] = tensor
        return Found(tensors, {part_key(n): t for n, t in self.taken.items()}, quantization, tuple(self.problems))


def groups_of(size: int, count: int) -> int | None:
    """Length of each of `count` equal groups that cover `size`, the last perhaps shorter; None where they cannot."""
    if count < 1 or size < count:
        return None
    length = -(-size // count)
    return length if -(-size // length) == count else None


def stem_of(name: str) -> str:
    """The module that a tensor belongs to, as skip lists name it."""
    return name.rpartition(".")[0]


_EXPERT: Final = re.compile(r"(.*\.experts)\.\d+\.")


def partners_of(name: str, names: Mapping[str, object], *, experts: bool = True) -> set[str]:
    """The tensors that engines run as one with this one: q, k and v; gate and up; all `experts` of a layer."""
    expert = _EXPERT.match(name) if experts else None
    if expert is not None:
        return {other for other in names if other.startswith(f"{expert.group(1)}.")}
    found = {name}
    for group in PARTNERS:
        for member in group:
            if f".{member}." in name:
                found |= {o for p in group if (o := name.replace(f".{member}.", f".{p}.")) in names}
    return found
