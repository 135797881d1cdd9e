"""The manifest as a typed value: mergekit's grammar, raymerge's keys beside it, and the bulk manifest.

These classes hold shapes and types only. What needs the method (parameter names, bounds, what is required) and what
needs several keys at once is in checks.py, what is not built yet is in later.py, and `load_manifest` runs all three; a
Manifest made by `load_manifest` has passed them. References: mergekit's `config.py`; PEFT's `add_weighted_adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from merger.errors import ManifestError, Problem, nearest
from merger.manifest.node import Bool, Finite, Int, Node, Size, Text
from merger.manifest.node import fail as _fail
from merger.manifest.parameters import ParameterValue, ParameterValueError, parameter_specs, parse_parameter_value
from merger.manifest.placement import Cluster, Kubernetes
from merger.manifest.references import ModelReference, Reference, parse_model_reference, parse_reference
from merger.manifest.schedule import check_timezone, parse_cron
from merger.methods import METHODS, MethodSpec, ParameterSpec
from merger.methods.compose import Blocks, compose
from merger.methods.wrappers import wrappers_for

DTYPE_NAMES: Final = ("float32", "float16", "bfloat16", "float64", "int64")
"""What `dtype` and `out_dtype` may say; mergekit's list. `torch.` before it is dropped."""

_DTYPE_SLIPS: Final = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def _raise_problem(error: ManifestError) -> NoReturn:
    problem = error.problems[0]
    _fail(problem.code.replace("-", "_"), problem.what, why=problem.why, fix=problem.fix)


def _cwd(info: ValidationInfo) -> Any:
    return info.context.get("cwd") if isinstance(info.context, dict) else None


def _reference(value: object, info: ValidationInfo) -> Reference:
    return _any_reference(value, info, "hub")


def _output_reference(value: object, info: ValidationInfo) -> Reference:
    found = _any_reference(value, info, "local")
    if found.kind == "merge":
        _fail("bad_reference", "merge:// names what another document makes, not a place", fix="name a folder")
    return found


def _any_reference(value: object, info: ValidationInfo, bare: Literal["hub", "local"]) -> Reference:
    if isinstance(value, Reference):
        return value
    if not isinstance(value, str):
        _fail("bad_value", "a reference is text", fix="quote it if it looks like a number")
    try:
        return parse_reference(value, cwd=_cwd(info), bare=bare)
    except ManifestError as error:
        _raise_problem(error)


def _model_reference(value: object, info: ValidationInfo) -> ModelReference:
    try:
        return parse_model_reference(value, cwd=_cwd(info))
    except ManifestError as error:
        _raise_problem(error)


def _tokenizer_source(value: object, info: ValidationInfo) -> str:
    if value in ("union", "base"):
        return str(value)
    return str(_model_reference(value, info).model)


def _token_source(value: object, info: ValidationInfo) -> str | dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or "kind" not in value:
        return str(_model_reference(value, info).model)
    if value == {"kind": "zero"}:
        return {"kind": "zero"}
    kind, named = value.get("kind"), sorted(set(value) - {"kind", "model"})
    if kind != "model_token" or "model" not in value or named not in (["token"], ["token_id"]):
        _fail(
            "bad_value", "the row of a token is not said",
            fix="name a model, or write {kind: model_token, model: …, token: … or token_id: …}, or {kind: zero}",
        )  # fmt: skip
    which = value[named[0]]
    if not isinstance(which, str if named == ["token"] else int) or isinstance(which, bool):
        _fail("bad_value", f"{which!r} is no {named[0]}")
    return {"kind": "model_token", "model": str(_model_reference(value["model"], info).model), named[0]: which}


def _parameters(value: object) -> dict[str, ParameterValue]:
    if not isinstance(value, Mapping):
        _fail("bad_value", "parameters are a mapping of names to values")
    parsed, wrong = {}, []
    for name, item in value.items():
        try:
            if item is not None:
                parsed[str(name)] = parse_parameter_value(item)
        except ParameterValueError as error:
            wrong += [(f".{name}{path}", message, bounds) for path, message, bounds in error.places]
    if wrong:
        raise ParameterValueError(wrong)
    return parsed


