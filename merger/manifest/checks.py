"""What a manifest must satisfy beyond its shape: key names, parameters against the method, keys against each other.

The checks read plain data and tolerate any shape in it (shapes are grammar.py's business), so that a file with a wrong
type in one place and a wrong bound in another is reported whole. They edit the data they are given: parameter values
become ParameterValue, and keys that mergekit ignores are taken out once a warning names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel

from merger.errors import ManifestError, Problem, nearest
from merger.manifest.blocks import check_space, has_blocks, read_blocks
from merger.manifest.documents import join_path
from merger.manifest.experts import EXPERT_KEYS, check_experts, has_experts
from merger.manifest.grammar import (
    PEFT_KEYS,
    RAYMERGE_KEYS,
    AdapterEntry,
    BulkManifest,
    Expert,
    Manifest,
    ModelEntry,
    Output,
    S3Output,
    Slice,
    SliceSource,
    Tokenizer,
)
from merger.manifest.parameters import ParameterValueError, parameter_specs, parse_parameter_value
from merger.manifest.references import parse_model_reference
from merger.methods import COMBINATION_TYPES, METHODS, REQUIRED, MethodSpec, ParameterSpec
from merger.methods.wrappers import wrappers_for

_SOURCES: Final = ("adapters", "models", "slices", "modules", "experts")
_ALL_PARAMETERS: Final = frozenset(p.name for m in METHODS.values() for p in m.parameters)
_CODE_KEYS: Final = frozenset({"plugin", "plugins", "method_file", "methods_file"})
"""Keys by which a manifest might try to name a plugin."""
_TRANSPLANT_KEYS: Final = frozenset({
    "tokensurgeon", "tokenizer_transplant", "transplant", "transplant_tokenizer", "donor_tokenizer", "donor",
    "approximation_method",
})  # fmt: skip
"""Keys by which a manifest might ask for another model's tokenizer with rows that are made up."""
_NO_NUMBER: Final = frozenset({"int8_mask"})
"""Parameters that change no number, so that ignoring one is harmless."""

_HOMES: Final = (
    ("the manifest", Manifest),
    ("adapters[]", AdapterEntry),
    ("models[]", ModelEntry),
    ("slices[]", Slice),
    ("slices[].sources[]", SliceSource),
    ("experts[]", Expert),
    ("tokenizer", Tokenizer),
    ("output", Output),
    ("output.s3", S3Output),
)


def check_manifest(data: dict[str, Any], *, where: Callable[[str], str], strict: bool) -> Findings:
    """Every problem and warning; `data` is normalised in place."""
    findings = Findings(where, strict, pure=is_pure_mergekit(data))
    composed = None
    if has_experts(data):
        _check_keys(findings, Manifest, data, "")
        _check_sources(findings, data)
        check_experts(findings, data)
        return findings
    for key in EXPERT_KEYS:
        if data.get(key) is not None:
            findings.refuse("missing-key", f"{key} stands without experts", key, "", "add experts: [{source_model: …}]")
    if has_blocks(data):
        composed = read_blocks(data, findings.refuse)
    else:
        if data.get("merge_method") is None and data.get("combination_type") is None:
            data["merge_method"] = "task_arithmetic"
        _check_method(findings, data)
        check_space(data, findings.refuse)
    _check_keys(findings, Manifest, data, "")
    findings.method = composed or METHODS.get(str(data.get("merge_method")))
    _check_top(findings, data)
    if composed is not None:
        _check_parameters(findings, data, (*composed.parameters, *wrappers_for(composed)))
    elif findings.method_known:
        specs = parameter_specs(merge_method=data.get("merge_method"), combination_type=data.get("combination_type"))
        if specs is not None:
            _check_parameters(findings, data, specs)
    return findings


def check_bulk(data: dict[str, Any], *, where: Callable[[str], str]) -> Findings:
    """Key names of a bulk manifest; its merges are checked when it is expanded."""
    findings = Findings(where, strict=True, pure=False)
    _check_keys(findings, BulkManifest, data, "")
    return findings


def is_pure_mergekit(data: Mapping[str, Any]) -> bool:
    """True for a file that mergekit itself would read: a merge_method, and no key that only raymerge has."""
    named = data.get("merge_method") is not None or has_experts(data)
    return named and not any(key in RAYMERGE_KEYS for key in data)


