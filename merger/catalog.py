"""What a source holds, read from configs and headers alone: `read_catalog`. No torch, no tensor data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from merger.adapters.bare import read_bare
from merger.adapters.declare import AdapterModule
from merger.adapters.read import read_adapter
from merger.errors import Problem, SourceError
from merger.formats import bare_lora, checkpoint, peft, safetensors, torch_bin
from merger.formats.token_tensors import is_token_name
from merger.manifest import Reference, parse_model_reference, parse_reference
from merger.quantization import Quantization, read_quantization
from merger.storage import RangeRead, Store, open_source, read_whole
from merger.tensors import StoredTensor as StoredTensor  # noqa: PLC0414 - a catalog is made of them
from merger.tensors import format_size

SourceKind = Literal["adapter", "model", "tensors", "generated", "statistics"]
"""`tensors`: one bare .safetensors file; `generated`: numbers that no file holds (random numbers, router gates)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """One source, pinned. Comparable by value but for its store."""

    reference: str
    """As the user would write it, with the revision that was pinned."""
    kind: SourceKind
    store: Store = field(compare=False)
    pins: dict[str, str]
    """Every file that is read → its pin."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of the companions and code, which are copied whole."""
    tensors: dict[str, StoredTensor]
    config: dict[str, Any]
    """config.json or adapter_config.json."""
    modules: dict[str, AdapterModule] = field(default_factory=dict)
    """Of an adapter: module path → what it does."""
    companions: tuple[str, ...] = ()
    """Of a model: files that a loader may ask for beside the weights and the config."""
    code: tuple[str, ...] = ()
    """Python files that auto_map names: copied, never run."""
    shards: tuple[str, ...] = ()
    """Of a model: weight files in order."""
    parts: dict[str, StoredTensor] = field(default_factory=dict)
    """Of a quantised model: the stored tensors that its coded tensors consist of, by `part_key` of their names."""
    quantization: Quantization | None = None
    """Of a quantised model: the scheme, and what it does to a tensor that is written back."""
    licence: str = ""
    trained_over: str = ""
    """Of an adapter: what says that its base was quantised while it was trained; empty where nothing does."""
    spelling: bare_lora.Spelling = "peft"
    """Of an adapter: whose names its tensors have; none but PEFT's goes with an adapter_config.json."""
    problems: tuple[Problem, ...] = ()
    """What in this source cannot be merged right; a merge refuses, `inspect` shows."""

    def stored(self, name: str) -> StoredTensor:
        """A tensor by its name, or a part of a coded one by `part_key` of its own."""
        return self.tensors[name] if name in self.tensors else self.parts[name]

    @property
    def base_name(self) -> str | None:
        """The base that an adapter names, or None."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def tied(self) -> bool:
        """Whether the model's config ties its head to its embeddings (also within text_config)."""
        for config in (self.config, self.config.get("text_config")):
            if isinstance(config, Mapping) and "tie_word_embeddings" in config:
                return bool(config["tie_word_embeddings"])
        return False


TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
)  # fmt: skip
"""Those that trainers put beside an adapter when they have added tokens."""
_LICENCE: Final = re.compile(r"^license:\s*([^\s#]+)", re.MULTILINE)
_CARD_BYTES: Final = 1 << 20


def read_catalog(reference: Reference, kind: Literal["adapter", "model", "tensors"]) -> Catalog:
    """Read configs and headers of one source and pin its files. No tensor data.

    Raises SourceError with everything that is wrong with the files; what is sound but cannot be merged yet is in
    `Catalog.problems`.
    """
    if kind == "tensors":
        return _read_tensors(reference)
    if kind == "adapter" and is_bare(reference):
        folder, name = split_file(reference)
        return _read_bare_adapter(_open(folder), name)
    return read_from(_open(reference), kind)


def read_from(store: Store, kind: Literal["adapter", "model", "tensors"]) -> Catalog:
    """The catalog of what lies at the root of a store."""
    if kind == "tensors":
        return _only_tensors(store)
    return (_read_adapter if kind == "adapter" else _read_model)(store.uri, store)