def _plain_parameters(parameters: Mapping[str, ParameterValue]) -> dict[str, object]:
    return {name: value.as_plain() for name, value in parameters.items()}


def _dtype(value: object) -> str:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPE_NAMES:
        near = _DTYPE_SLIPS.get(str(name)) or nearest(str(name), DTYPE_NAMES)
        fix = f"did you mean {near}?" if near else f"write one of {', '.join(DTYPE_NAMES)}"
        _fail("bad_value", f"{value!r} is no dtype of an output", fix=fix)
    return str(name)


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


TokenizerSource = Annotated[str, PlainValidator(_tokenizer_source)]
ReferenceField = Annotated[Reference, PlainValidator(_reference), PlainSerializer(str)]
OutputReferenceField = Annotated[Reference, PlainValidator(_output_reference), PlainSerializer(str)]
ModelReferenceField = Annotated[
    ModelReference, PlainValidator(_model_reference), PlainSerializer(ModelReference.as_plain)
]
Parameters = Annotated[Mapping[str, ParameterValue], PlainValidator(_parameters), PlainSerializer(_plain_parameters)]
DTypeName = Annotated[str, PlainValidator(_dtype)]
Version = Annotated[Literal[1], BeforeValidator(lambda value: str(value) if isinstance(value, bool) else value)]
Patterns = Annotated[tuple[Text, ...], BeforeValidator(_one_or_many)]


class AdapterEntry(Node):
    """One adapter: it stands for the model base+adapter."""

    adapter: ReferenceField
    name: Text | None = None
    """What `modules_to_save: {from: NAME}` and messages call it."""
    initial: ReferenceField | None = None
    """The adapter before training, where initialisation changed the base (PiSSA and its like)."""
    statistics: ReferenceField | None = None
    """What was measured of this source: a .safetensors file, or a folder of them."""
    parameters: Parameters = Field(default_factory=dict)
    include: Patterns = ()
    """Only what one of these patterns matches is taken; empty takes all."""
    exclude: Patterns = ()


class ModelEntry(Node):
    """One whole model (mergekit)."""

    model: ModelReferenceField
    statistics: ReferenceField | None = None
    parameters: Parameters = Field(default_factory=dict)


class Expert(Node):
    """One model whose feed-forward layers become experts (mergekit-moe)."""

    source_model: ModelReferenceField
    positive_prompts: tuple[Text, ...] | None = None
    """What its gate is made from; not looked at where gates are random."""
    negative_prompts: tuple[Text, ...] | None = None
    noise_scale: Annotated[Finite, Field(ge=0)] | None = None
    """Standard deviation of normal noise that is added to its tensors."""
    residual_scale: Finite | None = None
    """Factor of what it adds to the residual stream (its down_proj)."""


GATE_MODES: Final = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
PROMPTED: Final = GATE_MODES[:4]
"""Modes that make gates from prompts."""


class SliceSource(Node):
    """Layers [start, stop) of one model."""

    model: ModelReferenceField
    layer_range: tuple[Int, Int]
    statistics: ReferenceField | None = None
    parameters: Parameters = Field(default_factory=dict)

    @field_validator("layer_range", mode="after")
    @classmethod
    def _check_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        start, stop = value
        if start < 0 or stop <= start:
            _fail(
                "bad_value",
                f"the layer range [{start}, {stop}] holds no layers",
                why="it is [first, one past the last], counted from 0",
                fix="for the first layer write [0, 1]",
            )
        return value


class Slice(Node):
    """Consecutive layers of the output, each made from one layer of every source."""

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    base_model: ModelReferenceField | None = None
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_lengths(self) -> Slice:
        lengths = [source.layer_range[1] - source.layer_range[0] for source in self.sources]
        if len(set(lengths)) > 1:
            _fail(
                "conflict",
                f"the sources of a slice have {', '.join(map(str, lengths))} layers",
                why="they are merged layer by layer",
                fix="give every source of a slice as many layers",
            )
        return self


class Module(Node):
    """One module of a model that has several (mergekit's `text_decoder`, `vision_tower`, …)."""

    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[Slice, ...] | None = None
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_one(self) -> Module:
        if (self.models is None) == (self.slices is None):
            _fail("conflict", "a module has either models or slices", fix="keep one of them")
        return self


