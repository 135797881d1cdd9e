"""How a model checkpoint lies in its folder: weights files, index, config, and the files that go with them.

    model.safetensors                                          one file, or
    model.safetensors.index.json + model-00001-of-0000N.safetensors …   an index and its shards;
    pytorch_model.bin (+ .index.json)                          the same in torch's own format, where there is no other
    config.json                                                the model's config

Reads headers only. Nothing here knows what a tensor means.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

from merger.errors import Problem, SourceError
from merger.formats.safetensors import TensorEntry, read_header
from merger.formats.strict_json import parse_json_object as parse_json_object  # noqa: PLC0414 - its callers look for it here
from merger.formats.tokenizer import TOKENIZER_FILES
from merger.formats.torch_bin import BinEntry, read_bin
from merger.storage.base import Store, read_whole
from merger.tensors import TensorSpec

CONFIG: Final = "config.json"
MAX_JSON_BYTES: Final = 256 * 2**20
"""No index or config comes near; guards memory."""

Kind = Literal["safetensors", "bin"]
_SINGLE: Final[dict[Kind, str]] = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """Which files are the checkpoint's weights."""

    kind: Kind
    files: tuple[str, ...]
    """Sorted."""
    index: str | None
    """Name of the index, where one says which tensor is in which file."""
    weight_map: dict[str, str] | None
    """Tensor name → file, from the index."""


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor of a checkpoint: its file and its place there."""

    file: str
    entry: TensorEntry | BinEntry

    @property
    def spec(self) -> TensorSpec:
        return self.entry.spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model checkpoint, known from its headers."""

    tensors: dict[str, CheckpointTensor]
    """By name: file after file, each in file order."""
    config: dict[str, Any]
    weights: WeightFiles
    files: tuple[str, ...]
    """Every file of the folder, sorted."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What the headers say beside their tensors, all files together."""


def _problem(code: str, what: str, where: str, why: str = "", fix: str = "") -> Problem:
    return Problem(code, what, where, why, fix or "fetch the checkpoint again, or mend its index")


def read_json(store: Store, name: str) -> dict[str, Any]:
    """A stored JSON object, read strictly."""
    return parse_json_object(read_whole(store, name, limit=MAX_JSON_BYTES), f"{store.uri}/{name}")


def find_weights(store: Store) -> WeightFiles:
    """Decide which files are the weights: safetensors before torch's format, never a guess between two.

    Raises SourceError: `no-weights`, `two-checkpoints`, `bad-index`, `path-escapes`, `missing-shard`.
    """
    present = set(store.list_files())
    kinds: tuple[Kind, ...] = ("safetensors", "bin")
    for kind in kinds:
        single, index = _SINGLE[kind], f"{_SINGLE[kind]}.index.json"
        if index in present:
            weight_map = _read_weight_map(store, index, present)
            files = tuple(sorted(set(weight_map.values())))
            if single in present and files != (single,):
                raise SourceError.of(
                    "two-checkpoints",
                    f"there are both {single} and {index}, and the index names other files",
                    where=store.uri,
                    why="they may hold different weights, and loaders differ in which they take",
                    fix=f"remove {single}, or {index} and its shards",
                )
            return WeightFiles(kind=kind, files=files, index=index, weight_map=weight_map)
        if single in present:
            return WeightFiles(kind=kind, files=(single,), index=None, weight_map=None)
    like = sorted(name for name in present if fnmatchcase(name, "*.safetensors") or fnmatchcase(name, "*.bin"))
    raise SourceError.of(
        "no-weights",
        "there is no model.safetensors, no pytorch_model.bin and no index of either",
        where=store.uri,
        why=f"there are only {', '.join(like[:5])}" if like else "there are no weights files at all",
        fix="check the reference and its revision; an adapter belongs under `adapters:`",
    )