def read_statistics(reference: Reference) -> Catalog:
    """Read the headers of statistics, and pin their files: one .safetensors file, or those of a folder.

    Raises SourceError.
    """
    folder, file = split_file(reference)
    store = _open(folder)
    names = sorted(n for n in store.list_files() if n.endswith(".safetensors") and "/" not in n and file in {"", n})
    text = f"{store.uri}/{file}" if file else store.uri
    if not names:
        raise SourceError.of(
            "no-such-source", "there are no statistics here", where=text,
            why="they are one .safetensors file, or a folder of them", fix="check the reference",
        )  # fmt: skip
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for name in names:
        for entry in safetensors.read_header(store, name).tensors:
            if entry.spec.name in tensors:
                other = tensors[entry.spec.name].file
                problems.append(
                    Problem("bad-statistics", f"{entry.spec.name} is in {other} and in {name}", text,
                            "which of them counts is not said", "name one file, or remove one of them")
                )  # fmt: skip
            tensors[entry.spec.name] = _stored(name, entry)
    return Catalog(
        reference=text, kind="statistics", store=store, pins={name: store.stat(name).pin for name in names},
        tensors=tensors, config={}, problems=tuple(problems),
    )  # fmt: skip


def split_file(reference: Reference) -> tuple[Reference, str]:
    """The folder of a reference to a .safetensors file, and the file's name; the reference and "" where it is none."""
    path = reference.subfolder if reference.kind in {"hub", "s3"} else reference.root
    folder, slash, name = path.rpartition("/")
    if not name.endswith(".safetensors") or (reference.kind == "local" and os.path.isdir(path)):
        return reference, ""
    if reference.kind in {"hub", "s3"}:
        return replace(reference, subfolder=folder), name
    return replace(reference, root=folder or slash), name


def _open(reference: Reference) -> Store:
    return open_source(reference.kind, reference.root, revision=reference.revision, subfolder=reference.subfolder)


def _nothing(text: str) -> SourceError:
    return SourceError.of(
        "no-such-source", f"there is nothing at {text}", where=text, why="the folder is missing, empty or closed to us",
        fix="check the reference and its permissions",
    )  # fmt: skip


def _read_model(text: str, store: Store) -> Catalog:
    names = store.list_files()
    if not names:
        raise _nothing(text)
    if "config.json" not in names and "adapter_config.json" in names:
        raise SourceError.of(
            "wrong-kind", "this is an adapter, and a model is expected here", where=text,
            fix="list it under adapters:, or write base+adapter",
        )  # fmt: skip
    found = checkpoint.read_checkpoint(store)
    tensors = {name: _stored(held.file, held.entry) for name, held in found.tensors.items()}
    seen = read_quantization(found, tensors, store)
    companions = checkpoint.companion_files(found.files)
    code = _code_files(store, found.files, found.config)
    read = (*found.weights.files, *companions, *code, "config.json")
    return Catalog(
        reference=text, kind="model", store=store, pins={name: store.stat(name).pin for name in read},
        sizes={name: store.stat(name).size for name in (*companions, *code)},
        tensors=seen.tensors, config=found.config, companions=companions, code=code, shards=found.weights.files,
        licence=_licence(store, found.files), parts=seen.parts, quantization=seen.quantization,
        problems=tuple(
            replace(problem, where=problem.where or text)
            for problem in (*seen.problems, *_missing_layers(found.config, seen.tensors))
        ),
    )  # fmt: skip


_STACK: Final = re.compile(
    r"(?:model\.|transformer\.|gpt_neox\.|(?:model\.)?language_model\.(?:model\.)?)?(?:layers|h)\.(\d+)\."
)
"""The main stack of a decoder; others (encoders, shared layers, experts) have counts of their own."""


def _missing_layers(config: Mapping[str, Any], tensors: Iterable[str]) -> list[Problem]:
    """A config that says more layers than the files hold: loaders fill the rest with random numbers."""
    text = config.get("text_config")
    said = next(
        (place[key] for place in (config, text if isinstance(text, Mapping) else {})
         for key in ("num_hidden_layers", "n_layer") if isinstance(place.get(key), int)), None,
    )  # fmt: skip
    held = {int(found.group(1)) for name in tensors if (found := _STACK.match(name))}
    if said is None or not held or max(held) + 1 >= said:
        return []
    return [
        Problem(
            "missing-layers", f"config.json says {said} layers, and the files hold {max(held) + 1}", "",
            "a loader would make up the others at random", "fetch the checkpoint again, or mend its config.json",
        )
    ]  # fmt: skip


BARE: Final = ".safetensors"