class TokenSpec(Node):
    """Where the embedding of one token comes from (mergekit)."""

    source: Annotated[str | Mapping[str, Any] | None, PlainValidator(_token_source)] = None
    """A model; a token of a model, {kind: model_token, model, token or token_id}; {kind: zero}; None: as usual."""
    force: Bool = False
    """Whether sources that have the token take this row too."""


class Tokenizer(Node):
    """mergekit's `tokenizer` section."""

    source: TokenizerSource = "union"
    """`union`, `base`, or a model."""
    tokens: Mapping[str, TokenSpec] | None = None
    pad_to_multiple_of: Annotated[Int, Field(ge=1)] | None = None


@dataclass(frozen=True, slots=True)
class Store:
    """How a merged adapter holds its deltas, or `dense` for a model."""

    kind: Literal["dense", "concat", "svd"]
    rank: int | None = None
    """Of an svd; with neither rank nor energy it is the largest source rank."""
    energy: float | None = None
    """Share of the squared singular values that an svd keeps, in (0, 1]."""
    exact: bool = False
    """Form the dense delta instead of working on the exact low-rank core."""

    def as_plain(self) -> str | dict[str, object]:
        if self.kind != "svd":
            return self.kind
        fields: dict[str, object] = {"rank": self.rank, "energy": self.energy, "exact": self.exact or None}
        return {"svd": {k: v for k, v in fields.items() if v is not None}}


class _Svd(Node):
    rank: Annotated[Int, Field(ge=1)] | None = None
    energy: Annotated[Finite, Field(gt=0, le=1)] | None = None
    exact: Bool = False


_STORES: Final[tuple[Literal["dense", "concat", "svd"], ...]] = ("dense", "concat", "svd")
_STORE_FORMS: Final = "write dense, concat, {svd: {rank: 16}} or {svd: {energy: 0.95}}"


class _SvdStore(Node):
    svd: _Svd


def _store(value: object) -> Store:
    if isinstance(value, Store):
        return value
    if isinstance(value, str):
        for kind in _STORES:
            if value == kind:
                return Store(kind)
        near = nearest(value, _STORES)
        _fail("bad_value", f"{value!r} is no store", fix=f"did you mean {near}?" if near else _STORE_FORMS)
    if not isinstance(value, Mapping) or set(value) != {"svd"}:
        _fail("bad_value", "this is no store", fix=_STORE_FORMS)
    svd = _SvdStore.model_validate({"svd": {} if value["svd"] is None else value["svd"]}).svd
    if svd.rank is not None and svd.energy is not None:
        _fail("conflict", "an svd is cut at a rank or at an energy, not at both", fix="keep one of rank and energy")
    return Store("svd", svd.rank, svd.energy, svd.exact)


StoreField = Annotated[Store, PlainValidator(_store), PlainSerializer(Store.as_plain)]


class TakeFrom(Node):
    """`{from: NAME}`."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    source: Text = Field(alias="from")


def _modules_to_save(value: object) -> object:
    if not (isinstance(value, TakeFrom | Mapping) or value in ("refuse", "average", "all", "drop")):
        _fail("bad_value", f"{value!r} says not what to do", fix="write refuse, average, {from: NAME}, all or drop")
    return value


class S3Output(Node):
    kms_key_id: Text | None = None
    storage_class: Text | None = None
    tags: Mapping[str, str] = Field(default_factory=dict)
    equal_parts: Bool = False
    """For stores that take only parts of one size (Cloudflare R2): more of them have to be joined from pieces."""


class _Blocks(Node):
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quant: Bool = False


_IN_BLOCKS: Final = ("nf4", "fp4")
"""Grids whose flat blocks share a scale."""


@dataclass(frozen=True, slots=True)
class BaseQuantization:
    """The grid that a dense base is rounded through before deltas are added; `none` says that it is not to be."""

    kind: Literal["none", "nf4", "fp4", "int8"]
    blocksize: int = 64
    double_quant: bool = False
    """Defaults as in bitsandbytes; QLoRA's own recipe says true."""

    def as_plain(self) -> str | dict[str, object]:
        return _plain_kind(self.kind, self.blocksize, self.double_quant)


