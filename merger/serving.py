"""What an inference engine makes of an adapter, by the engine's published rules: `for_vllm`. Pure; headers are enough.

The rules are those of vLLM 0.33.0, read off its loader: vllm/config/lora.py (ranks), and in vllm/lora peft_helper.py
(configs), utils.py (names of tensors), lora_model.py and model_manager.py (modules, experts, embeddings).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from merger.catalog import Catalog

Effect = Literal["refused", "ignored", "changed", "setting"]
"""What the engine does: it ends with an error, serves without these tensors, serves other weights than were trained, or
serves if it is started so."""
Verdict = Literal["served", "served after a change", "refused", "model"]
"""`served after a change`: some command of raymerge makes an adapter of it that is served. `refused`: only a fold does.
`model`: a full model, which no rule of adapters is about."""

VLLM: Final = "0.33.0"
VLLM_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""
VLLM_RANK: Final = 16
"""What it is where nobody says."""
_VLLM_INITS: Final = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
"""Words of init_lora_weights that are served; every other word is refused, true and false are not."""
_VLLM_HEADS: Final = ("classifier", "score")
"""Modules that may be saved whole."""
_VLLM_VOCABULARY: Final = 258_048
"""Rows of a head that adapters may change."""

_NO_LORA: Final = frozenset({
    "BertForMaskedLM", "BloomForCausalLM", "CLIPModel", "Cohere2VisionForConditionalGeneration", "DbrxForCausalLM",
    "DeepseekVLV2ForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM", "GPT2ForSequenceClassification",
    "GPT2LMHeadModel", "GPTJForCausalLM", "Gemma3nForCausalLM", "Gemma3nForConditionalGeneration",
    "KimiLinearForCausalLM", "KimiVLForConditionalGeneration", "LlavaOnevisionForConditionalGeneration",
    "Mamba2ForCausalLM", "MambaForCausalLM", "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification", "OrionForCausalLM", "Phi3VForCausalLM", "Qwen2AudioForConditionalGeneration",
    "SiglipModel", "StableLmForCausalLM", "Zamba2ForCausalLM",
})  # fmt: skip
"""Architectures that are served, and not with adapters."""
_EMBEDDINGS_AND_HEAD: Final = frozenset({
    "ApertusForCausalLM", "DeciLMForCausalLM", "Ernie4_5ForCausalLM", "Exaone4ForCausalLM", "FalconH1ForCausalLM",
    "GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM",
    "InternLM3ForCausalLM", "JambaForCausalLM", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "Llama4ForCausalLM",
    "LlamaForCausalLM", "MiniCPM3ForCausalLM", "MiniCPMForCausalLM", "Ministral3ForCausalLM", "MistralForCausalLM",
    "MixtralForCausalLM", "NemotronForCausalLM", "NemotronHForCausalLM", "Phi3ForCausalLM", "PhiMoEForCausalLM",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "SolarForCausalLM",
    "TeleChat3ForCausalLM",
})  # fmt: skip
_EMBEDDINGS: Final = frozenset({
    "ArceeForCausalLM", "Cohere2ForCausalLM", "CohereForCausalLM", "CwmForCausalLM", "FlexOlmoForCausalLM",
    "GPTBigCodeForCausalLM", "GPTNeoXForCausalLM", "GlmForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM",
    "OlmoForCausalLM", "PhiForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM",
    "VaultGemmaForCausalLM",
})  # fmt: skip
"""Architectures whose embeddings adapters may change; of the first set also the head."""
_PACKED_EXPERTS: Final = frozenset({
    "GptOssForCausalLM", "InternS1ProForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration",
})  # fmt: skip
"""Architectures whose experts are one packed tensor, as adapters of packed experts expect."""
_QUANTISED: Final = frozenset({
    "auto_awq", "auto_gptq", "awq", "awq_marlin", "compressed-tensors", "deepseek_v4_fp8",
    "experts_int8", "fbgemm_fp8", "fp8", "fp_quant", "gpt_oss_mxfp4", "gptq", "gptq_marlin", "humming", "inc",
    "modelopt", "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8", "moe_wna16", "mxfp4", "quark", "torchao",
})  # fmt: skip
"""Values of quant_method that checkpoints may have."""

_PAIR: Final = re.compile(r"(?:^|.*\.)(?:lora_[AB]\.weight|lora_embedding_[AB])")
_HEAD: Final = re.compile(r"(?:^|.*\.)(?:score|classifier)\.(?:weight|bias)")
_IGNORED: Final = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_INFIX: Final = re.compile(r".*\.lora_(?:[AB]|embedding_[AB])\.(?!weight$|bias$)[^.]+(?:\.weight)?")
_EXPERT: Final = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_TOWER: Final = re.compile(
    r"(?:^|\.)(?:visual|vision_tower|vision_model|vision_encoder|audio_tower|multi_modal_projector|connector)\."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One rule that an adapter meets."""

    code: str
    effect: Effect
    what: str
    names: tuple[str, ...] = ()
    """The tensors, modules or keys that it is about."""
    why: str = ""
    fix: str = ""
    command: tuple[str, ...] = ()
    """What to run; OUT, and BASE where the base was not named, are for the user to fill in."""
    stays_adapter: bool = False
    """Whether what the command makes is an adapter."""

    def as_json(self) -> dict[str, Any]:
        return {
            "code": self.code, "effect": self.effect, "what": self.what, "names": list(self.names), "why": self.why,
            "fix": self.fix, "command": list(self.command),
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What an engine makes of a source."""

    verdict: Verdict
    max_lora_rank: int | None = None
    """The smallest legal --max-lora-rank; None of a model, and of ranks above all of them."""
    findings: tuple[Finding, ...] = ()
    base: str | None = None
    """The base that the adapter was held against; None where nothing was said of it."""

    def as_json(self) -> dict[str, Any]:
        return {
            "engine": "vllm", "version": VLLM, "verdict": self.verdict, "max_lora_rank": self.max_lora_rank,
            "base": self.base, "findings": [finding.as_json() for finding in self.findings],
        }  # fmt: skip


def for_vllm(catalog: Catalog, base: Catalog | None = None) -> Serving:
    """What vLLM makes of an adapter, or of a model. With the adapter's base at hand, names and sizes are compared."""
    if catalog.kind != "adapter":
        return Serving(verdict="model", findings=tuple(_quantised(catalog)))
    adapter = _Adapter(catalog, base)
    found = tuple(finding for rule in RULES for finding in rule(adapter))
    rank = _rank(adapter)
    fits = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    return Serving(
        verdict=_verdict(found), max_lora_rank=fits, findings=found, base=None if base is None else base.reference
    )


def _verdict(found: Sequence[Finding]) -> Verdict:
    wrong = [finding for finding in found if finding.effect != "setting"]
    if not wrong:
        return "served"
    return "served after a change" if all(finding.stays_adapter for finding in wrong) else "refused"


@dataclass(frozen=True, slots=True)
class _Adapter:
    catalog: Catalog
    base: Catalog | None

    @property
    def config(self) -> Mapping[str, Any]:
        return self.catalog.config

    @property
    def architecture(self) -> str | None:
        """The base's, where it is known."""
        named = (self.base.config.get("architectures") if self.base is not None else None) or ()
        return str(named[0]) if named else None

    @property
    def multimodal(self) -> bool:
        return self.base is not None and isinstance(self.base.config.get("text_config"), Mapping)

    def paths(self) -> dict[str, list[str]]:
        """Module path → its stored tensors, as the engine parses names."""
        found: dict[str, list[str]] = {}
        for name in self.catalog.tensors:
            if _PAIR.fullmatch(name):
                path = name.replace("base_model.model.", "").removesuffix(".weight").rpartition(".")[0]
                found.setdefault(path, []).append(name)
        return found

    # ---- what to do about it

    @property
    def named_base(self) -> str:
        return "BASE" if self.base is None else self.base.reference

    def fold(self) -> tuple[str, ...]:
        return ("raymerge", "fold", self.catalog.reference, "-o", "OUT", "--base", self.named_base)

    def again(self, rank: int | None = None) -> tuple[str, ...]:
        """A merge of it alone: written afresh, or as the best plain LoRA of a rank."""
        store = () if rank is None else ("--base", self.named_base, "--set", f"output.store={{svd: {{rank: {rank}}}}}")
        return ("raymerge", "merge", self.catalog.reference, "-o", "OUT", *store)


Rule = Callable[[_Adapter], Iterator[Finding]]


# ---------------------------------------------------------------------------------------------- what the config says


def _spelled_otherwise(a: _Adapter) -> Iterator[Finding]:
    if a.catalog.spelling != "peft":
        yield Finding(
            code="spelling", effect="refused", what=f"its tensors have {a.catalog.spelling}'s names, without a config",
            why="adapters of PEFT are read, with adapter_config.json", fix="serve it with an engine for images",
        )  # fmt: skip


def _other_tuner(a: _Adapter) -> Iterator[Finding]:
    kind = a.config.get("peft_type")
    if kind == "LORA":
        return
    dense = not a.catalog.problems and all(m.layer == "linear" for m in a.catalog.modules.values())
    yield Finding(
        code="tuner", effect="refused", what=f"it is {kind}, and LoRA alone is served",
        fix="store it as the best LoRA of a rank" if dense else "fold it into the model",
        command=a.again(VLLM_RANK) if dense else () if a.catalog.problems else a.fold(), stays_adapter=dense,
    )  # fmt: skip


def _lacking_keys(a: _Adapter) -> Iterator[Finding]:
    lacking = [key for key in ("r", "lora_alpha", "target_modules") if key not in a.config]
    if lacking and a.config.get("peft_type") == "LORA" and a.catalog.spelling == "peft":
        yield Finding(
            code="config-keys", effect="refused", what=f"adapter_config.json lacks {', '.join(lacking)}",
            names=tuple(lacking), why="the engine has no defaults for them", fix="write it afresh", command=a.again(),
            stays_adapter=True,
        )  # fmt: skip


def _dora(a: _Adapter) -> Iterator[Finding]:
    if a.config.get("use_dora"):
        yield Finding(
            code="dora", effect="refused", what="it is a DoRA", names=("use_dora",),
            why="the engine adds B·A and knows no magnitudes", fix="store it as the best plain LoRA of a rank",
            command=a.again(VLLM_RANK), stays_adapter=True,
        )  # fmt: skip


def _bias(a: _Adapter) -> Iterator[Finding]:
    said = tuple(key for key in ("bias", "lora_bias") if a.config.get(key, "none") not in ("none", False, None))
    if said:
        yield Finding(
            code="bias", effect="refused", what="it has biases", names=said, why="no adapter's bias is added",
            fix="fold it into the model", command=a.fold(),
        )  # fmt: skip


def _initialisation(a: _Adapter) -> Iterator[Finding]:
    init = a.config.get("init_lora_weights", True)
    if not isinstance(init, str):
        return
    if init.lower() not in _VLLM_INITS:
        recomputed = init.lower() in {"pissa", "olora"}
        plain = any(module.tuner == "lora" for module in a.catalog.modules.values())
        yield Finding(
            code="initialisation", effect="refused", what=f"it began as {init}, which changed the base",
            names=("init_lora_weights",), why="its factors are relative to a base that is not the one served",
            fix="store what it adds to the original base as a plain LoRA"
            + ("" if recomputed or plain else "; a manifest says with `initial` what it began with"),
            command=a.again(VLLM_RANK) if recomputed or plain else (), stays_adapter=True,
        )  # fmt: skip
    elif init.lower() == "lora_ga":
        yield Finding(
            code="initialisation", effect="changed", what="it began as lora_ga, and is served as if it had not",
            names=("init_lora_weights",), why="training took the first factors from the base; loaders do not",
            fix="store what it adds to the original base; a manifest says with `initial` what it began with",
            stays_adapter=True,
        )  # fmt: skip


def _saved_modules(a: _Adapter) -> Iterator[Finding]:
    saved = [str(name) for name in a.config.get("modules_to_save") or ()]
    others = tuple(name for name in saved if name not in _VLLM_HEADS)
    if others:
        yield Finding(
            code="modules-to-save", effect="refused", what=f"it saves {', '.join(others)} whole", names=others,
            why="only classifier and score may be", fix="fold it into the model", command=a.fold(),
        )  # fmt: skip
    heads = {parts[-2] for name in a.catalog.tensors if len(parts := name.split(".")) > 1 and _HEAD.fullmatch(name)}
    if len(heads & set(saved)) > 1:
        yield Finding(
            code="two-heads", effect="refused", what="it saves two heads whole", names=tuple(sorted(heads)),
            why="one classification head is served an adapter", fix="fold it into the model", command=a.fold(),
        )  # fmt: skip


def _copied_layers(a: _Adapter) -> Iterator[Finding]:
    if a.config.get("layer_replication"):
        yield Finding(
            code="layer-replication", effect="refused", what="it was trained on copies of layers",
            names=("layer_replication",), why="the engine has each layer once",
            fix="fold it into the model, which gets the layers written out", command=a.fold(),
        )  # fmt: skip


_UNSERVED: Final = {
    "alora_invocation_tokens": "Activated LoRA", "use_bdlora": "block-diagonal LoRA", "use_qalora": "QALoRA",
}  # fmt: skip


def _unserved_kinds(a: _Adapter) -> Iterator[Finding]:
    for key, name in _UNSERVED.items():
        if a.config.get(key):
            yield Finding(
                code="kind", effect="refused", what=f"it is {name}", names=(key,),
                why="what it does is no fixed change of the weights, or is not stored as one",
                fix="serve it with PEFT",
            )  # fmt: skip
    if a.config.get("arrow_config"):
        yield Finding(
            code="kind", effect="changed", what="it routes between experts, and is served without",
            names=("arrow_config",), why="the engine does not read arrow_config", fix="serve it with PEFT",
        )  # fmt: skip


def _rank(a: _Adapter) -> int:
    """What the engine compares: the config's ranks, and those of the tensors themselves."""
    patterns = a.config.get("rank_pattern") or {}
    said = [a.config.get("r"), *(patterns.values() if isinstance(patterns, Mapping) else ())]
    held = [module.rank for module in a.catalog.modules.values()]
    return max([*(value for value in said if isinstance(value, int)), *held], default=0)


def _ranks(a: _Adapter) -> Iterator[Finding]:
    rank = _rank(a)
    fits = next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)
    if fits is None:
        yield Finding(
            code="rank", effect="refused", what=f"its rank is {rank}, and {VLLM_RANKS[-1]} is the largest",
            fix="store it at a lower rank", command=a.again(VLLM_RANK), stays_adapter=True,
        )  # fmt: skip
    elif fits > VLLM_RANK:
        yield Finding(
            code="rank", effect="setting", what=f"rank {rank} needs --max-lora-rank {fits}",
            why=f"the default is {VLLM_RANK}, and what is allowed is {', '.join(map(str, VLLM_RANKS))}",
            fix="start the engine so, or store it at rank 16", command=a.again(VLLM_RANK), stays_adapter=True,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- what the tensors say


def _unread_names(a: _Adapter) -> Iterator[Finding]:
    """Names that the engine's parser ends at."""
    if a.catalog.spelling != "peft" or a.config.get("peft_type") != "LORA":
        return
    kinds: dict[str, list[str]] = {}
    for name in a.catalog.tensors:
        if _PAIR.fullmatch(name) or _HEAD.fullmatch(name) or name.endswith(_IGNORED):
            continue
        kinds.setdefault(_kind(name), []).append(name)
    # What another rule tells in better words is not told twice.
    if a.config.get("use_dora"):
        kinds.pop("magnitudes", None)
    if a.config.get("bias", "none") != "none" or a.config.get("lora_bias"):
        kinds.pop("biases", None)
    whole = tuple(f".{name}." for name in a.config.get("modules_to_save") or ())
    for kind, names in sorted(kinds.items()):
        told = [n for n in names if not (kind == "saved" and any(w in f".{n}." for w in whole))]
        if not told:
            continue
        renamed = kind == "infix"
        yield Finding(
            code=f"names-{kind}", effect="refused", what=f"{len(told)} tensors are {_KINDS[kind]}",
            names=tuple(sorted(told)), why="the engine reads lora_A.weight, lora_B.weight and lora_embedding_A, _B",
            fix="write it afresh, under the names that PEFT saves" if renamed else "fold it into the model",
            command=a.again() if renamed else a.fold(), stays_adapter=renamed,
        )  # fmt: skip


_KINDS: Final = {
    "tokens": "trained tokens", "magnitudes": "magnitudes of DoRA", "biases": "biases",
    "infix": "named with the adapter's name inside", "saved": "weights saved whole", "other": "no part of a LoRA",
}  # fmt: skip


def _kind(name: str) -> str:
    if "trainable_tokens" in name:
        return "tokens"
    if "lora_magnitude_vector" in name:
        return "magnitudes"
    if _INFIX.fullmatch(name):
        return "infix"
    if name.endswith(".bias"):
        return "biases"
    return "saved" if name.endswith(".weight") and ".lora_" not in name else "other"


def _ignored_embeddings(a: _Adapter) -> Iterator[Finding]:
    names = tuple(sorted(name for name in a.catalog.tensors if name.endswith(_IGNORED)))
    if names:
        yield Finding(
            code="embeddings", effect="ignored", what="the embeddings saved beside the adapter are not loaded",
            names=names, why="the engine skips them without a word and keeps the base's, which know no added token",
            fix="fold it into the model", command=a.fold(),
        )  # fmt: skip


def _other_layers(a: _Adapter) -> Iterator[Finding]:
    paths = a.paths()
    attention = {path for path in paths if f"{path}.base_layer.out_proj" in paths}  # torch's MultiheadAttention
    conv = {m.module for m in a.catalog.modules.values() if m.rank and m.layer == "conv"}
    if (attention or conv) and a.config.get("peft_type") == "LORA":
        yield Finding(
            code="layers", effect="refused", what="it changes convolutions or torch's MultiheadAttention",
            names=tuple(sorted(attention | conv)), why="linear layers and embeddings are served",
            fix="fold it into the model", command=a.fold(),
        )  # fmt: skip


def _experts(a: _Adapter) -> Iterator[Finding]:
    """An expert a module: every expert of a layer, with every projection, each projection at one rank."""
    layers: dict[str, dict[int, dict[str, int]]] = {}
    for path, names in a.paths().items():
        if found := _EXPERT.fullmatch(path):
            rank = max(a.catalog.tensors[n].spec.shape[0] for n in names if n.endswith("lora_A.weight"))
            layers.setdefault(found[1], {}).setdefault(int(found[2]), {})[_projection(found[3])] = rank
    count, kinds = _expert_count(a), _projections(a)
    partly = []
    for layer, experts in layers.items():
        whole = set(experts) >= set(range(count or max(experts) + 1)) and all(set(p) == kinds for p in experts.values())
        if not whole or any(len({p[kind] for p in experts.values()}) > 1 for kind in kinds):
            partly.append(layer)
    if partly:
        yield Finding(
            code="experts", effect="refused", what="some experts of a layer are adapted and some are not, or unlike",
            names=tuple(sorted(partly)),
            why="the engine runs a layer's experts as one: every projection of all, at one rank",
            fix="fold it into the model", command=a.fold(),
        )  # fmt: skip


def _projection(name: str) -> str:
    return {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(name, name)


def _projections(a: _Adapter) -> set[str]:
    """What an expert has: of a base that holds experts one by one its own, else the usual three."""
    names = () if a.base is None else a.base.tensors
    own = {_projection(found[3]) for name in names if (found := _EXPERT.fullmatch(name.removesuffix(".weight")))}
    return own or {"gate_proj", "up_proj", "down_proj"}


def _expert_count(a: _Adapter) -> int:
    config = {} if a.base is None else a.base.config
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return 0


def _packed_experts(a: _Adapter) -> Iterator[Finding]:
    paths = [path for path in a.paths() if path.endswith((".experts", ".experts.base_layer"))]
    if not paths:
        return
    layers = {path.removesuffix(".base_layer") for path in paths}
    partly = tuple(sorted(layer for layer in layers if not {layer, f"{layer}.base_layer"} <= set(paths)))
    if partly:
        yield Finding(
            code="packed-experts", effect="refused", what="one of the two packed tensors of experts is adapted",
            names=partly, why="the engine takes gate_up_proj and down_proj together", fix="fold it into the model",
            command=a.fold(),
        )  # fmt: skip
    elif a.architecture not in _PACKED_EXPERTS:
        known = a.architecture is not None
        yield Finding(
            code="packed-experts", effect="setting",
            what="packed experts need --enable-mixed-moe-lora-format, and is_3d_lora_weight with each request"
            + ("" if known else ", unless the base's experts are packed in the engine too"),
            names=tuple(sorted(layers)), why=", ".join(sorted(_PACKED_EXPERTS)) + " take them as they are",
            fix="start the engine so, or fold it into the model", command=a.fold(),
        )  # fmt: skip


def _embeddings(a: _Adapter) -> Iterator[Finding]:
    """Adapted embeddings and heads: served by some architectures."""
    ends = {"embed_tokens": _EMBEDDINGS_AND_HEAD | _EMBEDDINGS, "lm_head": _EMBEDDINGS_AND_HEAD}
    for path, names in sorted(a.paths().items()):
        leaf = path.rpartition(".")[2]
        if leaf not in ends and not any("lora_embedding" in name for name in names):
            continue
        served = ends.get(leaf, frozenset())
        if a.architecture is None and served:
            yield Finding(
                code="vocabulary", effect="setting", what=f"{path} is served by some architectures only",
                names=tuple(names), why=f"{', '.join(sorted(served)[:6])} and others; not by Qwen2 or Gemma",
                fix="name the base with --base to know, or fold it into the model", command=a.fold(),
            )  # fmt: skip
        elif a.architecture not in served:
            yield Finding(
                code="vocabulary", effect="refused", what=f"{path} is not served with adapters",
                names=tuple(names), why=f"{a.architecture} takes none there", fix="fold it into the model",
                command=a.fold(),
            )  # fmt: skip
        elif (wrong := _vocabulary(a, names)) is not None:
            yield Finding(
                code="vocabulary", effect="refused", what=f"{path} is for {wrong} tokens, not as many as the base's",
                names=tuple(names), why="the engine compares it with vocab_size", fix="fold it into the model",
                command=a.fold(),
            )  # fmt: skip


def _vocabulary(a: _Adapter, names: Sequence[str]) -> int | None:
    """The tokens that embeddings' factors are for, where they are not the base's."""
    size = None if a.base is None else a.base.config.get("vocab_size")
    for name in names:
        if name.endswith("lora_embedding_A") and isinstance(size, int):
            tokens = a.catalog.tensors[name].spec.shape[1]
            return tokens if tokens != size else None
    return None


# ------------------------------------------------------------------------------------------------ what the base says


def _architecture(a: _Adapter) -> Iterator[Finding]:
    if a.architecture in _NO_LORA:
        yield Finding(
            code="architecture", effect="refused", what=f"{a.architecture} is served without adapters",
            why="its class does not support LoRA", fix="fold it into the model", command=a.fold(),
        )  # fmt: skip
    size = None if a.base is None else a.base.config.get("vocab_size")
    if a.architecture in _EMBEDDINGS_AND_HEAD and isinstance(size, int) and size > _VLLM_VOCABULARY:
        yield Finding(
            code="vocabulary-size", effect="refused", what=f"the base has {size} tokens",
            why=f"an engine with adapters starts with {_VLLM_VOCABULARY} at most", fix="fold it into the model",
            command=a.fold(),
        )  # fmt: skip


def _modules(a: _Adapter) -> Iterator[Finding]:
    """Modules that the base has not: of a known ending they are passed over without a word, else refused."""
    if a.base is None or a.multimodal:
        return
    held = {name.rpartition(".")[0] for name in a.base.tensors} | set(a.base.tensors)
    if not any(name.startswith("model.") for name in held):  # files of a bare stack, which the engine puts under a head
        held |= {f"model.{name}" for name in held}
    if a.base.tied and any(name.endswith("embed_tokens") for name in held):
        held.add("lm_head")
    endings = {path.rpartition(".")[2] for path in held}
    lost = [path for path in a.paths() if path.removesuffix(".base_layer") not in held]
    roots = _expert_roots(held)
    lost = [path for path in lost if _experts_of(path) not in roots]
    for effect in ("ignored", "refused"):
        names = tuple(sorted(p for p in lost if (p.rpartition(".")[2] in endings) == (effect == "ignored")))
        if names:
            yield Finding(
                code="modules", effect="ignored" if effect == "ignored" else "refused",
                what=f"{len(names)} modules are none of the base's: {names[0]}", names=names,
                why="they find no layer, and the base answers in their place" if effect == "ignored"
                else "the engine knows no layer that is called so",
                fix="check that this is the adapter's base; a fold finds modules that were moved", command=a.fold(),
            )  # fmt: skip


def _expert_roots(held: set[str]) -> set[str]:
    """Where the base keeps experts, packed or one by one."""
    one_by_one = {found[1] for path in held if (found := _EXPERT.fullmatch(path))}
    return one_by_one | {path for path in held if path.endswith(".experts")}


def _experts_of(path: str) -> str | None:
    """Where the experts lie that a path is of, packed or one by one."""
    found = _EXPERT.fullmatch(path)
    return (
        found[1] if found else path.removesuffix(".base_layer") if path.endswith((".experts", ".base_layer")) else None
    )


def _towers(a: _Adapter) -> Iterator[Finding]:
    names = tuple(sorted(path for path in a.paths() if _TOWER.search(f"{path}.")))
    if names and (a.base is None or a.multimodal):
        yield Finding(
            code="towers", effect="ignored", what="what it changes in a vision or audio tower is passed over",
            names=names, why="adapters are for the language model, unless the engine is started with "
            "--enable-tower-connector-lora, which some models support", fix="start it so, or fold it into the model",
            command=a.fold(),
        )  # fmt: skip


def _quantised(catalog: Catalog) -> Iterator[Finding]:
    scheme = catalog.config.get("quantization_config")
    method = scheme.get("quant_method") if isinstance(scheme, Mapping) else None
    if isinstance(method, str) and method not in _QUANTISED:
        yield Finding(
            code="quantisation", effect="refused", what=f"its weights are quantised by {method}",
            why="the engine reads other schemes, unless a plugin of its own brings this one",
            fix="merge it with output.quantization: none, where raymerge reads it",
        )  # fmt: skip


RULES: Final[tuple[Rule, ...]] = (
    _spelled_otherwise, _other_tuner, _lacking_keys, _dora, _bias, _initialisation, _saved_modules, _copied_layers,
    _unserved_kinds, _ranks, _unread_names, _ignored_embeddings, _other_layers, _experts, _packed_experts, _embeddings,
    _architecture, _modules, _towers,
)  # fmt: skip
"""Every rule. Packed q, k, v or gate, up that are adapted in part, rsLoRA, patterns, dtypes, and target_modules that
name more than the file holds are served as PEFT computes them, and so have none."""
