"""Where a merge is, on purpose, not what PEFT 0.21.2 or mergekit 0.1.5 would write: `deviations`, from one table. Pure.

A row stands in raymerge.json and on the card of exactly the merges that it applies to. What names tensors or counts
tokens is told by the planners where they find it: modules that were moved, tensors that are no deltas, rows of tokens.
Where raymerge refuses there is no output, and so no row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from merger.catalog import Catalog
from merger.manifest import Manifest
from merger.methods.rounds import Call, rounds_of
from merger.planning.inputs import SourceTable, model_references
from merger.planning.nouns import DenseTerm, LowRankTerm, Task

_HALVES: Final = ("BF16", "F16")
_MERGEKITS: Final = frozenset({
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear", "karcher",
    "linear", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce", "slerp",
    "task_arithmetic", "ties",
})  # fmt: skip
_FACTORWISE: Final = frozenset({"linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"})
"""PEFT's types that merge A with A and B with B, under names that are merge methods too."""
_FLOAT32: Final = frozenset({"linear", "passthrough", "slerp"})
"""Of mergekit's methods those that compute in float32 whatever they are given."""
_SAMPLED: Final = 1_000_000
"""Elements above which mergekit's arcee_fusion looks at a sample."""
_EXPERT: Final = re.compile(r"\.experts\.\d+\.")
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_OVER_TENSORS: Final = frozenset({"arcee_fusion", "karcher", "model_stock", "multislerp", "nuslerp", "sce", "slerp"})
"""Of mergekit's methods those whose numbers depend on what one tensor is, beside those that trim or rescale."""


@dataclass(frozen=True)
class Facts:
    """What decides whether a row applies."""

    # No slots: what is looked up once is kept.

    manifest: Manifest
    table: SourceTable
    kind: Literal["adapter", "model", "tensors"]
    tasks: Sequence[Task]
    untied: bool = False
    """Whether the output has a head of its own where the donor's config ties it."""
    replicated: bool = False
    """Whether layers are written out as adapters copied them."""

    @cached_property
    def adapters(self) -> tuple[Catalog, ...]:
        return tuple(s.catalog for s in self.table.sources if s.catalog.kind == "adapter")

    @cached_property
    def models(self) -> tuple[Catalog, ...]:
        return tuple(s.catalog for s in self.table.sources if s.catalog.kind == "model")

    @cached_property
    def calls(self) -> tuple[tuple[Task, Call], ...]:
        """Of all that is computed and not copied."""
        return tuple((t, r.call) for t in self.tasks for r in t.results if r.store.kind != "copy")

    @property
    def combination(self) -> str:
        return self.manifest.combination_type or ""

    @property
    def mergekits(self) -> bool:
        """Whether mergekit has this merge: a method of its own, on models."""
        return self.manifest.merge_method in _MERGEKITS and bool(model_references(self.manifest))

    @property
    def thinned(self) -> bool:
        """Whether anything is trimmed or dropped."""
        return any(c.prepare != "none" and _thins(c) for _, c in self.calls)

    def of_adapters(self, key: str) -> Iterator[Any]:
        return (adapter.config.get(key) for adapter in self.adapters)

    @cached_property
    def first(self) -> Mapping[str, Any]:
        """The config of the first adapter, which PEFT's merged adapter takes its settings from."""
        return self.adapters[0].config if self.adapters else {}


def _thins(call: Call) -> bool:
    """Whether it leaves out elements of any source."""
    return not all(map(call.keeps_all, range(len(call.weights))))


@dataclass(frozen=True, slots=True)
class Deviation:
    """One row."""

    code: str
    sentence: str
    applies: Callable[[Facts], bool]


# ------------------------------------------------------------------------------------------------------- of mergekit


def _half_precision(f: Facts) -> bool:
    """mergekit computes in `dtype`, or as the files are; some methods in float32, on what `dtype` made of them."""
    named = (f.manifest.dtype or "").removeprefix("torch.")
    if not f.mergekits or named in {"float32", "float64"}:
        return False
    merged = [(t, c) for t, c in f.calls if c.combine not in {"pass", "equal"} or c.scale != 1.0]
    held = {f.table.sources[s].catalog.stored(n).spec.dtype.code for t, _ in merged for s, n in _stored(t)}
    halved = {"bfloat16": "BF16", "float16": "F16"}.get(named)
    if f.manifest.merge_method in _FLOAT32:
        return halved is not None and bool(held - {halved})
    return bool(held) if halved is not None else bool(held & set(_HALVES))