def _read_weight_map(store: Store, index: str, present: set[str]) -> dict[str, str]:
    where = f"{store.uri}/{index}"
    weight_map = read_json(store, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(_problem("bad-index", "there is no weight_map in the index", where))
    problems = []
    for file in dict.fromkeys(value if isinstance(value, str) else repr(value) for value in weight_map.values()):
        if not is_plain_path(file):
            why = "names in an index are relative and never climb"
            problems.append(_problem("path-escapes", f"the index names the file {file!r}", where, why))
        elif file not in present:
            problems.append(_problem("missing-shard", f"the index names {file}, which is not there", where))
    if not all(isinstance(value, str) for value in weight_map.values()):
        problems.append(_problem("bad-index", "a value of weight_map is no file name", where))
    if problems:
        raise SourceError(problems)
    return weight_map


def is_plain_path(name: str) -> bool:
    """True for a relative `/`-separated path in its one canonical spelling, which cannot leave its folder."""
    if "\\" in name or ":" in name or not name.isprintable():
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def read_checkpoint(store: Store) -> Checkpoint:
    """A checkpoint from its config, its index and the headers of its weights files.

    Raises SourceError with every disagreement between index and files: `not-in-shard` (the index promises a tensor
    that its file lacks), `not-in-index` (a file holds a tensor the index does not give it), and `no-config`.
    """
    files = store.list_files()
    weights = find_weights(store)
    tensors: dict[str, CheckpointTensor] = {}
    problems: list[Problem] = []
    promised: dict[str, list[str]] = {file: [] for file in weights.files}
    for name, file in (weights.weight_map or {}).items():
        promised[file].append(name)
    metadata: dict[str, str] = {}
    for file in weights.files:
        held: Iterable[TensorEntry | BinEntry]
        if weights.kind == "safetensors":
            header = read_header(store, file)
            held = header.tensors
            metadata.update(header.metadata)
        else:
            held = read_bin(store, file)
        stored = {entry.spec.name: CheckpointTensor(file, entry) for entry in held}
        problems += _disagreements(store, weights, file, promised[file], stored)
        tensors.update(stored)
    if CONFIG not in files:
        problems.append(_problem("no-config", f"there is no {CONFIG}", store.uri, fix="check the reference"))
    if problems:
        raise SourceError(problems)
    return Checkpoint(tensors=tensors, config=read_json(store, CONFIG), weights=weights, files=files, metadata=metadata)


def _disagreements(
    store: Store, weights: WeightFiles, file: str, promised: Iterable[str], stored: Mapping[str, CheckpointTensor]
) -> Iterable[Problem]:
    if weights.weight_map is None:
        return
    where = f"{store.uri}/{weights.index}"
    for name in promised:
        if name not in stored:
            yield _problem("not-in-shard", f"the index places {name} in {file}, which does not hold it", where)
    for name in stored:
        claimed_by = weights.weight_map.get(name)
        if claimed_by != file:
            says = f"places it in {claimed_by}" if claimed_by else "does not know it"
            yield _problem("not-in-index", f"{file} holds {name}, but the index {says}", where)


def build_index(weight_map: Mapping[str, str], total_size: int, total_parameters: int) -> bytes:
    """`*.index.json` as transformers writes it. `total_size` is the tensors' bytes, not the files'."""
    document = {
        "metadata": {"total_parameters": total_parameters, "total_size": total_size},
        "weight_map": dict(weight_map),
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode("utf-8")


def shard_names(count: int, stem: str = "model") -> tuple[str, ...]:
    """`model.safetensors`, or `model-00001-of-00003.safetensors` and so on."""
    if count == 1:
        return (f"{stem}.safetensors",)
    return tuple(f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def split_shards(specs: Iterable[TensorSpec], shard_bytes: int) -> tuple[tuple[TensorSpec, ...], ...]:
    """Divide tensors among shards of at most `shard_bytes` bytes of data, greedily and in the order given.

    As huggingface_hub does it: a tensor larger than a shard gets one of its own, at once, and the shard being filled
    goes on after it.
    """
    shards: list[tuple[TensorSpec, ...]] = []
    filling: list[TensorSpec] = []
    filled = 0
    for spec in specs:
        if spec.nbytes > shard_bytes:
            shards.append((spec,))
            continue
        if filled + spec.nbytes > shard_bytes:
            shards.append(tuple(filling))
            filling, filled = [], 0
        filling.append(spec)
        filled += spec.nbytes
    return (*shards, tuple(filling)) if filling else tuple(shards)


_COMPANIONS: Final = (
    *TOKENIZER_FILES,
    "*.tiktoken",
    "tokenizer.model.v*",
    "chat_templates/*.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "audio_tokenizer_config.json",
)
_SENTENCE_TRANSFORMERS: Final = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json")
_MODULE_FOLDER: Final = re.compile(r"\d+_\w+/")


def companion_files(names: Iterable[str]) -> tuple[str, ...]:
    """Of a model repository's files, those beside weights and config that a loader may ask for; sorted.

    Code is not among them: see auto_map_files. With a `modules.json` (sentence-transformers), the configs and
    tokenizers of its module folders (`1_Pooling/…`) are.
    """
    names = tuple(names)
    folders = {""}
    patterns: tuple[str, ...] = _COMPANIONS
    if "modules.json" in names:
        patterns += _SENTENCE_TRANSFORMERS
        folders |= {match[0] for match in map(_MODULE_FOLDER.match, names) if match}
    found = set()
    for name in names:
        folder = next((f for f in folders if f and name.startswith(f)), "")
        rest = name.removeprefix(folder)
        for pattern in (*patterns, CONFIG) if folder else patterns:
            if rest.count("/") == pattern.count("/") and fnmatchcase(rest, pattern):
                found.add(name)
    return tuple(sorted(found))


def auto_map_files(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The repository's own Python files that a config names for `trust_remote_code`; sorted.

    Works on config.json, tokenizer_config.json and processor configs. References into other repositories
    (`owner/name--module.Class`) name no file here. What these files import is for relative_imports.
    """
    named: list[object] = []
    auto_map, pipelines = config.get("auto_map"), config.get("custom_pipelines")
    if isinstance(auto_map, dict):
        for value in auto_map.values():
            named += value if isinstance(value, list) else [value]
    elif isinstance(auto_map, list):  # older tokenizers: [slow, fast]
        named += auto_map
    if isinstance(pipelines, dict):
        named += [pipeline.get("impl") for pipeline in pipelines.values() if isinstance(pipeline, dict)]
    modules = {name.partition(".")[0] for name in named if isinstance(name, str) and "--" not in name and "." in name}
    return tuple(sorted(f"{module}.py" for module in modules if module.isidentifier()))


def relative_imports(source: str) -> tuple[str, ...]:
    """Files of the same folder that a Python file imports (`from .x import y` → `x.py`); sorted. Runs nothing."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {f"{module.replace('.', '/')}.py" for module in modules}
    return tuple(sorted(found))
