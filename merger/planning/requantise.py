"""What becomes of a quantised donor's tensors in the output: kept as codes, written back, or dense. Pure.

none     everything dense; the output's config names no scheme
keep     what no source changes keeps its codes and scales byte for byte; the rest is quantised again
mixed    what no source changes keeps them; the rest, and what engines fuse with it, is dense and listed as such
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from merger.catalog import Catalog
from merger.errors import PlanError, Problem, RefusedError, grouped
from merger.methods.rounds import Call, rounds_of
from merger.planning.drafts import CodedPlace, Draft, copied
from merger.planning.inputs import SourceTable
from merger.planning.memory import PRODUCT_ROWS
from merger.planning.nouns import DenseTerm, LowRankTerm, StoreSpec, Task
from merger.quantization import quantization_config
from merger.quantization.declare import partners_of, stem_of
from merger.quantization.torchao import header_metadata
from merger.quantization.writing import STATE, Recode, recode_parameters, state_length, state_text
from merger.tensors import UNREAD, WHOLE, Coded, Part, StoredTensor, TensorSpec, part_key

FIX: Final = "write output.quantization: mixed, or none"


def mode_of(asked: str | None, donor: Catalog) -> str:
    """`none`, `keep` or `mixed`. Raises PlanError where the donor cannot be written so."""
    scheme = donor.quantization
    if scheme is None:
        if asked == "mixed":
            raise PlanError.of(
                "bad-value", "output.quantization: mixed needs a quantised base", where="output.quantization",
                why=f"{donor.reference} is dense", fix="drop it",
            )  # fmt: skip
        return "none"
    mode = asked or scheme.default
    if mode == "mixed" and scheme.skip_key is None:
        raise PlanError.of(
            "bad-value", f"a checkpoint of {scheme.method} cannot be partly dense", where="output.quantization",
            why="its config has no list of single modules that are not quantised",
            fix="write output.quantization: none",
        )  # fmt: skip
    return mode


def passed_on(task: Task, call: Call) -> DenseTerm | None:
    """The stored tensor that a task hands on as it is, if that is all it does."""
    terms = task.entries[0].terms if len(task.entries) == 1 and task.base is None else ()
    if call.method == "copy" and call.combine == "pass" and len(terms) == 1 and isinstance(terms[0], DenseTerm):
        whole = terms[0].runs is None and terms[0].share == 1.0
        return terms[0] if whole and terms[0].grid is None else None
    return None


def renamed(part: str, own: str, name: str) -> str:
    """A part's name where its tensor `own` is called `name`: another layer number."""
    return part if own == name else stem_of(name) + part.removeprefix(stem_of(own))