def is_bare(reference: Reference) -> bool:
    """Whether a reference names a .safetensors file rather than a folder."""
    return (reference.subfolder or reference.root).endswith(BARE) and not (
        reference.kind == "local" and os.path.isdir(reference.root)
    )


def _read_tensors(reference: Reference) -> Catalog:
    """One bare .safetensors file: named itself, or the only one in a folder, whose config.json then goes along."""
    if not is_bare(reference):
        return _only_tensors(_open(reference))
    path = reference.subfolder or reference.root
    folder, _, name = path.rpartition("/")
    place = replace(reference, subfolder=folder) if reference.subfolder else replace(reference, root=folder or "/")
    return _tensors_in(_open(place), name, ())


def _only_tensors(store: Store) -> Catalog:
    names = store.list_files()
    found = [name for name in names if name.endswith(BARE) and "/" not in name]
    if len(found) != 1:
        raise SourceError.of(
            "no-weights", f"there are {len(found) or 'no'} .safetensors files in {store.uri}, and one is merged",
            where=store.uri, why=", ".join(found[:5]) or "kind: tensors reads bare .safetensors files",
            fix="name the file itself",
        )  # fmt: skip
    return _tensors_in(store, found[0], tuple(name for name in (checkpoint.CONFIG,) if name in names))


def _tensors_in(store: Store, name: str, companions: tuple[str, ...]) -> Catalog:
    stat = store.stat(name)
    entries = safetensors.read_header(store, name).tensors
    return Catalog(
        reference=f"{store.uri}/{name}", kind="tensors", store=store,
        pins={name: stat.pin, **{n: store.stat(n).pin for n in companions}},
        sizes={n: store.stat(n).size for n in companions},
        tensors={entry.spec.name: _stored(name, entry) for entry in entries}, config={}, companions=companions,
        shards=(name,),
    )  # fmt: skip


