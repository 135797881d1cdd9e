"""A PEFT adapter on disk: its folder, `adapter_config.json` and the names of its tensors. What they mean is elsewhere.

    adapter_config.json              rank, alpha, targets …
    adapter_model.safetensors        (or adapter_model.bin)
        base_model.model.<module>.lora_A.weight          (rank, in)
        base_model.model.<module>.lora_B.weight          (out, rank)
        base_model.model.<module>.lora_embedding_A       (rank, vocabulary)
        base_model.model.<whole saved module>.weight

An adapter not named `default` lies in a subfolder of its name. Files saved from a raw state dict carry the adapter's
name as an infix (`lora_A.default.weight`); it is stripped here. Which modules an adapter touches is read from the
tensor names, never from `target_modules`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from merger.errors import SourceError
from merger.formats.strict_json import parse_json_object
from merger.storage.base import Store, read_whole
from merger.tensors import TensorSpec

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_SAFETENSORS: Final = "adapter_model.safetensors"
ADAPTER_BIN: Final = "adapter_model.bin"
MAX_CONFIG_BYTES: Final = 64 * 2**20
DEFAULT_RANK: Final = 8
DEFAULT_ALPHA: Final = 8
"""What PEFT's LoraConfig takes where a config says nothing."""

OtherKind = Literal["saved_module", "bias", "trainable_tokens", "shared", "repeated", "unknown"]

PREFIX: Final = "base_model.model."
_SHARED_PREFIX: Final = "base_model."
_ROLE: Final = re.compile(
    r"(?:lora|ia3|hada|lokr|oft|boft|vera|pvera|vblora|fourierft|hra|hira|poly|shira|c3a|miss|bone|randlora|road|delora"
    r"|waveft|gralora|ln_tuning|osf|adamss|beft|deft|frod|glora|lily|peanut|psoft|shadow|supertuning|tinylora|unilora"
    r")_\w+"
)
"""Parameter names of PEFT 0.21's tuners, by their first word."""
_TRAINABLE_TOKENS: Final = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
_SAVED_WRAPPER: Final = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_BESIDE_SAVED: Final = re.compile(r"(.+)\.(?:modules_to_save|original_module)\.(weight|bias)")
"""What PEFT 0.21 saves a second time, and as it was before training, of a saved module whose vocabulary was resized."""


# -------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """Where an adapter lies in its store."""

    folder: str
    """`` for the root, else a subfolder without a trailing slash."""
    config: str
    """Name of adapter_config.json from the store's root."""
    weights: str
    """Name of the weights file from the store's root."""
    kind: Literal["safetensors", "bin"]


def _find_folder(store: Store, names: Sequence[str]) -> str:
    if ADAPTER_CONFIG in names:
        return ""
    folders = sorted(name.removesuffix(f"/{ADAPTER_CONFIG}") for name in names if name.endswith(f"/{ADAPTER_CONFIG}"))
    if len(folders) == 1:
        return folders[0]
    if folders:
        raise SourceError.of(
            "several-adapters",
            f"there are {len(folders)} adapters here: {', '.join(folders)}",
            where=store.uri,
            why=f"the folder itself has no {ADAPTER_CONFIG}, so none of them comes first",
            fix=f"name one of them, for example {store.uri}/{folders[0]}",
        )
    raise SourceError.of(
        "no-adapter",
        f"there is no {ADAPTER_CONFIG}",
        where=store.uri,
        why="a PEFT adapter has one; a whole model has config.json instead",
        fix="check the reference; a whole model belongs under `models:`",
    )


def find_adapter(store: Store) -> AdapterFiles:
    """Locate the one adapter of a store: at its root, else in its only subfolder that has an adapter_config.json.

    Raises SourceError: `no-adapter`, `several-adapters`, `no-adapter-weights`.
    """
    names = store.list_files()
    folder = _find_folder(store, names)
    prefix = f"{folder}/" if folder else ""
    if prefix + ADAPTER_SAFETENSORS in names:
        return AdapterFiles(folder, prefix + ADAPTER_CONFIG, prefix + ADAPTER_SAFETENSORS, "safetensors")
    if prefix + ADAPTER_BIN in names:
        return AdapterFiles(folder, prefix + ADAPTER_CONFIG, prefix + ADAPTER_BIN, "bin")
    raise SourceError.of(
        "no-adapter-weights",
        f"beside {prefix}{ADAPTER_CONFIG} there is neither {ADAPTER_SAFETENSORS} nor {ADAPTER_BIN}",
        where=store.uri,
        fix="fetch the adapter again, with its weights",
    )


def read_adapter_config(store: Store) -> dict[str, Any]:
    """The adapter's adapter_config.json, read strictly, from the root or the only subfolder that has one."""
    folder = _find_folder(store, store.list_files())
    name = f"{folder}/{ADAPTER_CONFIG}" if folder else ADAPTER_CONFIG
    return parse_json_object(read_whole(store, name, limit=MAX_CONFIG_BYTES), f"{store.uri}/{name}")