def _stored(task: Task) -> Iterator[tuple[int, str]]:
    """(source, tensor) of all stored tensors that a task reads as they lie."""
    operands = [entry.terms for entry in task.entries] + ([task.base] if task.base is not None else [])
    return ((t.source, t.tensor) for terms in operands for t in terms if isinstance(t, DenseTerm))


def _rounded_fold(f: Facts) -> bool:
    adapted = any(model.adapters for model in model_references(f.manifest))
    half = any(t.spec.dtype.code in _HALVES for m in f.models for t in m.tensors.values())
    return f.mergekits and adapted and half and f.kind == "model"


def _equal_magnitudes(f: Facts) -> bool:
    return f.mergekits and any(c.prepare in {"trim", "band"} and _thins(c) for _, c in f.calls)


def _short_rows(f: Facts) -> bool:
    return f.mergekits and any(
        c.prepare == "magprune" and t.cols == 1 and _thins(c) for t, c in f.calls if not t.vector
    )


def _experts_one_by_one(f: Facts) -> bool:
    return f.mergekits and any(
        _EXPERT.search(t.name) and (rounds_of(c) or f.manifest.merge_method in _OVER_TENSORS) for t, c in f.calls
    )


def _left_out(f: Facts) -> bool:
    """Tensors that mergekit's tables of architectures are known not to name."""
    if not f.mergekits:
        return False
    for model in f.models:
        layers = model.config.get("num_hidden_layers")
        is_llama = model.config.get("model_type") in {"llama", "mistral"}
        for name in model.tensors:
            if is_llama and name.endswith("_proj.bias"):
                return True
            found = _LAYER.search(name)
            if found and name.startswith("model.layers.") and isinstance(layers, int) and int(found[1]) >= layers:
                return True
    return False


def _wide_results(f: Facts) -> bool:
    halves = any(t.spec.dtype.code in _HALVES for m in f.models for t in m.tensors.values())
    unnamed = f.manifest.out_dtype is None
    return f.mergekits and unnamed and f.manifest.merge_method in {"arcee_fusion", "ramplus_tl"} and halves


def _lost_generation(f: Facts) -> bool:
    vocabulary = f.manifest.tokenizer is not None or f.manifest.tokenizer_source is not None
    return f.mergekits and vocabulary and any("generation_config.json" in m.companions for m in f.models)


# ----------------------------------------------------------------------------------------------------------- of PEFT


def _another_linear(f: Facts) -> bool:
    return f.manifest.merge_method in _FACTORWISE and bool(f.manifest.adapters) and len(f.manifest.adapters or ()) > 1


def _layers_of_others(f: Facts) -> bool:
    limits = f.first.get("layers_to_transform") is not None or bool(f.first.get("exclude_modules"))
    if not f.combination or not limits:
        return False
    own = set(f.adapters[0].modules)
    return any(set(adapter.modules) - own for adapter in f.adapters[1:])


def _several_ranks(f: Facts) -> bool:
    """cat and svd of PEFT have one rank; what is merged factor by factor has the ranks of its sources."""
    if f.combination not in _FACTORWISE:
        return False
    return len({m.rank for adapter in f.adapters for m in adapter.modules.values() if m.rank}) > 1


def _weighted(f: Facts) -> bool:
    """Whether PEFT would need add_weighted_adapter for it; one adapter folded as it is it does right."""
    return not f.combination and bool(f.adapters) and (f.kind == "adapter" or len(f.adapters) > 1)


def _folds_several(f: Facts) -> bool:
    """Whether several adapters meet in one tensor of a half-precision model."""
    if f.kind != "model" or f.combination or not f.manifest.adapters or f.manifest.method is None:
        return False
    half = any(t.spec.dtype.code in _HALVES for m in f.models for t in m.tensors.values())
    plain = f.manifest.merge_method in {None, "task_arithmetic", "cat"}
    return half and plain and any(sum(map(_has_products, (e.terms for e in t.entries))) > 1 for t in f.tasks)


