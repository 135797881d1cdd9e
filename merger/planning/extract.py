"""Models merged into an adapter: what they changed in the matrices of their layers becomes LoRA pairs.

What is no such matrix (norms, biases, embeddings, heads) has no pair. By default it must be equal to the base's, which
the run looks at before anything else; `modules_to_save: all` writes it whole, `drop` leaves it out and reports it.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from merger.adapters.bind import CONV1D_LAYERS, HEAD, Bound
from merger.adapters.declare import AdapterModule
from merger.errors import PlanError, RefusedError
from merger.formats import peft
from merger.manifest.grammar import TakeFrom
from merger.methods import MethodSpec
from merger.methods.rounds import Call, rounds_of
from merger.planning.adapter import WEIGHTS_FILE, factor_specs
from merger.planning.calls import CallBuilder
from merger.planning.drafts import Draft, Segment
from merger.planning.inputs import MergeInput
from merger.planning.layout import Layout, lay_out, literal
from merger.planning.linear import is_linear
from merger.planning.memory import extent_rows, tile_rows
from merger.planning.model import ModelPlanner
from merger.planning.nouns import DenseTerm, LowRankTerm, Output, OutputFile, Place, Result, StoreSpec, Task
from merger.planning.quantise import Quantised
from merger.planning.requantise import Requantised
from merger.planning.statistics import Statistics
from merger.tensors import TensorSpec

_EXPERTS: Final = re.compile(r"\.experts(\.|$)")
_BESIDE: Final = ".base_layer."
_LINEAR: Final = AdapterModule(module="", tuner="lora", layer="linear", changes=())
_TASKS: Final = (
    ("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"), ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"), ("ForQuestionAnswering", "QUESTION_ANS"),
)  # fmt: skip
"""How the names of architectures end, and what PEFT calls their tasks."""


@dataclass(slots=True)
class _Parts:
    """The merged tensors by what becomes of them."""

    pairs: list[tuple[Draft, StoreSpec, bool]] = field(default_factory=list)
    """With the store, and whether the tensor lies transposed."""
    wholes: list[Draft] = field(default_factory=list)
    left: list[tuple[Draft, Literal["equal", "left"]]] = field(default_factory=list)


class ExtractPlanner(ModelPlanner):
    """Plans `kind: adapter` of whole models. Problems are collected, not raised."""

    base_name: str | None = None
    """What the adapter's config calls its base."""

    def _check_sources(self, spec: MethodSpec) -> None:
        super()._check_sources(spec)
        wanted, manifest = self.manifest.output.modules_to_save, self.manifest
        if wanted == "average" or isinstance(wanted, TakeFrom):
            self._problem(
                "bad-value", "models hold every module whole, so none is chosen or averaged by itself",
                "output.modules_to_save", "what is no pair is merged by the method as all else",
                "write refuse, all or drop",
            )  # fmt: skip
        if manifest.tokenizer_source is not None or manifest.tokenizer is not None:
            self._problem(
                "conflict", "an adapter has the vocabulary of its base", "tokenizer_source",
                "its pairs are added to the base's rows",
                "leave tokenizer_source and tokenizer out, or use kind: model",
            )  # fmt: skip
        if manifest.output.store is not None and manifest.output.store.kind == "concat":
            self._problem(
                "bad-store", "what models changed cannot be stored as concat", "output.store",
                "only adapters have factors to join", "write {svd: {rank: 16}} or {svd: {energy: 0.95}}",
            )  # fmt: skip
        packed = next((name for name in sorted(self._held_by_sources()) if _EXPERTS.search(name)), None)
        if packed is not None:
            self._problem(
                "not-yet", "no adapter is made of models with experts yet", packed,
                "which of their matrices PEFT takes for layers hangs on how transformers packs them",
                "merge them into a model (kind: model)",
            )  # fmt: skip

    def _adapters_only(self, segment: Segment) -> bool:
        """linear works on deltas here, whatever the sources are: the weighted mean of what they changed."""
        return segment.base is not None

    def _owners(self, name: str, segment: Segment) -> list[tuple[MergeInput, int, Bound]]:
        owners = super()._owners(name, segment)
        if owners:
            raise PlanError.of(
                "modules-to-save", f"{owners[0][0].label} holds {name} whole", where="output.modules_to_save",
                why="a whole module of an adapter is no delta that can be merged with those of models",
                fix="fold that adapter into its base first, and merge the folded model",
            )  # fmt: skip
        return owners

    def _tensor(self, calls: CallBuilder, measured: Statistics, name: str, segment: Segment) -> Draft:
        tensor = super()._tensor(calls, measured, name, segment)
        if tensor.call.calibrate is not None:
            raise PlanError.of(
                "not-low-rank", "svc cannot calibrate what becomes an adapter of models", where="merge_method",
                why="it calibrates in the core of adapters, or whole tensors of a model",
                fix="use another method on deltas, or kind: model",
            )  # fmt: skip
        return tensor

    def _requantised(self, tensors: Sequence[Draft]) -> tuple[list[Draft], Requantised]:
        """Nothing of the base is written, so nothing is written as codes."""
        return list(tensors), Requantised("none")

    # ------------------------------------------------------------ pairs, whole modules, the rest

    def _lay_out(
        self, output: int, path: str, tensors: Sequence[Draft], requantised: Requantised | Quantised
    ) -> tuple[Output, list[Task]]:
        del requantised
        parts = self._sorted(tensors)
        if not parts.pairs and not self.problems:
            self._problem(
                "no-modules", "the models change no matrix of a layer", "models",
                "a LoRA holds linear layers, and theirs are the base's", "name models trained from the base",
            )  # fmt: skip
        if self.problems:
            return Output(path, "adapter", ()), []
        pairs = {
            _module(t): factor_specs(_module(t), _LINEAR, _shape(t, flipped), store.rank, t.spec.dtype)
            for t, store, flipped in parts.pairs
        }
        wholes = {t.spec.name: self._saved_specs(t, pairs) for t in parts.wholes}
        specs = [spec for found in (*pairs.values(), *wholes.values()) for spec in found]
        layout = lay_out(output, {WEIGHTS_FILE: specs})
        nowhere = Place(output, WEIGHTS_FILE, 0, 0, "left")  # takes no bytes
        tasks = self._check_tasks(output, WEIGHTS_FILE)
        tasks += [
            replace(t.task, results=(Result(t.call, StoreSpec(kind), (nowhere,)),)) for t, kind in parts.left
        ]  # fmt: skip
        tasks += [self._pair_task(layout, t, store, flipped=flipped) for t, store, flipped in parts.pairs]
        tasks += [
            replace(t.task, results=(Result(t.call, t.store, self._places(layout, t, wholes[t.spec.name]), t.space),))
            for t in parts.wholes
        ]  # fmt: skip
        config = self._adapter_config(parts, [spec.name for found in wholes.values() for spec in found])
        return Output(path, "adapter", (*layout.files, config)), tasks

    def _sorted(self, tensors: Sequence[Draft]) -> _Parts:
        """What becomes of each tensor. One that no source changes is the base's, and left to it."""
        parts = _Parts()
        for t in tensors:
            changed = t.task.base is not None
            if not changed and len(t.task.entries) < 2:
                continue
            try:
                if changed and is_linear(t.spec):
                    parts.pairs.append((t, self._pair_store(t), self._is_flipped(t)))
                elif changed and self.manifest.output.modules_to_save == "all":
                    parts.wholes.append(t)
                else:
                    parts.left.append(self._left_task(t))
            except RefusedError as error:
                self.problems += [p for p in error.problems if p not in self.problems]
        return parts

    def _is_flipped(self, t: Draft) -> bool:
        return self._conv1d(self.donor) and _module(t).rpartition(".")[2] in CONV1D_LAYERS

    def _pair_store(self, t: Draft) -> StoreSpec:
        wanted = self.manifest.output.store
        small = min(t.task.rows, t.task.cols)
        if wanted is not None and wanted.energy is not None:
            return StoreSpec("svd", rank=small, energy=wanted.energy)
        terms = [term for entry in t.task.entries for term in entry.terms]
        largest = max((term.rank for term in terms if isinstance(term, LowRankTerm)), default=0)
        rank = wanted.rank if wanted is not None and wanted.rank is not None else largest
        if not rank:
            raise PlanError.of(
                "no-rank", "no source has a rank to store the merge at", where="output.store.svd.rank",
                why="what a model changed is of full rank",
                fix="write store: {svd: {rank: 16}} or {svd: {energy: 0.95}}; the report says what is lost",
            )  # fmt: skip
        return StoreSpec("svd", rank=min(rank, small))

    def _pair_task(self, layout: Layout, t: Draft, store: StoreSpec, *, flipped: bool) -> Task:
        names = [peft.output_key(_module(t), role) for role in ("lora_A", "lora_B")]
        parts = ("B.T", "A.T") if flipped else ("A", "B")
        places = tuple(layout.place(name, part) for name, part in zip(names, parts, strict=True))
        low_rank = all(isinstance(term, LowRankTerm) for entry in t.task.entries for term in entry.terms)
        tile = tile_rows(t.task.cols, products=True) if low_rank else t.task.tile_rows
        return replace(
            t.task, name=_module(t), results=(Result(t.call, store, places, t.space),), cut="whole", tile_rows=tile,
            extent_rows=extent_rows(tile, 4 * t.task.cols), fused=t.call.scope != "model" or not rounds_of(t.call),
        )  # fmt: skip

    def _left_task(self, t: Draft) -> tuple[Draft, Literal["equal", "left"]]:
        """A look at what each source changed in a tensor that the adapter does not hold; no method has a part in it."""
        terms = [term for entry in t.task.entries for term in entry.terms]
        if any(not isinstance(term, DenseTerm) for term in terms):
            raise PlanError.of(
                "not-plain", f"an adapter changes {t.spec.name}, which a merged adapter does not hold",
                where=t.spec.name, why="it holds pairs for the matrices of layers",
                fix="write modules_to_save: all, or fold the adapter into a model (kind: model)",
            )  # fmt: skip
        drops = self.manifest.output.modules_to_save == "drop" and t.task.base is not None
        call = Call(method="copy", combine="equal", weights=(1.0,) * len(t.task.entries))
        task = replace(
            t.task, entries=tuple(replace(entry, statistic=None) for entry in t.task.entries), cut="rows", fused=False,
        )  # fmt: skip
        return replace(t, task=task, call=call), "left" if drops else "equal"

    # ------------------------------------------------------------ modules that are written whole

    def _saved_specs(self, t: Draft, pairs: Container[str]) -> tuple[TensorSpec, ...]:
        """A merged tensor by the name that PEFT reads it from; a tied embedding is the head, too. What stands beside a
        pair belongs to the layer below the pair."""
        names = [f"{_module(t)}{_BESIDE}{t.spec.name.rpartition('.')[2]}" if _module(t) in pairs else t.spec.name]
        if t.spec.name == self._tied_embedding(self.donor) and HEAD not in self._held_by_sources():
            names.append(HEAD)
        return tuple(replace(t.spec, name=f"{peft.PREFIX}{name}") for name in names)

    def _held_by_sources(self) -> set[str]:
        return {n for s in self.table.sources if s.catalog.kind == "model" for n in s.catalog.tensors}

    def _places(self, layout: Layout, t: Draft, specs: Sequence[TensorSpec]) -> tuple[Place, ...]:
        found = [layout.place(spec.name) for spec in specs]
        return tuple(
            p if p.rows == t.task.rows else replace(p, rows=t.task.rows, row_bytes=t.task.cols * t.spec.dtype.itemsize)
            for p in found
        )

    def _adapter_config(self, parts: _Parts, wholes: Sequence[str]) -> OutputFile:
        config = self.table.catalog(self.donor).config
        architecture = str((config.get("architectures") or [""])[0])
        names = [name.removeprefix(peft.PREFIX) for name in wholes]
        data = peft.build_adapter_config(
            {_module(t): store.rank for t, store, _ in parts.pairs},
            base_model_name_or_path=self.base_name,
            task_type=next((task for ending, task in _TASKS if architecture.endswith(ending)), None),
            modules_to_save=sorted({name.rpartition(".")[0] for name in names if _BESIDE not in name}),
            base_modules=sorted({name.rpartition(".")[0] for name in self.table.catalog(self.donor).tensors}),
            fan_in_fan_out=any(flipped for _, _, flipped in parts.pairs),
        )
        # A head that is written beside the embeddings is theirs: PEFT is to keep the two one tensor.
        tied = HEAD in names and HEAD not in self._held_by_sources()
        biased = any(_BESIDE in name for name in names)
        more = ({"ensure_weight_tying": True} if tied else {}) | ({"bias": "all"} if biased else {})
        return literal(peft.ADAPTER_CONFIG, peft.with_settings(data, more))


def _module(t: Draft) -> str:
    return t.spec.name.rpartition(".")[0]


def _shape(t: Draft, flipped: bool) -> tuple[int, int]:
    return (t.task.cols, t.task.rows) if flipped else (t.task.rows, t.task.cols)