@dataclass(slots=True)
class Findings:
    """What the checks found."""

    where: Callable[[str], str]
    strict: bool
    pure: bool
    method_known: bool = False
    method: MethodSpec | None = None
    """The named method, or the one that the manifest's blocks make."""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def refuse(self, code: str, what: str, path: str, why: str = "", fix: str = "") -> None:
        self.problems.append(Problem(code, what, self.where(path), why, fix))

    def warn(self, what: str, path: str, why: str, fix: str = "remove it", code: str = "unknown-key") -> None:
        """A key without effect: a warning, and under --strict an error."""
        found = Problem(code, what, self.where(path), why, fix)
        (self.problems if self.strict else self.warnings).append(found)


# ---- names of methods and of keys ----------------------------------------------------------------------------------


def _check_method(findings: Findings, data: Mapping[str, Any]) -> None:
    method, combination = data.get("merge_method"), data.get("combination_type")
    if method is not None and combination is not None:
        findings.refuse(
            "conflict",
            "merge_method and combination_type are both given",
            "combination_type",
            "merge_method is mergekit's meaning of a name, combination_type PEFT's; they give other numbers",
            "keep one of them",
        )
        return
    path, name = ("merge_method", method) if combination is None else ("combination_type", combination)
    known: Iterable[str] = METHODS if combination is None else COMBINATION_TYPES
    if not isinstance(name, str):
        return
    findings.method_known = name in known
    if findings.method_known:
        return
    near = nearest(name, known)
    why = ""
    if combination is None and name in COMBINATION_TYPES:
        near, why = f"combination_type: {name}", "it is one of PEFT's names"
    elif combination is not None and name in METHODS:
        near, why = f"merge_method: {name}", "PEFT has no such combination"
    elif name.endswith(".py"):
        findings.refuse(
            "bad-value", f"{path} is a name, and {name!r} is a file", path,
            "reading a manifest must never run a file that it names",
            "give --plugin FILE.py on the command line, and here the name that it gives its method",
        )  # fmt: skip
        return
    findings.refuse(
        "bad-value",
        f"{name!r} is no {path}",
        path,
        why,
        f"did you mean {near}?" if near else f"write one of {', '.join(sorted(known))}",
    )


def _check_keys(findings: Findings, model: type[BaseModel], data: Any, path: str) -> None:
    """Compare every key below `data` with the grammar; take out those that are let pass with a warning."""
    if not isinstance(data, dict):
        return
    fields = {(info.alias or name): info.annotation for name, info in model.model_fields.items() if name != "warnings"}
    for key in list(data):
        at = join_path(path, key)
        if key in fields:
            for child_path, child, child_model in _children(fields[key], data[key], at):
                _check_keys(findings, child_model, child, child_path)
        elif _let_pass(findings, model, key, tuple(fields), at):
            del data[key]