@dataclass(frozen=True, slots=True)
class OutputQuantization:
    """How the linear layers of a merged model are stored.

    `keep`, `mixed` and `none` say what becomes of a quantised base's codes; `nf4`, `fp4` and `int8` are bitsandbytes',
    `fp8` E4M3 in blocks of 128 × 128.
    """

    kind: Literal["keep", "mixed", "none", "nf4", "fp4", "int8", "fp8"]
    blocksize: int = 64
    double_quant: bool = False

    def as_plain(self) -> str | dict[str, object]:
        return _plain_kind(self.kind, self.blocksize, self.double_quant)


def _plain_kind(kind: str, blocksize: int, double_quant: bool) -> str | dict[str, object]:
    return {kind: {"blocksize": blocksize, "double_quant": double_quant}} if kind in _IN_BLOCKS else kind


_Kind = TypeVar("_Kind", bound=str)


def _kind_of(value: object, kinds: tuple[_Kind, ...], what: str) -> tuple[_Kind, int, bool]:
    """The kind, and the blocks of those that have them."""
    for kind in kinds:
        if value == kind:
            return kind, 64, False
        if isinstance(value, Mapping) and list(value) == [kind] and kind in _IN_BLOCKS:
            blocks = _Blocks.model_validate(value[kind] or {})
            return kind, blocks.blocksize, blocks.double_quant
    return _fail("bad_value", f"{value!r} is no {what}", fix=f"write {', '.join(kinds)} or {_BLOCKS_FORM}")


_GRIDS: Final[tuple[Literal["none", "nf4", "fp4", "int8"], ...]] = ("none", "nf4", "fp4", "int8")
_STORED: Final[tuple[Literal["keep", "mixed", "none", "nf4", "fp4", "int8", "fp8"], ...]] = (
    "keep", "mixed", "none", "nf4", "fp4", "int8", "fp8",
)  # fmt: skip
_BLOCKS_FORM: Final = "{nf4: {blocksize: 64, double_quant: true}}"


def _base_quantization(value: object) -> BaseQuantization:
    return value if isinstance(value, BaseQuantization) else BaseQuantization(*_kind_of(value, _GRIDS, "grid"))


def _output_quantization(value: object) -> OutputQuantization:
    if isinstance(value, OutputQuantization):
        return value
    return OutputQuantization(*_kind_of(value, _STORED, "quantisation of an output"))


BaseQuantizationField = Annotated[
    BaseQuantization, PlainValidator(_base_quantization), PlainSerializer(BaseQuantization.as_plain)
]
OutputQuantizationField = Annotated[
    OutputQuantization, PlainValidator(_output_quantization), PlainSerializer(OutputQuantization.as_plain)
]


class Output(Node):
    """Where the result goes, and as what."""

    path: OutputReferenceField | None = None
    """None where the command line says it."""
    kind: Literal["adapter", "model", "tensors"] | None = None
    """None: the kind of the sources."""
    store: StoreField | None = None
    """None: concat where the result is a linear combination of deltas, else svd at the largest source rank."""
    exists: Literal["refuse", "version", "replace"] = "refuse"
    rounding: Literal["once", "peft_safe"] = "once"
    shard_size: Size = 5 * 10**9
    """Bytes."""
    quantization: OutputQuantizationField | None = None
    """How a model is stored; None: a dense base dense, a quantised one as its scheme is kept by default."""
    modules_to_save: Annotated[
        Literal["refuse", "average", "all", "drop"] | TakeFrom, BeforeValidator(_modules_to_save)
    ] = "refuse"
    """`all` and `drop` are for models whose changes become an adapter."""
    private: Bool | None = None
    commit_message: Text | None = None
    s3: S3Output | None = None

    @model_validator(mode="after")
    def _check_store(self) -> Output:
        if (
            self.store is not None
            and self.kind is not None
            and (self.kind == "adapter") == (self.store.kind == "dense")
        ):
            _fail(
                "conflict",
                f"a merged {self.kind} cannot be stored as {self.store.kind}",
                fix="an adapter is concat or svd, a model and bare tensors are dense",
            )
        return self


class Options(Node):
    """What sources do not say of themselves."""

    moe_lora_layout: Literal["peft", "peft_0_18", "expert_major"] | None = None
    """How LoRA on packed experts lies: by shape and PEFT's version; `expert_major`: B expert by expert."""


