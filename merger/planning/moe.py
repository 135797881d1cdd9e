"""`experts:`: a mixture of experts from dense models: the feed-forward layers of each become an expert, all else is the
base's. Nothing is merged: tensors are copied (or cast once), gates are random or made from prompts before the run.

Which output a file asks for follows mergekit-moe; names on disk are those under which the architecture's own
checkpoints are published.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from merger.catalog import Catalog, StoredTensor
from merger.errors import PlanError, Problem, RefusedError
from merger.formats.prompts import encode_prompts
from merger.formats.token_tensors import EMBEDDINGS
from merger.generated import GivenStore, RandomTensor, add_random, random_catalog
from merger.kernels.hashing import element_key
from merger.manifest import Expert, Manifest
from merger.manifest.grammar import PROMPTED
from merger.methods import METHODS
from merger.methods.rounds import Call
from merger.planning.calls import natural_key
from merger.planning.drafts import Draft, Segment, copied
from merger.planning.inputs import MergeInput, SourceTable, model_input
from merger.planning.model import ModelPlanner
from merger.planning.model_files import model_config
from merger.planning.nouns import DenseTerm, Entry, GateRecipe, Output, Prompts, Source, Task, Term
from merger.planning.requantise import Requantised
from merger.planning.tokens import Member, plan_tokens
from merger.tensors import F32, DType, TensorSpec

_MLP: Final = re.compile(r"(.*\.layers\.(\d+)\.mlp\.)(gate_proj|up_proj|down_proj)(\.weight)")
_PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture of the output."""

    name: str
    """As mergekit-moe has it: what `architecture` is the start of."""
    model_type: str
    class_name: str
    bases: frozenset[str]
    """Model types of what it can be made from."""
    shared: Literal["none", "optional", "required"] = "none"
    shared_gates: bool = False
    block: str = "mlp"
    """What holds the experts in a layer."""
    projections: tuple[str, ...] = _PROJECTIONS
    shared_block: str = ""
    biases: frozenset[str] = frozenset()
    """Tensors of a layer that may have a bias."""


_ATTENTION: Final = frozenset({"q_proj", "k_proj", "v_proj"})
FAMILIES: Final = (
    Family(name="Mixtral", model_type="mixtral", class_name="MixtralForCausalLM",
           bases=frozenset({"llama", "mistral"}), block="block_sparse_moe", projections=("w1", "w3", "w2")),
    Family(name="DeepSeek MoE", model_type="deepseek", class_name="DeepseekForCausalLM",
           bases=frozenset({"llama", "mistral"}), shared="optional", shared_block="shared_experts",
           biases=_ATTENTION | {"o_proj"}),
    Family(name="Qwen MoE", model_type="qwen2_moe", class_name="Qwen2MoeForCausalLM",
           bases=frozenset({"llama", "mistral", "qwen2"}), shared="required", shared_gates=True,
           shared_block="shared_expert", biases=_ATTENTION),
    Family(name="Qwen3 MoE", model_type="qwen3_moe", class_name="Qwen3MoeForCausalLM", bases=frozenset({"qwen3"}),
           biases=_ATTENTION | {"o_proj"}),
)  # fmt: skip

_ALIKE: Final[Mapping[str, Any]] = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu", "initializer_range": 0.02,
    "rms_norm_eps": 1e-6, "attention_dropout": 0.0, "tie_word_embeddings": False, "use_cache": True,
}  # fmt: skip
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": {**_ALIKE, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {**_ALIKE, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
                "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {**_ALIKE, "max_position_embeddings": 32768},
    "qwen3": {**_ALIKE, "num_key_value_heads": 32, "max_position_embeddings": 32768},
}  # fmt: skip
"""What a config means that leaves a key out: the output's architecture may mean something else by its absence."""
_DROPPED: Final = frozenset({"pretraining_tp", "mlp_bias", "auto_map", "_name_or_path"})
_DEEPSEEK_CODE: Final = "deepseek-ai/deepseek-moe-16b-base--"