# --------------------------------------------------------------------------------------------------------------- keys


@dataclass(frozen=True, slots=True)
class OtherKey:
    """An adapter tensor that is no tuner parameter of a module."""

    name: str
    """As on disk."""
    path: str
    """What of the base it stands for: a parameter's path, or for trainable tokens the module's."""
    kind: OtherKind


@dataclass(frozen=True, slots=True)
class ParsedKeys:
    """An adapter's tensor names, by module."""

    modules: dict[str, dict[str, str]]
    """Module path → role (`lora_A`, `lora_B`, `lora_bias`, `lora_embedding_A`, `ia3_l`, …) → name on disk."""
    other: tuple[OtherKey, ...]
    """Every other tensor."""


def parse_adapter_keys(specs: Iterable[TensorSpec]) -> ParsedKeys:
    """Group an adapter's tensors by the module they belong to. Nothing is dropped: what fits nowhere is `unknown`.

    Raises SourceError `duplicate-role` when two tensors are the same part of the same module.
    """
    modules: dict[str, dict[str, str]] = {}
    other: list[OtherKey] = []
    for spec in specs:
        found = _parse_tuner_key(spec.name)
        if found is None:
            other.append(OtherKey(spec.name, _base_path(spec.name), _kind(spec.name)))
            continue
        module, role = found
        taken = modules.setdefault(module, {}).setdefault(role, spec.name)
        if taken != spec.name:
            raise SourceError.of(
                "duplicate-role",
                f"the tensors {taken} and {spec.name} are both the {role} of {module}",
                why="the file holds more than one adapter",
                fix="save each adapter by itself, with save_pretrained(selected_adapters=[…])",
            )
    saved = {key.path for key in other if key.kind == "saved_module"}
    return ParsedKeys(modules, tuple(_repeated(_with_whole_module(key, saved), saved) for key in other))


def _repeated(key: OtherKey, saved: set[str]) -> OtherKey:
    """A tensor of a saved module that PEFT does not load, since the module itself is there under its own name."""
    beside = _BESIDE_SAVED.fullmatch(key.path)
    if beside is not None and f"{beside[1]}.{beside[2]}" in saved:
        return OtherKey(key.name, f"{beside[1]}.{beside[2]}", "repeated")
    return key


def _with_whole_module(key: OtherKey, saved: set[str]) -> OtherKey:
    """A bias beside a saved weight is part of that saved module."""
    if key.kind == "bias" and key.path.removesuffix("bias") + "weight" in saved:
        return OtherKey(key.name, key.path, "saved_module")
    return key


def _parse_tuner_key(name: str) -> tuple[str, str] | None:
    """(module, role), or None."""
    if not name.startswith(PREFIX):
        return None
    parts = name.removeprefix(PREFIX).split(".")
    at = max((i for i, part in enumerate(parts) if _ROLE.fullmatch(part)), default=0)
    leaf, tail = parts[at], parts[at + 1 :]
    if at == 0 or len(tail) > 2 or (len(tail) == 2 and tail[1] not in ("weight", "bias")):
        return None
    role = leaf
    if tail and tail[-1] == "bias":
        role = "lora_bias" if leaf == "lora_B" else f"{leaf}_bias"
    return ".".join(parts[:at]), role


def _base_path(name: str) -> str:
    """Takes off PEFT's prefix, the adapter's name and the wrappers `modules_to_save`, `base_layer`, `token_adapter`."""
    path = name.removeprefix(PREFIX)
    if match := _TRAINABLE_TOKENS.fullmatch(path):
        return match[1]
    return _SAVED_WRAPPER.sub("", path, count=1).replace(".base_layer.", ".").replace(".token_adapter.", ".")


def _kind(name: str) -> OtherKind:
    path = name.removeprefix(PREFIX)
    if path == name:
        shared = name.removeprefix(_SHARED_PREFIX)
        return "shared" if shared != name and _ROLE.fullmatch(shared.split(".")[0]) else "unknown"
    if _TRAINABLE_TOKENS.fullmatch(path):
        return "trainable_tokens"
    if path.endswith(".weight") or _SAVED_WRAPPER.search(path):
        return "saved_module"
    return "bias" if path.endswith(".bias") else "unknown"


def output_key(module: str, role: str) -> str:
    """The name PEFT reads a tensor from: `base_model.model.<module>.lora_A.weight`."""
    leaf = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"}.get(role, role)
    return f"{PREFIX}{module}.{leaf}"


# ------------------------------------------------------------------------------------------------------------- config


class LoraScale(NamedTuple):
    """What a config says of one module."""

    rank: int
    """The config's `r`, which scaling is reckoned with; the tensors' own rank may differ."""
    alpha: float
    scaling: float
    """Factor of B·A: alpha / rank, or alpha / √rank with rsLoRA."""


def _pattern_value(config: Mapping[str, Any], patterns: str, plain: str, default: int, module: str) -> object:
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise _bad_config(f"{patterns} is no map")
    for key, value in table.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise _bad_config(f"the key {key!r} of {patterns} is no regular expression: {error}") from None
    return config.get(plain, default)