class Manifest(Node):
    """One merge."""

    version: Version = 1
    name: Text | None = None
    """What other documents of the same file call this one (mergekit-multi)."""
    documents: Mapping[str, Manifest] = Field(default_factory=dict)
    """The other documents of the file, each after those that it names; sources name them `merge://NAME`."""
    merge_method: str | None = None
    """A name of METHODS; None where combination_type or combine is given."""
    combination_type: str | None = None
    """One of PEFT's names, with PEFT's meaning."""
    base_model: ModelReferenceField | None = None

    adapters: tuple[AdapterEntry, ...] | None = Field(default=None, min_length=1)
    models: tuple[ModelEntry, ...] | None = Field(default=None, min_length=1)
    slices: tuple[Slice, ...] | None = Field(default=None, min_length=1)
    modules: Mapping[str, Module] | None = Field(default=None, min_length=1)
    parameters: Parameters = Field(default_factory=dict)

    experts: tuple[Expert, ...] | None = Field(default=None, min_length=1)
    """A mixture of experts is assembled, and nothing is merged (mergekit-moe)."""
    shared_experts: tuple[Expert, ...] | None = None
    gate_mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] | None = None
    """None is hidden."""
    experts_per_token: Annotated[Int, Field(ge=1)] | None = None
    """None is 2."""
    architecture: Text | None = None
    """The start of a name: mixtral, deepseek, qwen, qwen3. None: the first that fits."""

    dtype: DTypeName | None = None
    out_dtype: DTypeName | None = None
    tokenizer_source: TokenizerSource | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0

    weights: tuple[Finite, ...] | None = None
    """PEFT: one a adapter, in their order."""
    density: Annotated[Finite, Field(ge=0, le=1)] | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None
    """PEFT; None is total."""
    svd_rank: Annotated[Int, Field(ge=1)] | None = None
    """PEFT; None is the largest source rank."""
    svd_clamp: Annotated[Finite, Field(ge=0, le=1)] | None = None
    svd_full_matrices: Bool | None = None
    """PEFT; no effect."""
    svd_driver: str | None = None
    """PEFT; no effect."""

    space: Literal["weight", "delta", "core"] | None = None
    """None: where the method works by itself."""
    prepare: str | None = None
    """Of a method written out in its blocks. The blocks' own values stand in `parameters` once the checks have run."""
    combine: str | None = None
    """Not None exactly where neither merge_method nor combination_type is given."""
    finish: Any = None
    """None once the checks have run: every finish step is a parameter."""
    options: Options = Field(default_factory=Options)
    base_quantization: BaseQuantizationField | None = None
    """None: a dense base as it is, with a warning where an adapter says that it was trained over a quantised one."""
    output: Output = Field(default_factory=Output)
    cluster: Cluster = Field(default_factory=Cluster)
    kubernetes: Kubernetes = Field(default_factory=Kubernetes)

    warnings: tuple[Problem, ...] = Field(default=(), exclude=True, repr=False)
    """What was accepted and has no effect. No part of the manifest: neither equality nor `resolved()` sees it."""

    @property
    def sources_key(self) -> Literal["adapters", "models", "slices", "modules", "experts"]:
        """Which of the five forms this manifest has."""
        if self.experts is not None:
            return "experts"
        if self.adapters is not None:
            return "adapters"
        if self.models is not None:
            return "models"
        return "slices" if self.slices is not None else "modules"

    @property
    def method(self) -> MethodSpec | None:
        """The named method, or the one that the blocks make; None under combination_type."""
        if self.combine is not None:
            return compose(Blocks(self.space, self.prepare, self.combine))
        return None if self.merge_method is None else METHODS[self.merge_method]

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """The parameters of the method or of the combination."""
        if self.combine is not None and self.method is not None:
            return (*self.method.parameters, *wrappers_for(self.method))
        return parameter_specs(merge_method=self.merge_method, combination_type=self.combination_type) or ()

    @property
    def shared_parameters(self) -> Mapping[str, ParameterValue]:
        """The outermost scope: `parameters`, with PEFT's `density` as one of them."""
        if self.density is None:
            return self.parameters
        return {**self.parameters, "density": ParameterValue.of(self.density)}

    def adapter_scopes(self, index: int) -> tuple[Mapping[str, ParameterValue], Mapping[str, ParameterValue]]:
        """The scopes of one adapter, innermost first, with PEFT's `weights` as parameters of the adapters."""
        if self.adapters is None:
            raise IndexError("this manifest has no adapters")
        own = self.adapters[index].parameters
        if self.weights is not None:
            own = {**own, "weight": ParameterValue.of(self.weights[index])}
        return own, self.shared_parameters

    def resolved(self) -> dict[str, Any]:
        """Canonical plain data. `load_manifest` accepts it and gives an equal manifest, wherever it is read."""
        return self.model_dump(mode="json")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self.resolved() == other.resolved()

    __hash__ = None  # type: ignore[assignment]