def coded_places(like: StoredTensor, name: str) -> tuple[CodedPlace, ...]:
    """Where the parts of a tensor that is written back go: laid out as those of the donor's."""
    assert like.coded is not None
    made = []
    for part in like.coded.parts:
        own = part.stored.spec
        if part.covers == UNREAD and part.role != STATE:
            continue
        if part.role == STATE:
            own = replace(own, shape=(state_length(_state(like), double=like.coded.part("nested") is not None),))
        spec = replace(own, name=renamed(own.name, like.spec.name, name))
        if part.role == STATE or part.covers == WHOLE or part.role == "nested":
            made.append(CodedPlace(part.role, spec, 1, spec.nbytes, 0))
        elif part.covers < like.spec.cols:
            made.append(CodedPlace(part.role, spec, like.spec.rows, spec.nbytes // max(1, like.spec.rows), 1))
        else:
            made.append(CodedPlace(part.role, spec, part.rows, part.row_bytes, part.covers // like.spec.cols))
    return tuple(made)


def _state(like: StoredTensor) -> str:
    """The quant_state of a tensor that is laid out like another, but for its offset."""
    assert like.coded is not None
    kind, block = str(like.coded.value("kind")), like.coded.number("block")
    dtype, double = like.spec.dtype.torch_name or "", like.coded.part("nested") is not None
    return state_text(kind, block, dtype, like.spec.shape, double=double)


def beside(like: StoredTensor) -> tuple[Part, ...]:
    """Parts that decide no value: they go along with the codes."""
    assert like.coded is not None
    return tuple(part for part in like.coded.parts if part.covers == UNREAD and part.role != STATE)


def recoded(like: StoredTensor, name: str, task: Task, call: Call) -> tuple[Task, StoreSpec]:
    """The task and store of a tensor that is quantised again. Raises PlanError(code `quantised-source`)."""
    assert like.coded is not None
    found = recode_parameters(like.coded, like.spec.cols)
    if isinstance(found, str):
        raise PlanError.of(
            "quantised-source", f"{name} cannot be written back as it was quantised", where="output.quantization",
            why=found, fix=FIX,
        )  # fmt: skip
    if like.coded.part(STATE) is not None:
        found = (*found, (STATE, _state(like)))
    return in_codes(name, task, call, found)


def in_codes(name: str, task: Task, call: Call, recode: Recode) -> tuple[Task, StoreSpec]:
    """A task whose result is written as codes: its tiles are whole blocks of scales.

    Raises PlanError(code `quantised-source`).
    """
    high = int(dict(recode)["block_rows"])
    terms = [*(task.base or ()), *(term for entry in task.entries for term in entry.terms)]
    step = math.lcm(high, PRODUCT_ROWS if any(isinstance(term, LowRankTerm) for term in terms) else 1)
    tile = step * max(1, task.tile_rows // step)
    store = StoreSpec("coded", recode=recode)
    fused = task.fused
    if store.looks_first:
        if call.scope == "model" and rounds_of(call):
            raise PlanError.of(
                "quantised-source", f"{name} cannot be quantised under scope: model", where="output.quantization",
                why="its scales need the whole tensor in one unit", fix=FIX,
            )  # fmt: skip
        fused = True
    extent = max(tile, task.extent_rows // tile * tile)
    return replace(task, tile_rows=tile, extent_rows=extent, fused=fused), store


@dataclass(slots=True)
class Requantised:
    """What the config of the output says of its scheme."""

    mode: str
    dense: set[str] = field(default_factory=set)
    """Tensors that were codes and are dense now."""
    kept: set[str] = field(default_factory=set)
    described: dict[str, str] = field(default_factory=dict)
    """What the headers of the files say of tensors that are codes, where their scheme has such words (torchao)."""
    parts: set[str] = field(default_factory=set)
    """Stored tensors that such tensors consist of."""

    def config(self, donor: Catalog) -> Mapping[str, Any] | None:
        """quantization_config of the output; None where nothing is quantised."""
        scheme = quantization_config(donor.config)
        if donor.quantization is None or scheme is None or not self.kept:
            return None
        key = donor.quantization.skip_key
        return scheme if key is None else self._listed(scheme, key, donor.quantization.skip_suffix)

    def beside(self, donor: Catalog) -> Mapping[str, Any] | None:
        """hf_quant_config.json of the output; None where there is none."""
        said = donor.quantization.beside if donor.quantization is not None and self.kept else None
        if said is None or not isinstance(said.get("quantization"), Mapping):
            return said
        return {**said, "quantization": self._listed(said["quantization"], "exclude_modules")}

    def metadata(self, specs: Iterable[TensorSpec]) -> Mapping[str, str]:
        """What the header of each file says beside its tensors: of all of them, those in other files too."""
        if not self.described:
            return {}
        return header_metadata(self.described, (s.name for s in specs if s.name not in self.parts))

    def _listed(self, scheme: Mapping[str, Any], key: str, suffix: str = "") -> Mapping[str, Any]:
        """A scheme whose list of unquantised modules has those that are dense now."""
        if not self.dense:
            return scheme
        listed = scheme.get(key) or []
        named = {stem_of(name) for name in self.dense}
        named |= {name.partition(".experts.")[0] + ".experts" for name in named if ".experts." in name}
        named |= {f"{name}{suffix}" for name in named}
        return {**scheme, key: [*listed, *sorted(named - set(listed))]}


def dense_with_partners(changed: set[str], coded: Mapping[str, object]) -> set[str]:
    """The changed tensors and those that engines run as one with them."""
    return {other for name in changed for other in partners_of(name, coded)}


def requantise(
    asked: str | None, table: SourceTable, donor: int, drafts: Sequence[Draft]
) -> tuple[list[Draft], Requantised, list[Problem]]:
    """The tensors of a quantised donor as output.quantization has them (codes kept, written back, or dense), what the
    config says of that, and what stands against it."""
    problems: list[tuple[str, Problem]] = []
    try:
        made = Requantised(mode_of(asked, table.catalog(donor)))
    except RefusedError as error:
        return list(drafts), Requantised("none"), list(error.problems)
    if made.mode == "none":
        return list(drafts), made, []
    coded = {d.spec.name: _coded_like(table, donor, d) for d in drafts}
    coded = {name: like for name, like in coded.items() if like is not None}
    changed = {d.spec.name for d in drafts if d.spec.name in coded and _kept_from(table, donor, d) is None}
    if made.mode == "mixed":
        made.dense = dense_with_partners(changed, coded)
    made.kept = set(coded) - made.dense
    found: list[Draft] = []
    for draft in drafts:
        like = coded.get(draft.spec.name)
        if like is None or draft.spec.name in made.dense:
            found.append(draft)
            continue
        try:
            drafts_of, held = _as_codes(table, donor, draft, like, _shared_factor(table, donor, like, coded))
        except RefusedError as error:
            problems += [(draft.spec.name, problem) for problem in error.problems]
            continue
        found += drafts_of
        words = held.value("metadata")
        if words is not None:
            made.described[draft.spec.name] = str(words)
            made.parts |= {spec.name for each in drafts_of for spec in each.specs}
    return found, made, grouped(problems)


def _stored(table: SourceTable, term: DenseTerm) -> StoredTensor:
    return table.catalog(term.source).stored(term.tensor)


def _coded_like(table: SourceTable, donor: int, draft: Draft) -> StoredTensor | None:
    """The coded tensor that an output tensor is laid out like: the donor's, else the one it hands on."""
    like = table.catalog(donor).tensors.get(draft.spec.name)
    if like is None:
        term = passed_on(draft.task, draft.call)
        like = None if term is None else _stored(table, term)
    return like if like is not None and like.coded is not None and like.spec.shape == draft.spec.shape else None


def _kept_from(table: SourceTable, donor: int, draft: Draft) -> DenseTerm | None:
    """The stored codes that an output tensor can be copied from: unchanged, and of the donor's scheme."""
    term = passed_on(draft.task, draft.call)
    if term is None or _stored(table, term).coded is None:
        return None
    same = table.catalog(term.source).quantization == table.catalog(donor).quantization
    return term if term.source == donor or same else None


def _shared_factor(table: SourceTable, donor: int, like: StoredTensor, coded: Mapping[str, object]) -> DenseTerm | None:
    """The donor's factor of a whole tensor, where engines use one for this tensor and its partners: NVFP4 is calibrated
    so that they have the same, and those that no source changes keep theirs."""
    assert like.coded is not None
    part = like.coded.part("divisor") or like.coded.part("multiplier")
    name = like.spec.name
    if part is None or part.covers != WHOLE or len(partners_of(name, coded, experts=False)) == 1:
        return None
    if table.catalog(donor).tensors.get(name) is not like:
        return None
    return DenseTerm(donor, part_key(part.stored.spec.name))


def _as_codes(
    table: SourceTable, donor: int, draft: Draft, like: StoredTensor, factor: DenseTerm | None
) -> tuple[list[Draft], Coded]:
    """Its parts copied as they are, or one task that writes all of them; and what they are laid out like."""
    name = draft.spec.name
    term = _kept_from(table, donor, draft)
    source = donor if term is None else term.source
    held = like if term is None else _stored(table, term)
    assert held.coded is not None
    parts = beside(held) if term is None else held.coded.parts
    copies = [
        copied(
            table, renamed(p.stored.spec.name, held.spec.name, name), p.stored.spec.shape,
            [(DenseTerm(source, part_key(p.stored.spec.name)),)],
        )
        for p in parts
    ]  # fmt: skip
    if term is not None:
        return copies, held.coded
    task, store = recoded(like, name, draft.task, draft.call)
    store = replace(store, factor=factor)
    return [replace(draft, task=task, store=store, coded=coded_places(like, name)), *copies], held.coded