def _has_products(terms: Sequence[Any]) -> bool:
    return any(isinstance(term, LowRankTerm) for term in terms)


def _layers_by_tuner(f: Facts, *tuners: str) -> bool:
    return any(m.tuner in tuners for adapter in f.adapters for m in adapter.modules.values())


def _ia3_absent(f: Facts) -> bool:
    ia3 = [set(a.modules) for a in f.adapters if a.config.get("peft_type") == "IA3"]
    return len(ia3) > 1 and any(modules != ia3[0] for modules in ia3[1:])


def _began_in_the_base(f: Facts) -> bool:
    return any(m.tuner.startswith("lora (") for adapter in f.adapters for m in adapter.modules.values())


def _requantised(f: Facts) -> bool:
    written = {t.results[0].store.kind for t in f.tasks}
    bnb = any(m.quantization is not None and m.quantization.method == "bitsandbytes" for m in f.models)
    return f.kind == "model" and bool(f.adapters) and bnb and "coded" not in written


def _quantised_models(f: Facts) -> bool:
    return f.mergekits and any(m.quantization is not None for m in f.models)


def _drops(f: Facts) -> bool:
    return f.thinned and any(c.prepare in {"drop", "magprune"} for _, c in f.calls)


def _experts_made(f: Facts) -> bool:
    return f.manifest.experts is not None


def _gate_mode(f: Facts) -> str:
    return (f.manifest.gate_mode or "hidden") if _experts_made(f) else ""