class Schedule(Node):
    """When a bulk runs: five cron fields, in a time zone."""

    cron: str
    timezone: Text = "UTC"

    @field_validator("cron", mode="after")
    @classmethod
    def _check_cron(cls, value: str) -> str:
        try:
            parse_cron(value)
        except ValueError as error:
            _fail("bad_value", str(error))
        return value

    @field_validator("timezone", mode="after")
    @classmethod
    def _check_timezone(cls, value: str) -> str:
        try:
            check_timezone(value)
        except ValueError as error:
            _fail("bad_value", str(error))
        return value


class BulkEntry(Node):
    """One merge of a bulk: a manifest elsewhere, or the keys of one that go over `defaults`."""

    name: Text | None = None
    manifest: ReferenceField | None = None
    inline: Mapping[str, Any] = Field(default_factory=dict)
    """Keys of a manifest, as written; checked when the bulk is expanded."""
    share: Annotated[Finite, Field(gt=0)] = 1.0
    """Of the workers, against the shares of the other merges that are under way."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        own = {k: value[k] for k in ("name", "manifest", "share") if k in value}
        rest = {k: v for k, v in value.items() if k not in own}
        if set(rest) == {"inline"}:
            rest = rest["inline"]
        return {**own, "inline": _manifest_keys(rest)}

    @model_validator(mode="after")
    def _check_one(self) -> BulkEntry:
        if (self.manifest is None) == (not self.inline):
            _fail("conflict", "an entry is either `manifest: REF` or the keys of a manifest", fix="keep one of them")
        return self


def _manifest_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        known = [name for name in Manifest.model_fields if name != "warnings"]
        for key in value:
            if key not in known:
                near = nearest(str(key), known)
                _fail("unknown_key", f"{key!r} is no key of a manifest", fix=f"did you mean {near}?" if near else "")
    return value


class BulkManifest(Node):
    """Many merges, before they are expanded (merger/manifest/bulk.py)."""

    version: Version = 1
    merges: tuple[BulkEntry, ...] | None = Field(default=None, min_length=1)
    each: ReferenceField | None = None
    """One merge per adapter found below this place."""
    defaults: Annotated[Mapping[str, Any], BeforeValidator(_manifest_keys)] = Field(default_factory=dict)
    matrix: Mapping[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted keys to lists; their product in written order."""
    max_active_merges: Annotated[Int, Field(ge=1)] | None = None
    """Merges under way at once; variants that are read together count as one. None: 4."""
    on_failure: Literal["continue", "stop"] = "continue"
    schedule: Schedule | None = None
    cluster: Cluster = Field(default_factory=Cluster)
    kubernetes: Kubernetes = Field(default_factory=Kubernetes)

    @model_validator(mode="after")
    def _check_one(self) -> BulkManifest:
        if (self.merges is None) == (self.each is None):
            _fail("conflict", "a bulk has either merges or each", fix="keep one of them")
        return self


RAYMERGE_KEYS: Final = frozenset(Manifest.model_fields) - {
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "name",
    "tokenizer_source", "tokenizer", "chat_template", "warnings",
    "experts", "shared_experts", "gate_mode", "experts_per_token", "architecture",
}  # fmt: skip
"""Top-level keys that mergekit does not have: a manifest with one of them is no pure mergekit file."""

PEFT_KEYS: Final = (
    "weights",
    "density",
    "majority_sign_method",
    "svd_rank",
    "svd_clamp",
    "svd_full_matrices",
    "svd_driver",
)
"""Keys that belong to combination_type."""
