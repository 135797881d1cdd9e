"""Where results go: files, headers, offsets and extents of an output. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from merger.formats import checkpoint, safetensors
from merger.planning.nouns import OutputFile, Place
from merger.tensors import DType, TensorSpec


@dataclass(slots=True)
class Layout:
    """The tensor files of one output, laid out: a place for every tensor."""

    output: int
    files: list[OutputFile] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)

    def place(self, tensor: str, part: str = "dense") -> Place:
        from dataclasses import replace

        return replace(self.places[tensor], part=part)


def lay_out(
    output: int, shards: Mapping[str, Sequence[TensorSpec]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """Give every tensor of every file its place. `shards` maps file names to what they hold; `metadata` is what each
    file's header says beside them."""
    layout = Layout(output)
    for name, specs in shards.items():
        prefix, header = safetensors.build_header(specs, {**safetensors.PT_METADATA, **(metadata or {})})
        layout.files.append(OutputFile(name, header.file_size, "tensors", prefix))
        for entry in header.tensors:
            layout.places[entry.spec.name] = _place(output, name, entry.spec, entry.start)
    return layout


def _place(output: int, file: str, spec: TensorSpec, start: int) -> Place:
    whole_bytes = spec.dtype.bits % 8 == 0
    row_bytes = spec.cols * spec.dtype.itemsize if whole_bytes else (spec.nbytes // spec.rows if spec.rows else 0)
    return Place(output, file, start, row_bytes, "dense", spec.dtype, spec.rows, spec.name)


def shard(specs: Sequence[TensorSpec], shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Split a model into files of at most `shard_bytes`, in the given order."""
    groups = checkpoint.split_shards(specs, shard_bytes)
    names = checkpoint.shard_names(len(groups))
    return dict(zip(names, (list(group) for group in groups), strict=True))


def index_file(shards: Mapping[str, Iterable[TensorSpec]]) -> OutputFile | None:
    """model.safetensors.index.json; None for a model of one file."""
    if len(shards) == 1 and "model.safetensors" in shards:
        return None
    weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
    total = sum(spec.nbytes for specs in shards.values() for spec in specs)
    parameters = sum(spec.numel for specs in shards.values() for spec in specs)
    data = checkpoint.build_index(weight_map, total, parameters)
    return literal("model.safetensors.index.json", data)


def literal(name: str, data: bytes) -> OutputFile:
    """A file whose bytes the plan knows."""
    return OutputFile(name, len(data), "literal", data)


def promote(dtypes: Iterable[DType]) -> DType | None:
    """The narrowest float dtype that holds all of these without loss: F16 and BF16 together need F32."""
    found = {d.code: d for d in dtypes if d.is_float}
    if not found:
        return None
    for code in ("F64", "F32"):
        if code in found:
            return found[code]
    if len(found) == 2:
        from merger.tensors import F32

        return F32
    return next(iter(found.values()))