def _children(annotation: Any, value: Any, path: str) -> Iterator[tuple[str, Any, type[BaseModel]]]:
    """The grammar nodes in a value of this annotation: under tuples by index, under mappings by key."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation.__name__ != "BulkEntry":
            yield path, value, annotation
    elif get_origin(annotation) is tuple and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _children(get_args(annotation)[0], item, f"{path}[{index}]")
    elif get_origin(annotation) is not None and isinstance(value, dict) and len(get_args(annotation)) == 2:
        inner = get_args(annotation)[1]
        if inner is type(None):
            yield from _children(get_args(annotation)[0], value, path)
        elif get_args(annotation)[0] is str:
            for key, item in value.items():
                yield from _children(inner, item, f"{path}.{key}")
    else:
        for argument in get_args(annotation):
            if argument is not type(None) and get_origin(annotation) is not tuple:
                yield from _children(argument, value, path)


def _let_pass(findings: Findings, model: type[BaseModel], key: str, known: tuple[str, ...], path: str) -> bool:
    """Refuse an unknown key, or warn and say True where mergekit ignores it and nothing suggests that it counts."""
    if key == "residual_weight" and model is Slice:
        findings.warn("residual_weight has no effect", path, "mergekit's grammar has it and never reads it")
        return True
    if key in _CODE_KEYS:
        findings.refuse(
            "unknown-key", f"a manifest names no code, and {key!r} is no key of it", path,
            "a manifest is data, which may come from anywhere: reading one must never run a file that it names",
            "give --plugin FILE.py on the command line",
        )  # fmt: skip
        return False
    if key in _TRANSPLANT_KEYS:
        findings.refuse(
            "not-supported", f"{key!r}: tokenizers are not transplanted (mergekit-tokensurgeon)", path,
            "rows for tokens that a model has never seen are approximations, and nothing here makes up numbers; "
            "tokens that a source has are taken from it by tokenizer_source and tokenizer",
            "run mergekit-tokensurgeon on the model first, and merge what it writes",
        )  # fmt: skip
        return False
    near = nearest(key, known)
    misplaced = key in _ALL_PARAMETERS and "parameters" in known
    harmless = key in _NO_NUMBER or not (near or misplaced)
    if findings.pure and harmless:
        findings.warn(f"the key {key!r} has no effect", path, "mergekit ignores it, and so does raymerge")
        return True
    fix = f"did you mean {near}?" if near else f"the keys here are {', '.join(known)}"
    why = ""
    if misplaced:
        why, fix = "parameters of the method stand under `parameters`", f"write parameters: {{{key}: …}}"
    elif key == "layer_range":
        why, fix = "`models` merges whole models", "write slices: [{sources: [{model, layer_range}]}]"
    elif homes := [home for home, node in _HOMES if key in _key_names(node)]:
        why, fix = f"it is a key of {homes[0]}", "move it there"
    findings.refuse("unknown-key", f"{key!r} is no key of {_node_name(path)}", path, why, fix)
    return False


def _key_names(model: type[BaseModel]) -> set[str]:
    return {info.alias or name for name, info in model.model_fields.items()} - {"warnings"}


def _node_name(path: str) -> str:
    return path.rpartition(".")[0] or "a manifest"


# ---- keys against each other ---------------------------------------------------------------------------------------


def _check_sources(findings: Findings, data: Mapping[str, Any]) -> list[str]:
    """Exactly one of the keys that say what to merge. Returns those that are given."""
    given = [key for key in _SOURCES if data.get(key) is not None]
    if len(given) != 1:
        findings.refuse(
            "conflict" if given else "missing-key",
            f"{' and '.join(given)} are both given" if given else "it says not what to merge",
            given[1] if given else "",
            "a manifest has exactly one of adapters, models, slices, modules and experts",
            "write an adapter beside models as {model: BASE+ADAPTER}"
            if "adapters" in given and "models" in given
            else "keep one of them"
            if given
            else "add adapters: [{adapter: org/name}]",
        )
    return given


def _check_top(findings: Findings, data: Mapping[str, Any]) -> None:
    given = _check_sources(findings, data)
    adapters = data.get("adapters")
    combination = data.get("combination_type")
    for key in PEFT_KEYS:
        if data.get(key) is not None and combination is None:
            fix = (
                "write it under each source's parameters as weight"
                if key == "weights"
                else "write it under parameters"
                if key == "density"
                else "add combination_type, or drop it"
            )
            findings.refuse("conflict", f"{key} belongs to combination_type", key, "it is one of PEFT's keywords", fix)
    if isinstance(combination, str) and combination in COMBINATION_TYPES:
        _check_combination(findings, data, combination, adapters, given)
    if isinstance(adapters, list):
        _check_names(findings, adapters)
    _check_duplicates(findings, data)
    if data.get("tokenizer") is not None and data.get("tokenizer_source") is not None:
        findings.refuse(
            "conflict",
            "tokenizer and tokenizer_source are both given",
            "tokenizer_source",
            "they say the same thing",
            "keep tokenizer",
        )
    method = findings.method
    if (
        method is not None
        and method.base == "required"
        and data.get("base_model") is None
        and given in (["models"], ["slices"])
    ):
        slices = data.get("slices")
        if not (isinstance(slices, list) and all(isinstance(s, dict) and s.get("base_model") for s in slices)):
            findings.refuse(
                "missing-key",
                "there is no base_model",
                "base_model",
                f"{method.name} merges differences from a base",
                "add base_model: org/name",
            )


def _check_combination(
    findings: Findings, data: Mapping[str, Any], combination: str, adapters: Any, given: list[str]
) -> None:
    if given and given != ["adapters"]:
        findings.refuse(
            "conflict",
            "combination_type merges adapters",
            given[0],
            "PEFT combines adapters only",
            "use adapters, or a merge_method",
        )
    weights = data.get("weights")
    if isinstance(weights, list) and isinstance(adapters, list):
        if len(weights) != len(adapters):
            findings.refuse(
                "conflict",
                f"{len(weights)} weights for {len(adapters)} adapters",
                "weights",
                "PEFT drops what is left over in silence",
                "give one weight an adapter",
            )
        for i, adapter in enumerate(adapters):
            parameters = adapter.get("parameters") if isinstance(adapter, dict) else None
            if isinstance(parameters, dict) and parameters.get("weight") is not None:
                findings.refuse(
                    "conflict",
                    "this adapter has a weight twice",
                    f"adapters[{i}].parameters.weight",
                    "`weights` is given too",
                    "keep one of them",
                )
    parameters = data.get("parameters")
    if data.get("density") is not None and isinstance(parameters, dict) and parameters.get("density") is not None:
        findings.refuse(
            "conflict", "the density is given twice", "parameters.density", "`density` is given too", "keep one of them"
        )
    prunes = combination.startswith(("ties", "dare", "magnitude"))
    if prunes and data.get("density") is None and _get(parameters, "density") is None:
        findings.refuse(
            "missing-key",
            "the density is missing",
            "density",
            f"{combination} keeps that share of each tensor, and PEFT has no default for it",
            "add density: 0.2, or another share in (0, 1]",
        )
    unused = {
        "density": not prunes,
        "majority_sign_method": "ties" not in combination,
        "svd_rank": "svd" not in combination,
        "svd_clamp": "svd" not in combination,
    }
    for key, is_unused in unused.items():
        if is_unused and data.get(key) is not None:
            findings.refuse(
                "conflict",
                f"{key} has no effect with combination_type: {combination}",
                key,
                "PEFT ignores it in silence",
                "drop it, or choose the combination that it is for",
            )
    if combination.startswith("dare") and data.get("density") == 0:
        findings.refuse(
            "out-of-bounds",
            "density is 0, outside (0, 1]",
            "density",
            "DARE divides by it; PEFT gives NaN",
            "give a share above 0",
        )


def _check_names(findings: Findings, adapters: list[Any]) -> None:
    names: dict[str, int] = {}
    for i, adapter in enumerate(adapters):
        name = adapter.get("name") if isinstance(adapter, dict) else None
        if isinstance(name, str) and names.setdefault(name, i) != i:
            findings.refuse(
                "conflict",
                f"two adapters are named {name!r}",
                f"adapters[{i}].name",
                f"adapters[{names[name]}] has that name",
                "give each its own",
            )


def _check_duplicates(findings: Findings, data: Mapping[str, Any]) -> None:
    for prefix, container in _containers(data):
        seen: dict[str, int] = {}
        for i, entry in enumerate(_list(container.get("models"))):
            model = entry.get("model") if isinstance(entry, dict) else None
            key = _same_model(model)
            if key and seen.setdefault(key, i) != i:
                findings.refuse(
                    "conflict",
                    "the same model is listed twice",
                    f"{prefix}models[{i}].model",
                    f"models[{seen[key]}] is that model",
                    "list it once, with the sum of the weights",
                )


def _same_model(model: object) -> str:
    if model is None:
        return ""
    try:
        return str(parse_model_reference(model))
    except ManifestError:
        return ""


# ---- parameters ----------------------------------------------------------------------------------------------------


def _check_parameters(findings: Findings, data: dict[str, Any], specs: tuple[ParameterSpec, ...]) -> None:
    top = data.get("parameters")
    _check_block(findings, data, "", specs, "shared")
    adapters = _list(data.get("adapters"))
    for i, adapter in enumerate(adapters):
        _check_block(findings, adapter, f"adapters[{i}]", specs, "source")
    outer = [top]
    if adapters and data.get("combination_type") is None:
        _require(findings, specs, "global", outer, "")
    for prefix, container in _containers(data):
        scopes = outer
        if prefix:
            _check_block(findings, container, prefix.removesuffix("."), specs, "shared")
            scopes = [container.get("parameters"), *outer]
        models, slices = _list(container.get("models")), _list(container.get("slices"))
        base = data.get("base_model")
        for i, entry in enumerate(models):
            path = f"{prefix}models[{i}]"
            _check_block(findings, entry, path, specs, "source")
            _require_source(findings, specs, entry, base, scopes, path)
        if models:
            _require(findings, specs, "global", scopes, prefix)
            _check_member_base(findings, data, specs, models, scopes, f"{prefix}models")
        for i, piece in enumerate(slices):
            path = f"{prefix}slices[{i}]"
            _check_block(findings, piece, path, specs, "shared")
            inner = [_get(piece, "parameters"), *scopes]
            _require(findings, specs, "global", inner, f"{path}.")
            for j, source in enumerate(_list(_get(piece, "sources"))):
                at = f"{path}.sources[{j}]"
                _check_block(findings, source, at, specs, "source")
                _require_source(findings, specs, source, _get(piece, "base_model") or base, inner, at)


def _check_block(findings: Findings, node: Any, path: str, specs: tuple[ParameterSpec, ...], role: str) -> None:
    """One `parameters:` mapping: names, then values, which become ParameterValue."""
    block = _get(node, "parameters")
    if not isinstance(block, dict):
        return
    allowed = {spec.name: spec for spec in specs if role == "shared" or spec.scope == "source"}
    for name in list(block):
        at = join_path(join_path(path, "parameters"), name)
        spec = allowed.get(name)
        if spec is None:
            if _let_parameter_pass(findings, name, specs, tuple(allowed), at):
                del block[name]
        elif block[name] is not None:
            try:
                block[name] = parse_parameter_value(block[name], spec)
            except ParameterValueError as error:
                for below, message, is_bounds in error.places:
                    findings.refuse(
                        "out-of-bounds" if is_bounds else "bad-value",
                        message,
                        at + below,
                        spec.doc,
                        f"give a value in {spec.bounds()}" if is_bounds else "",
                    )


def _let_parameter_pass(
    findings: Findings, name: str, specs: tuple[ParameterSpec, ...], allowed: tuple[str, ...], path: str
) -> bool:
    is_global = any(spec.name == name for spec in specs)
    near = None if is_global or name in _ALL_PARAMETERS else nearest(name, allowed)
    if findings.pure and near is None:
        why = "it is one value a merge, and mergekit reads it in the outer `parameters` only" if is_global else ""
        required = any(spec.name == name and spec.default is REQUIRED for spec in specs)
        if not required:
            findings.warn(
                f"the parameter {name!r} has no effect here",
                path,
                why or "mergekit ignores parameters that the method does not have",
            )
            return True
    if is_global:
        findings.refuse(
            "unknown-key",
            f"{name!r} is no parameter of one source",
            path,
            "it is one value a merge",
            "move it to the outer `parameters`",
        )
        return False
    fix = f"did you mean {near}?" if near else f"its parameters are {', '.join(allowed)}"
    findings.refuse("unknown-key", f"the method has no parameter {name!r}", path, "", fix)
    return False


def _require(findings: Findings, specs: tuple[ParameterSpec, ...], scope: str, scopes: list[Any], prefix: str) -> None:
    for spec in specs:
        missing = spec.scope == scope and spec.default is REQUIRED
        if missing and not any(_get(block, spec.name) is not None for block in scopes):
            findings.refuse(
                "missing-key",
                f"the parameter {spec.name} is missing",
                f"{prefix}parameters.{spec.name}",
                spec.doc,
                f"add parameters: {{{spec.name}: …}}",
            )


def _require_source(
    findings: Findings, specs: tuple[ParameterSpec, ...], entry: Any, base: Any, scopes: list[Any], path: str
) -> None:  # fmt: skip
    """Required parameters of one source. The base that deltas are relative to needs none."""
    method = findings.method
    if method is None or not isinstance(entry, dict):
        return
    if method.base != "member" and base is not None and _same_model(entry.get("model")) == _same_model(base):
        return
    _require(findings, specs, "source", [entry.get("parameters"), *scopes], f"{path}.")


def _check_member_base(
    findings: Findings, data: Mapping[str, Any], specs: tuple[ParameterSpec, ...], models: list[Any],
    scopes: list[Any], path: str,
) -> None:  # fmt: skip
    """mergekit adds a base_model that is not listed as one more source; then it needs what every source needs."""
    method, base = findings.method, data.get("base_model")
    if method is None or method.base != "member" or base is None:
        return
    if any(_same_model(_get(entry, "model")) == _same_model(base) for entry in models):
        return
    for spec in specs:
        if spec.scope == "source" and spec.default is REQUIRED and not any(_get(s, spec.name) for s in scopes):
            findings.refuse(
                "missing-key",
                f"base_model is one more source of {method.name} and has no {spec.name}",
                path,
                "mergekit adds a base that is not listed",
                "list it with a weight, or drop base_model",
            )


def _containers(data: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What can hold `models` or `slices`: the manifest, and each of its modules."""
    if isinstance(data, dict):
        yield "", data
        modules = data.get("modules")
        for name, module in modules.items() if isinstance(modules, dict) else ():
            if isinstance(module, dict):
                yield f"modules.{name}.", module


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None
