"""A method written out in its blocks, space → prepare → combine → finish (design law 4): a MethodSpec made on the fly.

The blocks are those of the named methods: what a preset is made of, a manifest may put together. A combine step of a
method's own (a tile, whole or core block) goes by the name of the method that brought it. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from merger.methods import METHODS, MethodSpec, ParameterSpec
from merger.methods.declare import Space
from merger.methods.parameters import LAMBDA
from merger.methods.wrappers import CALIBRATE, CALIBRATE_ALPHA

SPACES: Final[tuple[Space, ...]] = ("weight", "delta", "core")
"""What `space` may say; `factors` is PEFT's, under combination_type."""

_COMBINED: Final = frozenset({"weight", "normalize", "elect", "divisor"})
"""Parameters of the combine steps sum, mean and elect."""
_FINISHED: Final = frozenset({LAMBDA.name, CALIBRATE.name, CALIBRATE_ALPHA.name})
_NOWHERE: Final = frozenset({"int8_mask"})
_EXAMPLES: Final = {"sum": "task_arithmetic", "mean": "linear", "elect": "ties"}
"""The named method whose combine step, parameters and defaults a word stands for."""


WORDS: Final = frozenset({*_EXAMPLES, "none", "pass", "block"})
"""Names of combine steps that no method may have."""


class CompositionError(ValueError):
    """Blocks that do not go together. `key` is the manifest's key that is wrong."""

    def __init__(self, key: str, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.key, self.what, self.why, self.fix = key, what, why, fix


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which blocks, by name. None is the default: delta where the combine step knows it, and no prepare."""

    space: str | None
    prepare: str | None
    combine: str


def prepare_blocks() -> dict[str, tuple[ParameterSpec, ...]]:
    """The prepare steps and their parameters, as the first named method that has the step declares them."""
    found: dict[str, tuple[ParameterSpec, ...]] = {}
    for spec in METHODS.values():
        if spec.prepare != "none" and spec.combine in _EXAMPLES and spec.prepare not in found:
            found[spec.prepare] = tuple(p for p in spec.parameters if p.name not in _COMBINED | _FINISHED | _NOWHERE)
    return found


def combine_blocks() -> dict[str, tuple[ParameterSpec, ...]]:
    """The combine steps and their parameters: sum, mean, elect, and each method that brings a step of its own."""
    found = {
        word: tuple(p for p in METHODS[name].parameters if p.name in _COMBINED) for word, name in _EXAMPLES.items()
    }
    for spec in METHODS.values():
        if spec.combine == "block" and spec.prepare == "none":
            found[spec.name] = tuple(p for p in spec.parameters if p.name not in _FINISHED | _NOWHERE)
    return found


def finish_blocks() -> tuple[ParameterSpec, ...]:
    """The finish steps; each is a parameter of its own name."""
    return (LAMBDA, CALIBRATE, CALIBRATE_ALPHA)


def compose(blocks: Blocks) -> MethodSpec:
    """The method that these blocks make. Every name must be known. Raises CompositionError."""
    if blocks.combine in _EXAMPLES:
        return _of_words(blocks)
    own = METHODS[blocks.combine]
    if blocks.space is not None and blocks.space not in own.spaces:
        raise CompositionError(
            "space", f"{own.name} does not work in {blocks.space}",
            why="a combine step of a method's own works where it was made for", fix=_one_of(own.spaces),
        )  # fmt: skip
    if blocks.prepare is not None and own.tile is None:
        raise CompositionError(
            "prepare", f"{own.name} takes the sources as they are",
            why="prepare works element by element, and this combine step on whole tensors",
            fix="leave prepare out, or choose a streamed combine step",
        )  # fmt: skip
    prepared = () if blocks.prepare is None else prepare_blocks()[blocks.prepare]
    finished = () if own.spaces[0] == "weight" else finish_blocks()
    if own.flat:  # equal singular values have nothing to calibrate one by one
        finished = tuple(p for p in finished if p.name == LAMBDA.name)
    return MethodSpec(
        name=own.name, summary=_summary(blocks), spaces=own.spaces, prepare=_prepare(blocks), combine="block",
        tile=own.tile, whole=own.whole, core=own.core,
        parameters=(*combine_blocks()[blocks.combine], *_beside(prepared, own.parameters), *finished),
        base=own.base, max_sources=own.max_sources, closed_on_deltas=own.closed_on_deltas, flat=own.flat, cut=own.cut,
        store=own.store, paper=own.paper, bibtex=own.bibtex,
    )  # fmt: skip


def _of_words(blocks: Blocks) -> MethodSpec:
    example = METHODS[_EXAMPLES[blocks.combine]]
    space = blocks.space or "delta"
    in_weights = space == "weight"
    if in_weights and blocks.combine == "elect":
        raise CompositionError(
            "space", "elect does not work in weight", why="the sign of a weight is no vote for a change",
            fix="write space: delta",
        )  # fmt: skip
    if space == "core" and blocks.prepare not in {None, *_in_core()}:
        raise CompositionError(
            "prepare", f"{blocks.prepare} does not work in core", why="its rows and columns are no rows of a weight",
            fix=f"use {' or '.join(_in_core())}, or space: delta",
        )  # fmt: skip
    prepared = () if blocks.prepare is None else prepare_blocks()[blocks.prepare]
    linear = blocks.prepare is None
    return MethodSpec(
        name="+".join(word for word in (blocks.prepare, blocks.combine) if word), summary=_summary(blocks),
        spaces=("weight",) if in_weights else (("delta", "core") if space == "core" else ("delta",)),
        prepare=_prepare(blocks), combine=example.combine,
        parameters=(*combine_blocks()[blocks.combine], *prepared, *(() if in_weights else finish_blocks())),
        base="member" if in_weights else "required", closed_on_deltas=not in_weights,
        linear=linear and blocks.combine != "elect", cut="elements", paper="",
    )  # fmt: skip


def _in_core() -> tuple[str, ...]:
    """Prepare steps that a named method takes in the core."""
    return tuple(sorted({s.prepare for s in METHODS.values() if "core" in s.spaces and s.prepare != "none"}))


def _prepare(blocks: Blocks) -> Any:
    """The step's name as MethodSpec has it: one of the words that prepare_blocks found there."""
    return blocks.prepare or "none"


def _beside(more: tuple[ParameterSpec, ...], own: tuple[ParameterSpec, ...]) -> tuple[ParameterSpec, ...]:
    names = {p.name for p in own}
    clash = sorted(names & {p.name for p in more})
    if clash:
        raise CompositionError(
            "prepare", f"prepare and combine both have a parameter {clash[0]}",
            why="one value cannot say two things", fix="leave prepare out",
        )  # fmt: skip
    return more


def _summary(blocks: Blocks) -> str:
    return f"blocks of the manifest: {' → '.join(word for word in (blocks.prepare, blocks.combine) if word)}"


def _one_of(words: tuple[str, ...]) -> str:
    return f"write space: {' or '.join(words)}, or leave it out"


def method_label(manifest: Mapping[str, Any]) -> str:
    """What to call the method of a manifest that is plain data, for people."""
    if manifest.get("experts"):
        return "experts"
    named = manifest.get("merge_method") or manifest.get("combination_type")
    if named is None and manifest.get("combine"):
        return " → ".join(str(manifest[key]) for key in ("prepare", "combine") if manifest.get(key))
    return str(named or "task_arithmetic")