def _stored(file: str, entry: safetensors.TensorEntry | torch_bin.BinEntry) -> StoredTensor:
    if isinstance(entry, safetensors.TensorEntry) or entry.strides == _row_major(entry.spec.shape):
        return StoredTensor(entry.spec, file, entry.start)
    return StoredTensor(entry.spec, file, entry.start, "strided", entry.strides)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _code_files(store: Store, names: tuple[str, ...], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Python files that auto_map names, and what they import from beside them."""
    wanted = list(checkpoint.auto_map_files(config))
    for other in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if other in names:
            wanted += checkpoint.auto_map_files(checkpoint.read_json(store, other))
    found: dict[str, None] = {}
    while wanted:
        name = wanted.pop()
        if name in found or name not in names:
            continue
        found[name] = None
        source = read_whole(store, name, limit=16 << 20).decode("utf-8", "replace")
        wanted += checkpoint.relative_imports(source)
    return tuple(sorted(found))


def _licence(store: Store, names: tuple[str, ...]) -> str:
    if "README.md" not in names or store.stat("README.md").size > _CARD_BYTES:
        return ""
    card = read_whole(store, "README.md", limit=_CARD_BYTES).decode("utf-8", "replace")
    head = card.split("\n---", 1)[0] if card.startswith("---") else ""
    found = _LICENCE.search(head)
    return found.group(1).strip("\"'") if found else ""


_QUANTISED_NAME: Final = re.compile(r"4-?bit|qlora|\bnf4\b|bnb", re.IGNORECASE)
_QUANTISED_CARD: Final = re.compile(r"qlora|load_in_4bit[`'\"]?\s*[:=]\s*true|\bnf4\b", re.IGNORECASE)


def _trained_over(store: Store, names: tuple[str, ...], config: Mapping[str, Any]) -> str:
    """What an adapter's base or card says of a quantised base; its config has no word for it."""
    base = str(config.get("base_model_name_or_path") or "")
    if _QUANTISED_NAME.search(base.rpartition("/")[2]):
        return f"its base is called {base}"
    if "README.md" in names and store.stat("README.md").size <= _CARD_BYTES:
        found = _QUANTISED_CARD.search(read_whole(store, "README.md", limit=_CARD_BYTES).decode("utf-8", "replace"))
        if found is not None:
            return f"its README says {found.group(0)!r}"
    return ""


def _read_adapter(text: str, store: Store) -> Catalog:
    names = store.list_files()
    if not names:
        raise _nothing(text)
    if "adapter_config.json" not in names and "config.json" in names:
        raise SourceError.of(
            "wrong-kind", "this is a model, and an adapter is expected here", where=text, fix="list it under models:"
        )
    bare = _bare_adapter_in(names)
    if bare is not None:
        return _read_bare_adapter(store, bare)
    files = peft.find_adapter(store)
    config = peft.read_adapter_config(store)
    weights = files.weights
    entries: tuple[safetensors.TensorEntry | torch_bin.BinEntry, ...]
    if files.kind == "safetensors":
        entries = safetensors.read_header(store, weights).tensors
    else:
        entries = torch_bin.read_bin(store, weights)
    tensors = {entry.spec.name: _stored(weights, entry) for entry in entries}
    found = read_adapter(config, {entry.spec.name: entry.spec for entry in entries}, text)
    companions = tuple(name for name in names if name in TOKENIZER_FILES) if _names_tokens(found.modules) else ()
    return Catalog(
        reference=text, kind="adapter", store=store,
        pins={name: store.stat(name).pin for name in (weights, files.config, *companions)},
        sizes={name: store.stat(name).size for name in companions}, companions=companions,
        tensors=tensors, config=config, modules=found.modules, licence=_licence(store, names),
        problems=tuple(found.problems), trained_over=_trained_over(store, names, config),
    )  # fmt: skip


def _bare_adapter_in(names: tuple[str, ...]) -> str | None:
    """The LoRA file of a folder without any adapter_config.json, or None."""
    if any(name.endswith(peft.ADAPTER_CONFIG) for name in names):
        return None
    found = [name for name in names if name.endswith(BARE) and "/" not in name]
    if bare_lora.WEIGHTS in found:
        return bare_lora.WEIGHTS
    return found[0] if len(found) == 1 and not found[0].startswith("adapter_model.") else None


def _is_bare_adapter(store: Store, name: str) -> bool:
    header = safetensors.read_header(store, name)
    return bare_lora.parse_keys(entry.spec.name for entry in header.tensors) is not None


def _read_bare_adapter(store: Store, name: str) -> Catalog:
    """A LoRA file that stands by itself. The values of its alphas are read, too: they are part of what it means."""
    text = f"{store.uri}/{name}"
    header = safetensors.read_header(store, name)
    specs = {entry.spec.name: entry.spec for entry in header.tensors}
    keys = bare_lora.parse_keys(specs)
    if keys is None:
        raise SourceError.of(
            "unknown-spelling", "this file is no LoRA that can be read by itself", where=text,
            why=f"its tensors are called {', '.join(sorted(specs)[:2]) or 'nothing'}; names of kohya's scripts "
            "(lora_unet_…), of diffusers (unet.…lora_A) or diffusion_model.… are known",
            fix="for an adapter of PEFT name its folder, with adapter_config.json; list models under models:",
        )  # fmt: skip
    pin = store.stat(name).pin
    alphas, wrong = _alphas(store, name, pin, [e for e in header.tensors if e.spec.name.endswith(".alpha")], text)
    found = read_bare(keys, specs, alphas, header.metadata, text)
    ranks = [module.rank for module in found.modules.values()]
    return Catalog(
        reference=text, kind="adapter", store=store, pins={name: pin},
        tensors={entry.spec.name: _stored(name, entry) for entry in header.tensors},
        config={"peft_type": "LORA", "r": max(ranks, default=0)}, modules=found.modules,
        licence=_licence(store, store.list_files()), spelling=keys.spelling, problems=(*wrong, *found.problems),
    )  # fmt: skip


def _alphas(
    store: Store, name: str, pin: str, entries: list[safetensors.TensorEntry], text: str
) -> tuple[dict[str, float], list[Problem]]:
    """The values of scalar tensors."""
    import numpy as np

    problems = []
    values: dict[str, float] = {}
    buffers = {entry.spec.name: bytearray(entry.stop - entry.start) for entry in entries if entry.spec.numel == 1}
    reads = [RangeRead(e.start, memoryview(buffers[e.spec.name])) for e in entries if e.spec.name in buffers]
    if reads:
        store.read_into(name, reads, pin=pin)
    codes = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
    for entry in entries:
        key, code = entry.spec.name, entry.spec.dtype.code
        values[key] = float("nan")
        if key in buffers and code == "BF16":
            values[key] = float((np.frombuffer(buffers[key], "<u2").astype(np.uint32) << 16).view(np.float32)[0])
        elif key in buffers and code in codes:
            values[key] = float(np.frombuffer(buffers[key], codes[code])[0])
        if not np.isfinite(values[key]):
            shown = f"{values[key]}" if key in buffers and code in (*codes, "BF16") else f"{code} {entry.spec.shape}"
            problems.append(
                Problem("bad-alpha", f"{key} is {shown}, not one finite number", text,
                        "the scaling of its module follows from it", "the file is damaged: fetch it again")
            )  # fmt: skip
    return values, problems


def _names_tokens(modules: Mapping[str, AdapterModule]) -> bool:
    """Whether an adapter changes embeddings or a head, whose rows a tokenizer of its own may name."""
    return any(is_token_name(change.target) for module in modules.values() for change in module.changes)


def kind_of(reference: Reference) -> Literal["adapter", "model", "tensors"]:
    """What lies at a reference, from its file names. Raises SourceError(code `no-such-source`)."""
    if is_bare(reference):
        folder, file = split_file(reference)
        return "adapter" if _is_bare_adapter(_open(folder), file) else "tensors"
    store = _open(reference)
    names = store.list_files()
    if not names:
        raise _nothing(str(reference))
    model = "config.json" in names or any(n.startswith(("model.safetensors", "pytorch_model")) for n in names)
    if not model and "adapter_config.json" not in names and any(n.endswith(BARE) and "/" not in n for n in names):
        bare = _bare_adapter_in(names)
        if bare is not None and _is_bare_adapter(store, bare):
            return "adapter"
        return "adapter" if any(n.startswith("adapter_model.") for n in names) else "tensors"
    return "model" if model else "adapter"


def kind_named(source: str) -> Literal["adapter", "model", "tensors"]:
    """What a text of a command stands for; `base+adapter` is a model. Raises SourceError, ManifestError."""
    named = parse_model_reference(source)
    return "model" if named.adapters else kind_of(named.model)


def inspect_source(source: str) -> Catalog:
    """The catalog of a reference, whichever kind it is. Raises SourceError."""
    reference = parse_reference(source)
    return read_catalog(reference, kind_of(reference))


def describe(catalog: Catalog) -> dict[str, Any]:
    """What `raymerge inspect` says."""
    specs = [t.spec for t in catalog.tensors.values()]
    stored_bytes = sum(_bytes_on_disk(t) for t in catalog.tensors.values())
    dtypes: dict[str, int] = {}
    for spec in specs:
        dtypes[spec.dtype.code] = dtypes.get(spec.dtype.code, 0) + 1
    document: dict[str, Any] = {
        "reference": catalog.reference, "kind": catalog.kind, "licence": catalog.licence, "tensors": len(specs),
        "parameters": sum(s.numel for s in specs), "bytes": stored_bytes,
        "size": format_size(stored_bytes), "dtypes": dict(sorted(dtypes.items())),
        "problems": [p.as_json() for p in catalog.problems],
    }  # fmt: skip
    if catalog.kind == "tensors":
        document |= {"file": catalog.shards[0]}
    elif catalog.kind == "adapter":
        ranks: dict[str, int] = {}
        scalings: dict[str, int] = {}
        kinds: dict[str, int] = {}
        for module in catalog.modules.values():
            kinds[module.tuner] = kinds.get(module.tuner, 0) + 1
            if not module.rank:
                continue
            ranks[str(module.rank)] = ranks.get(str(module.rank), 0) + 1
            scalings[f"{module.scaling:g}"] = scalings.get(f"{module.scaling:g}", 0) + 1
        document |= {
            "type": catalog.config.get("peft_type"), "spelling": catalog.spelling, "base": catalog.base_name,
            "modules": len(catalog.modules),
            "kinds": dict(sorted(kinds.items())), "ranks": ranks, "scalings": scalings,
        }  # fmt: skip
    else:
        document |= {
            "architectures": catalog.config.get("architectures"), "tied": catalog.tied, "shards": list(catalog.shards),
            "companions": list(catalog.companions), "code": list(catalog.code),
            "quantization": None if catalog.quantization is None else catalog.quantization.as_json(catalog.tensors),
        }  # fmt: skip
    return document


def _bytes_on_disk(tensor: StoredTensor) -> int:
    """With every part, read or not."""
    if tensor.coded is None:
        return tensor.spec.nbytes
    return sum(part.stored.spec.nbytes for part in tensor.coded.parts)