class MoePlanner(ModelPlanner):
    """Plans the assembly. `segments` holds the experts and the base; the shared expert comes last."""

    family: Family
    gates: GateRecipe | None

    def __init__(self, manifest: Manifest, table: SourceTable, base: MergeInput) -> None:
        entries = (*(manifest.experts or ()), *(manifest.shared_experts or ()))
        sources = tuple(model_input(table, e.source_model, {}, i) for i, e in enumerate(entries))
        assert base.model is not None
        super().__init__(manifest, table, (Segment(sources, base, (), 0, 1 << 30),), base.model, keep_files=False)
        count = len(manifest.experts or ())
        self.base = base
        self.experts = tuple(zip(entries[:count], sources[:count], strict=True))
        self.shared = tuple(zip(entries[count:], sources[count:], strict=True))
        self.gates = None
        self.mode = manifest.gate_mode or "hidden"
        self._random_source = -1
        self._widths: dict[str, int] = {}

    def plan(self, output: int, path: str) -> tuple[Output, list[Task]]:
        nothing: tuple[Output, list[Task]] = Output(path, "model", ()), []
        self._check_sources(METHODS["linear"])
        # Heads and rotary positions are the base's alone: experts that were trained with others are remarked on.
        differing = [problem for problem in self.problems if problem.code == "settings-differ"]
        self.warnings += [replace(p, why="experts take none of it: the output has its base's") for p in differing]
        self.problems = [problem for problem in self.problems if problem not in differing]
        if self.problems:
            return nothing
        family = self._family()
        if family is None:
            return nothing
        self.family = family
        self._plan_tokens()
        self._check_models()
        tensors = [] if self.problems else self._tensors()
        self._check_landed()
        if self.problems:
            return nothing
        if len(self.experts) & (len(self.experts) - 1):
            self.warnings.append(
                Problem("experts", f"{len(self.experts)} experts are no power of two", "experts",
                        "llama.cpp cannot load such a model", "nothing, if it is for other engines")
            )  # fmt: skip
        ordered = sorted(tensors, key=lambda t: natural_key(t.spec.name))
        return self._lay_out(output, path, ordered, Requantised("none"))

    def _plan_tokens(self) -> None:
        """The tokenizer is the base's; a chat template may be named."""
        key = self.table.sources[self.donor].key
        self.tokens.plan = plan_tokens(self.manifest, self.table.inputs, [Member(key, key)], key)
        self.warnings += self.tokens.plan.warnings

    # ------------------------------------------------------------ which architecture

    def _family(self) -> Family | None:
        """The first that fits, as mergekit-moe chooses."""
        asked = (self.manifest.architecture or "").lower()
        named = [family for family in FAMILIES if family.name.lower().startswith(asked)]
        if not named:
            self._problem(
                "bad-value", f"{self.manifest.architecture!r} is no architecture of experts", "architecture", "",
                f"write the start of {', '.join(family.name for family in FAMILIES)}",
            )  # fmt: skip
            return None
        reasons = {family.name: self._why_not(family) for family in named}
        for family in named:
            if not reasons[family.name]:
                return family
        self._problem(
            "bad-architecture", "no architecture of experts fits these models", "architecture",
            "; ".join(f"{name}: {why}" for name, why in reasons.items()), "change what is named, or shared_experts",
        )  # fmt: skip
        return None

    def _why_not(self, family: Family) -> str:
        kind = self._config_of(self.base).get("model_type")
        shared = [entry for entry, _ in self.shared]
        if kind not in family.bases:
            return f"made from {' or '.join(sorted(family.bases))}, not {kind}"
        if family.shared == "none" and shared:
            return "it has no shared experts"
        if len(shared) > 1 or (family.shared == "required" and not shared):
            return "it has exactly one shared expert" if family.shared == "required" else "it has one shared expert"
        prompted = any(entry.positive_prompts for entry in shared)
        if shared and not family.shared_gates and prompted:
            return "its shared expert has no gate, so no prompts"
        if shared and family.shared_gates and not prompted and self.mode in PROMPTED:
            return "its shared expert has a gate, and needs prompts"
        return ""

    def _config_of(self, source: MergeInput) -> dict[str, Any]:
        assert source.model is not None
        return self.table.catalog(source.model).config

    def _setting(self, source: MergeInput, key: str) -> Any:
        config = self._config_of(source)
        value = config.get(key)
        return _DEFAULTS.get(str(config.get("model_type")), {}).get(key) if value is None else value

    def _check_models(self) -> None:
        layers = self._mlp_layers(self.base)
        for _, source in (*self.experts, *self.shared):
            own = self._mlp_layers(source)
            if own != layers:
                self._problem(
                    "layers-differ", f"{source.label} has {len(own)} feed-forward layers, the base {len(layers)}",
                    source.label, "layer by layer, experts stand side by side", "use models of equal depth",
                )  # fmt: skip
            if self._setting(source, "hidden_act") != self._setting(self.base, "hidden_act"):
                self._problem(
                    "conflict", f"{source.label} has another hidden_act than the base", source.label,
                    "the output has one activation", "use models of one activation",
                )  # fmt: skip
        if not layers:
            self._problem("no-layers", f"{self.base.label} has no feed-forward layers of the usual names",
                          self.base.label, "layers.N.mlp.gate_proj, up_proj and down_proj are looked for")  # fmt: skip

    def _mlp_layers(self, source: MergeInput) -> set[int]:
        assert source.model is not None
        found = (_MLP.fullmatch(name) for name in self.table.catalog(source.model).tensors)
        return {int(match[2]) for match in found if match}

    # ------------------------------------------------------------ tensors

    def _tensors(self) -> list[Draft]:
        assert self.base.model is not None
        made: list[Draft] = []
        layers: dict[int, tuple[str, DType]] = {}
        names = sorted(self.table.catalog(self.base.model).tensors, key=natural_key)
        self._check_places(names)
        for name in names:
            found = _MLP.fullmatch(name)
            try:
                if found is None:
                    made.append(self._of_base(name))
                    continue
                experts = self._of_experts(name, found)
                made += experts
                layers[int(found[2])] = found[1].removesuffix("mlp."), experts[0].spec.dtype
            except RefusedError as error:
                self.problems += [p for p in error.problems if p not in self.problems]
        if self.problems:
            return []
        if self.family.model_type == "qwen2_moe":
            made += self._missing_biases({tensor.spec.name: tensor for tensor in made})
        return made + self._gates([layers[number] for number in sorted(layers)])

    def _check_places(self, names: Sequence[str]) -> None:
        """Every tensor of the base must mean something to the output's layers."""
        strange = []
        for name in names:
            own = name.rpartition(".")[0].rpartition(".")[2]
            if _MLP.fullmatch(name) is None and (
                ".mlp." in name or (name.endswith(".bias") and own not in self.family.biases)
            ):
                strange.append(name)
        if strange:
            self._problem(
                "no-place", f"{self.family.name} has no place for {len(strange)} tensors of the base",
                ", ".join(strange[:4]) + (", …" if len(strange) > 4 else ""),
                "its layers have no such tensors, and leaving them out would change what the model computes",
                "use a base without them, or another architecture",
            )  # fmt: skip

    def _of_base(self, name: str) -> Draft:
        operand = self._operand(self.base, name, self.segments[0])
        shape, floats = self._check_shapes(name, [(self.base, operand)])
        return self._passed(name, shape, operand, self._dtype([operand])) if floats else copied(self.table,
            name, shape, [operand]
        )  # fmt: skip

    def _of_experts(self, name: str, found: re.Match[str]) -> list[Draft]:
        """One tensor of a layer's feed-forward block: that of every expert, and of the shared one."""
        prefix, projection = found[1].removesuffix("mlp."), found[3]
        named = self.family.projections[_PROJECTIONS.index(projection)]
        operands = [(source, self._operand(source, name, self.segments[0])) for _, source in self.experts]
        shape, _ = self._check_shapes(name, operands)
        self._check_width(name, shape)
        self._widths["expert"] = self._width(projection, shape)
        dtype = self._dtype([operand for _, operand in operands])
        made = []
        for number, ((entry, _), (_, operand)) in enumerate(zip(self.experts, operands, strict=True)):
            target = f"{prefix}{self.family.block}.experts.{number}.{named}.weight"
            made.append(self._expert(entry, target, shape, operand, projection, dtype, number))
        for entry, source in self.shared:
            operand = self._operand(source, name, self.segments[0])
            own, _ = self._check_shapes(name, [(source, operand)])
            self._check_width(name, own)
            self._widths["shared"] = self._width(projection, own)
            target = f"{prefix}{self.family.block}.{self.family.shared_block}.{projection}.weight"
            made.append(
                self._expert(entry, target, own, operand, projection, self._dtype([operand]), len(self.experts))
            )
        return made

    @staticmethod
    def _width(projection: str, shape: tuple[int, ...]) -> int:
        return shape[1] if projection == "down_proj" else shape[0]

    def _check_width(self, name: str, shape: tuple[int, ...]) -> None:
        """The base and its experts must agree on the width of the residual stream."""
        assert self.base.model is not None
        own = self.table.catalog(self.base.model).tensors[name].spec.shape
        at = 0 if "down_proj" in name else 1
        if len(shape) != 2 or own[at] != shape[at]:
            raise PlanError.of(
                "shape-mismatch", f"{name} is {' × '.join(map(str, shape))} in an expert and "
                f"{' × '.join(map(str, own))} in the base", where=name, why="they are models of different widths",
                fix="use models of one width",
            )  # fmt: skip

    def _expert(
        self, entry: Expert, name: str, shape: tuple[int, ...], operand: tuple[Term, ...], projection: str,
        dtype: DType, position: int,
    ) -> Draft:  # fmt: skip
        scale = 1.0 if entry.residual_scale is None or projection != "down_proj" else entry.residual_scale
        if entry.noise_scale:
            key = element_key(self.manifest.seed, position, name, "noise")
            operand = (*operand, self._random(f"noise:{name}", shape, key, "normal", entry.noise_scale))
        elif scale == 1.0:
            return self._passed(name, shape, operand, dtype)
        call = Call(method="copy", combine="pass", weights=(1.0,), scale=scale)
        return self._rows(name, shape, None, (Entry(operand),), call, dtype)

    def _missing_biases(self, made: Mapping[str, Draft]) -> list[Draft]:
        """Qwen2-MoE always has biases at q, k and v: zero where the base has none."""
        found = []
        for name, tensor in made.items():
            stem, _, own = name.removesuffix(".weight").rpartition(".")
            bias = f"{stem}.{own}.bias"
            if own in _ATTENTION and bias not in made:
                call = Call(method="copy", combine="pass", weights=(1.0,))
                rows = tensor.spec.shape[0]
                found.append(self._rows(bias, (rows,), None, (Entry(()),), call, tensor.spec.dtype))
        return found

    # ------------------------------------------------------------ gates

    def _gates(self, layers: Sequence[tuple[str, DType]]) -> list[Draft]:
        embedding = self._embedding()
        if embedding is None:
            return []
        hidden = embedding.spec.cols
        gated_shared = self.family.shared_gates and bool(self.shared)
        names = tuple(
            (f"{prefix}{self.family.block}.gate.weight",
             f"{prefix}{self.family.block}.shared_expert_gate.weight" if gated_shared else "")
            for prefix, _ in layers
        )  # fmt: skip
        shapes = ((len(self.experts), hidden), (1, hidden))
        if self.mode in PROMPTED:
            self.gates = self._recipe(names, embedding, shapes)
            if self.gates is None:
                return []
        made = []
        for (_, dtype), pair in zip(layers, names, strict=True):
            for name, shape in zip(pair, shapes, strict=True):
                if not name:
                    continue
                if self.gates is not None:
                    term = DenseTerm(self.gates.source, name)
                else:
                    key = element_key(self.manifest.seed, 0, name, "gate")
                    uniform = self.mode == "uniform_random"
                    term = self._random(
                        name, shape, key, "uniform" if uniform else "normal", math.sqrt(1 / hidden) if uniform else 1.0
                    )
                call = Call(method="copy", combine="pass", weights=(1.0,))
                made.append(self._rows(name, shape, None, (Entry((term,)),), call, dtype))
        return made

    def _embedding(self) -> StoredTensor | None:
        assert self.base.model is not None
        held = self.table.catalog(self.base.model).tensors
        found = [name for name in held if name.endswith(EMBEDDINGS)]
        if len(found) != 1:
            self._problem("missing-tensor", f"{self.base.label} has {len(found)} embeddings", self.base.label)
            return None
        return held[found[0]]

    def _recipe(
        self, names: tuple[tuple[str, str], ...], embedding: StoredTensor, shapes: tuple[tuple[int, int], ...]
    ) -> GateRecipe | None:
        assert self.base.model is not None
        if self.mode == "random" or self.mode == "uniform_random":  # noqa: PLR1714 - narrows the type
            return None
        catalog = self.table.catalog(self.base.model)
        entries = [entry for entry, _ in self.experts]
        shared = [entry for entry, _ in self.shared] if names and names[0][1] else []
        try:
            prompts = [self._prompts(catalog, entry, embedding.spec.rows) for entry in (*entries, *shared)]
        except RefusedError as error:
            self.problems += error.problems
            return None
        source = len(self.table.sources)
        recipe = GateRecipe(
            mode=self.mode, base=self.base.model, base_adapters=self.base.adapters, embedding=embedding.spec.name,
            source=source, gates=names, experts=tuple(prompts[: len(entries)]), shared=tuple(prompts[len(entries) :]),
        )  # fmt: skip
        pin = "gates:" + hashlib.sha256(json.dumps([asdict(recipe), catalog.pins], sort_keys=True).encode()).hexdigest()
        specs = [
            TensorSpec(name, F32, shape)
            for pair in names
            for name, shape in zip(pair, shapes, strict=True)
            if name
        ]  # fmt: skip
        store = GivenStore(f"gates ({self.mode})", pin, {spec.name: spec.nbytes for spec in specs})
        self.table.sources.append(
            Source(
                f"gates ({self.mode})",
                Catalog(
                    reference=store.uri, kind="generated", store=store, pins={spec.name: pin for spec in specs},
                    tensors={spec.name: StoredTensor(spec, spec.name, 0) for spec in specs}, config={},
                ),
            )
        )  # fmt: skip
        return recipe

    def _prompts(self, catalog: Catalog, entry: Expert, rows: int) -> Prompts:
        found = Prompts(
            encode_prompts(catalog.store, entry.positive_prompts or ()),
            encode_prompts(catalog.store, entry.negative_prompts or ()),
        )
        for ids in (*found.positive, *found.negative):
            if not ids or max(ids) >= rows:
                raise PlanError.of(
                    "bad-prompt", "a prompt has no tokens" if not ids else
                    f"a prompt has the token {max(ids)}, and the embeddings have {rows} rows",
                    where=str(entry.source_model), why="gates are made from the tokens of prompts",
                    fix="write another prompt, or mend the base's tokenizer",
                )  # fmt: skip
        return found

    def _random(
        self, name: str, shape: tuple[int, ...], key: int, distribution: Literal["normal", "uniform"], scale: float
    ) -> DenseTerm:
        if self._random_source < 0:
            self._random_source = len(self.table.sources)
            self.table.sources.append(Source("random numbers", random_catalog(self.manifest.seed)))
        numel = math.prod(shape)
        add_random(self.table.catalog(self._random_source), name, shape, RandomTensor(key, distribution, scale, numel))
        return DenseTerm(self._random_source, name)

    # ------------------------------------------------------------ config

    def _config(self, donor: Catalog, specs: Sequence[TensorSpec], quantization: Mapping[str, Any] | None) -> bytes:
        expert = self._expert_config(donor, specs)
        return model_config(expert, specs, layers={}, untied=False, quantization=quantization)

    def _expert_config(self, donor: Catalog, specs: Sequence[TensorSpec]) -> dict[str, Any]:
        """The base's config as one of the output's architecture. Defaults of the base's are written out."""
        config = {key: value for key, value in donor.config.items() if key not in _DROPPED}
        family, kind = self.family, str(donor.config.get("model_type"))
        for key, value in _DEFAULTS[kind].items():
            config.setdefault(key, value)
        heads = config["num_attention_heads"]
        config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        if "rope_theta" not in config and "rope_parameters" not in config:
            config["rope_theta"] = 10000.0
        rows = next((s.shape[0] for s in specs if s.name.endswith("self_attn.q_proj.weight")), 0)
        if rows:
            config["head_dim"] = rows // heads
        experts, chosen = len(self.experts), self.manifest.experts_per_token or 2
        config |= {
            "architectures": [family.class_name], "model_type": family.model_type, "num_experts_per_tok": chosen,
            "intermediate_size": self._widths["expert"],
        }  # fmt: skip
        if family.model_type == "mixtral":
            config.pop("attention_bias", None)
            return {**config, "num_local_experts": experts}
        config["moe_intermediate_size"] = self._widths["expert"]
        config["norm_topk_prob"] = True
        if family.model_type == "deepseek":
            return config | {
                "n_routed_experts": experts, "n_shared_experts": len(self.shared) or None, "first_k_dense_replace": 0,
                "moe_layer_freq": 1, "scoring_func": "softmax", "attention_bias": config.get("attention_bias", False),
                "auto_map": {
                    "AutoConfig": f"{_DEEPSEEK_CODE}configuration_deepseek.DeepseekConfig",
                    "AutoModel": f"{_DEEPSEEK_CODE}modeling_deepseek.DeepseekModel",
                    "AutoModelForCausalLM": f"{_DEEPSEEK_CODE}modeling_deepseek.DeepseekForCausalLM",
                },
            }  # fmt: skip
        config |= {"num_experts": experts, "decoder_sparse_step": 1, "mlp_only_layers": []}
        if family.model_type == "qwen2_moe":
            config["shared_expert_intermediate_size"] = self._widths["shared"]
            if kind != "qwen2":
                config |= {"sliding_window": None, "use_sliding_window": False}
                config.pop("attention_bias", None)
        return config