def _bad_config(what: str) -> SourceError:
    return SourceError.of("bad-adapter-config", what, where=ADAPTER_CONFIG, fix="mend the adapter at its source")


def lora_scaling(config: Mapping[str, Any], module: str, alpha_key: str = "lora_alpha") -> LoraScale:
    """Rank, alpha and scaling of one module, by PEFT's rules: of rank_pattern and alpha_pattern the first key that
    matches a whole dotted suffix of the module's path counts. Other tuners call their alpha by another key. Raises
    SourceError `bad-adapter-config`."""
    rank = _pattern_value(config, "rank_pattern", "r", DEFAULT_RANK, module)
    alpha = _pattern_value(config, "alpha_pattern", alpha_key, DEFAULT_ALPHA, module)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise _bad_config(f"the rank of {module} is {rank!r}, not a positive whole number")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise _bad_config(f"the alpha of {module} is {alpha!r}, not a number")
    is_rslora = config.get("use_rslora") or False
    if not isinstance(is_rslora, bool):
        raise _bad_config(f"use_rslora is {is_rslora!r}, not true or false")
    return LoraScale(rank, float(alpha), alpha / math.sqrt(rank) if is_rslora else alpha / rank)


def _commonest(values: Iterable[float]) -> float:
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _targets(modules: Sequence[str], base_modules: Iterable[str]) -> list[str] | str:
    """What PEFT is to adapt: full paths, or where another module of the base ends in one of them, a regex of them."""
    wanted, endings = set(modules), tuple(f".{module}" for module in modules)
    if any(name.endswith(endings) for name in base_modules if name not in wanted):
        return "|".join(map(re.escape, modules))
    return list(modules)


def build_adapter_config(
    ranks: Mapping[str, int],
    *,
    alphas: Mapping[str, float] | None = None,
    base_model_name_or_path: str | None,
    revision: str | None = None,
    task_type: str | None = None,
    modules_to_save: Sequence[str] = (),
    base_modules: Iterable[str] = (),
    fan_in_fan_out: bool = False,
    parameters: Sequence[str] = (),
) -> bytes:
    """The adapter_config.json of a plain LoRA with the modules of `ranks` (module path → rank) and no others. Those of
    `parameters` are no modules but packed parameters (target_parameters).

    Without `alphas` every alpha is its module's rank, so that ΔW = B·A. Modules whose rank or alpha is not the
    commonest get a pattern, anchored so that it matches them alone. With `base_modules`, the base's module paths,
    `target_modules` matches no other of them either. Raises ValueError when there are no modules, or a rank is below 1.
    """
    if not ranks:
        raise ValueError("an adapter has at least one module")
    if min(ranks.values()) < 1:
        raise ValueError("a rank is at least 1")
    alphas = {module: ranks[module] if alphas is None else alphas[module] for module in ranks}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    document: dict[str, object] = {
        "alpha_pattern": _patterns(alphas, alpha),
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "modules_to_save": sorted(modules_to_save) or None,
        "peft_type": "LORA",
        "r": _number(rank),
        "rank_pattern": _patterns(ranks, rank),
        "revision": revision,
        "target_modules": _targets(sorted(set(ranks) - set(parameters)), base_modules),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode("utf-8")


def with_ranks(config: bytes, ranks: Mapping[str, int]) -> bytes:
    """The same adapter_config.json, of `build_adapter_config`, with other ranks of its modules, and alphas to match."""
    document = json.loads(config)
    rank = _commonest(ranks.values())
    document |= {
        "r": _number(rank), "lora_alpha": _number(rank),
        "rank_pattern": _patterns(ranks, rank), "alpha_pattern": _patterns(ranks, rank),
    }  # fmt: skip
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode("utf-8")


def with_settings(config: bytes, settings: Mapping[str, object]) -> bytes:
    """The same adapter_config.json with some of PEFT's settings otherwise."""
    document = json.loads(config) | dict(settings)
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode("utf-8")


def build_ia3_config(
    inputs: Mapping[str, bool],
    *,
    base_model_name_or_path: str | None,
    task_type: str | None = None,
    modules_to_save: Sequence[str] = (),
    fan_in_fan_out: bool = False,
) -> bytes:
    """The adapter_config.json of an IA3 with these modules: module path → whether its inputs are scaled."""
    document: dict[str, object] = {
        "base_model_name_or_path": base_model_name_or_path,
        "fan_in_fan_out": fan_in_fan_out,
        "feedforward_modules": sorted(module for module, scales_inputs in inputs.items() if scales_inputs),
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": sorted(modules_to_save) or None,
        "peft_type": "IA3",
        "revision": None,
        "target_modules": sorted(inputs),
        "task_type": task_type,
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _patterns(values: Mapping[str, float], common: float) -> dict[str, int | float]:
    """PEFT's pattern table: what is not `common`, under a regex that matches that one module."""
    return {f"^{re.escape(module)}": _number(value) for module, value in values.items() if value != common}