DEVIATIONS: Final[tuple[Deviation, ...]] = (
    # mergekit-moe
    Deviation(
        "moe-names",
        "experts are named as in published checkpoints; mergekit-moe 0.1.5 writes them fused",
        _experts_made,
    ),
    Deviation(
        "moe-hidden",
        "hidden states are computed in float32, without padding; mergekit-moe's in bfloat16, with it",
        lambda f: _gate_mode(f).startswith("hidden"),
    ),
    Deviation(
        "moe-random",
        "random numbers are a hash of each element's place, not torch's generator as in mergekit-moe",
        lambda f: _gate_mode(f).endswith("random") or any(e.noise_scale for e in f.manifest.experts or ()),
    ),
    # mergekit
    Deviation(
        "arithmetic",
        "arithmetic is float32 on the tensors as stored, rounded once; mergekit rounds them to dtype and computes "
        "in it",
        _half_precision,
    ),
    Deviation(
        "unrounded-fold",
        "base+adapter is not rounded before it is merged; mergekit folds it into a model first",
        _rounded_fold,
    ),
    Deviation(
        "equal-magnitudes",
        "of equal magnitudes at a cut those with the lowest index are kept; which ones mergekit keeps is arbitrary",
        _equal_magnitudes,
    ),
    Deviation(
        "mergekit-masks",
        "drop masks are a hash of each element's place, not torch's generator as in mergekit",
        lambda f: not f.combination and _drops(f),
    ),
    Deviation(
        "rows-of-one",
        "a row of one element is kept at the density; mergekit's della ends in an error there",
        _short_rows,
    ),
    Deviation(
        "quartiles",
        "quartiles are exact; mergekit takes them from a random sample above a million elements",
        lambda f: f.manifest.merge_method == "arcee_fusion" and any(
            t.rows * t.cols > _SAMPLED for t, _ in f.calls),
    ),
    Deviation(
        "result-dtype",
        "every tensor is written in the output's dtype; mergekit writes float32 here",
        _wide_results,
    ),
    Deviation(
        "experts-one-by-one",
        "an expert is a tensor of its own, as stored; mergekit packs a layer's experts first, so that trims, norms "
        "and angles are over all of them",
        _experts_one_by_one,
    ),
    Deviation(
        "nothing-left-out",
        "tensors that no table of the architecture names are in the output; mergekit leaves them out",
        _left_out,
    ),
    Deviation(
        "decoded",
        "quantised weights are decoded before they are merged; mergekit merges their codes as numbers",
        _quantised_models,
    ),
    Deviation(
        "donor",
        "without a base_model, config and tokenizer are the first model's; mergekit takes any model's",
        lambda f: f.mergekits and f.manifest.base_model is None and f.kind == "model" and len(f.models) > 1,
    ),
    Deviation(
        "generation",
        "generation_config.json is kept; mergekit loses it where vocabularies are merged",
        _lost_generation,
    ),
    Deviation(
        "untied",
        "the head is written and the config no longer ties it; mergekit may leave the flag as it was, and PEFT's "
        "merge changes embeddings and head alike",
        lambda f: f.untied,
    ),
    # PEFT's add_weighted_adapter
    Deviation(
        "signs",
        "svd_clamp cuts at a quantile of signed factors: signs are fixed here, and LAPACK's in PEFT",
        lambda f: bool(f.combination) and f.manifest.svd_clamp is not None,
    ),
    Deviation(
        "rslora",
        "PEFT would scale a merge of rsLoRA adapters by √r once more; here it is scaled once",
        lambda f: bool(f.combination and f.first.get("use_rslora")),
    ),
    Deviation(
        "peft-masks",
        "drop masks are a hash of each element's place, not torch's generator as in PEFT",
        lambda f: f.combination.startswith("dare") and _drops(f),
    ),
    Deviation(
        "deltas",
        "what is merged are the deltas B·A; PEFT's combination type of this name merges A with A and B with B, "
        "which adds products of one adapter's B with another's A",
        _another_linear,
    ),
    Deviation(
        "others-layers",
        "layers that the first adapter leaves out are merged; PEFT applies its layers_to_transform and "
        "exclude_modules to all",
        _layers_of_others,
    ),
    Deviation(
        "ranks",
        "the config says each module's rank; PEFT writes one for all, and cannot load what it saved",
        _several_ranks,
    ),
    Deviation(
        "cat-dtype",
        "the base's dtype plays no part; PEFT rounds a cat to it",
        lambda f: f.combination == "cat" and any(
             t.spec.dtype.code == "F32" for a in f.adapters for t in a.tensors.values()),
    ),
    Deviation(
        "ia3-absent-peft",
        "PEFT's sum of IA3 factors takes an absent module for 0, as combination_type does here; merge_method takes "
        "it for 1",
        lambda f: bool(f.combination) and _ia3_absent(f),
    ),
    Deviation(
        "ia3-absent",
        "a module that an IA3 adapter lacks counts as 1; PEFT adds factors up and takes it for 0",
        lambda f: not f.combination and f.kind == "adapter" and _ia3_absent(f),
    ),
    Deviation(
        "dora",
        "magnitudes of DoRA are merged, within each adapter's delta; PEFT starts them anew from the base",
        lambda f: _weighted(f) and _layers_by_tuner(f, "dora"),
    ),
    Deviation(
        "began-in-base",
        "adapters that began in the base (PiSSA and its like) count as what they add to the original; PEFT changes "
        "the base again for the merge",
        lambda f: _weighted(f) and _began_in_the_base(f),
    ),
    Deviation(
        "biases",
        "biases of adapters are merged; PEFT drops them, or refuses them",
        lambda f: _weighted(f) and any(
             c.target.endswith(".bias") for a in f.adapters for m in a.modules.values() for c in m.changes),
    ),
    Deviation(
        "tokens",
        "rows of trained tokens are merged; PEFT keeps the base's",
        lambda f: _weighted(f) and _layers_by_tuner(f, "trainable tokens"),
    ),
    # PEFT's folds
    Deviation(
        "rounded-each",
        "PEFT rounds after each of several adapters; here each delta is rounded, then their sum once",
        lambda f: _folds_several(f) and f.manifest.output.rounding == "peft_safe",
    ),
    Deviation(
        "rounded-once",
        "PEFT rounds after each of several adapters; here their sum is rounded once",
        lambda f: _folds_several(f) and f.manifest.output.rounding == "once",
    ),
    Deviation(
        "copied-layers",
        "copied layers are written out; PEFT adds the deltas of all copies to one layer",
        lambda f: f.replicated,
    ),
    Deviation(
        "dense-base",
        "what 4 and 8 bits stand for is written dense; PEFT quantises the merged weights again",
        _requantised,
    ),
)  # fmt: skip
"""Every difference that an output can have."""


def deviations(facts: Facts) -> list[str]:
    """The sentences of the rows that apply, in the table's order."""
    return [row.sentence for row in DEVIATIONS if row.applies(facts)]
