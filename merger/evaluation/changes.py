"""How outputs differ as weights: inner products of what each changed, from files, with no model made.

`compare_changes` plans a merge of all of them, which finds what belongs to what, and reads its operands block by block.
Adapters are held against each other as the deltas they stand for; models against a base, or the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from merger import api
from merger.catalog import kind_named
from merger.errors import ManifestError, PlanError
from merger.operands import Arena, OperandReader
from merger.planning.nouns import ExpertStore, Task
from merger.unit import one_torch_thread

BLOCK_BYTES: Final = 16 << 20
_METHOD: Final = "task_arithmetic"

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Changes:
    """What outputs changed, beside each other."""

    names: tuple[str, ...]
    base: str | None
    """What models are held against; None of adapters."""
    gram: F64
    """(outputs, outputs): Σ over all tensors of ⟨Δᵢ, Δⱼ⟩."""
    by_tensor: Mapping[str, F64]
    gaps: Mapping[str, F64]
    """By tensor, ‖Δᵢ − Δ₁‖² of each."""
    equal: tuple[int, ...]
    """In how many tensors each is the first, value for value."""
    left_out: tuple[str, ...] = ()
    """Tensors that adapters hold whole, that are no floats, or that not all have: their changes are not known."""

    @property
    def norms(self) -> F64:
        return _root(np.diagonal(self.gram))

    def cosine(self, i: int, j: int) -> float | None:
        """None where one of them changed nothing."""
        size = float(self.norms[i] * self.norms[j])
        return float(self.gram[i, j]) / size if size > 0 else None

    def retained(self, i: int, j: int) -> float | None:
        """⟨Δᵢ, Δⱼ⟩/‖Δⱼ‖²: 1 where i holds all of what j does, at full strength, be it from j or from another. None
        where one of them changed nothing."""
        own = float(self.gram[j, j])
        return float(self.gram[i, j]) / own if own > 0 and self.gram[i, i] > 0 else None

    def distance(self, i: int) -> float:
        """‖Δᵢ − Δ₁‖."""
        return float(_root(sum(gap[i] for gap in self.gaps.values())))

    def farthest(self, i: int, count: int = 5) -> list[tuple[str, float]]:
        """The tensors in which i is farthest from the first: ‖Δᵢ − Δ₁‖/‖Δ₁‖ of each. Where the first changed nothing,
        those that hold most of what i did, as shares of ‖Δᵢ‖²."""
        found = []
        for name, g in self.by_tensor.items():
            gap, own = float(self.gaps[name][i]), float(g[0, 0])
            if self.gram[0, 0] == 0 and gap > 0:
                found.append((name, gap / float(self.gram[i, i])))
            elif gap > 0 and own > 0:
                found.append((name, (gap / own) ** 0.5))
        return sorted(found, key=lambda item: (-item[1], item[0]))[:count]

    def as_json(self) -> dict[str, Any]:
        count = range(len(self.names))
        return {
            "version": 1,
            "outputs": list(self.names),
            "base": self.base,
            "tensors": len(self.by_tensor),
            "norms": [float(x) for x in self.norms],
            "cosine": [[self.cosine(i, j) for j in count] for i in count],
            "retained": [[self.retained(i, j) for j in count] for i in count],
            "distance_from_first": [self.distance(i) for i in count],
            "equal_to_first": list(self.equal),
            "farthest": {self.names[i]: dict(self.farthest(i)) for i in count if i},
            "left_out": list(self.left_out),
            "gram_by_tensor": {name: g.tolist() for name, g in sorted(self.by_tensor.items())},
        }

    def lines(self) -> list[str]:
        """For people."""
        against = "the deltas of adapters" if self.base is None else f"changes from {self.base}"
        width = max(map(len, self.names))
        found = [f"{against}, {len(self.by_tensor)} tensors", "", f"{'':{width}}  {'‖Δ‖':>10}  cosine with"]
        heads = "  ".join(f"{f'[{i + 1}]':>6}" for i in range(len(self.names)))
        found.append(f"{'':{width}}  {'':>10}  {heads}   of it in [1]   equal to [1]")
        for i, name in enumerate(self.names):
            cosines = "  ".join(_shown(self.cosine(i, j), "6.3f") for j in range(len(self.names)))
            held = _shown(self.retained(0, i), "12.1%")
            equal = f"{self.equal[i]:5} of {len(self.by_tensor)}"
            found.append(f"{name:{width}}  {self.norms[i]:10.4g}  {cosines}   {held}   {equal}")
        for i, name in enumerate(self.names):
            if i and (far := self.farthest(i)):
                if self.gram[0, 0] == 0:
                    told = ", ".join(f"{tensor} ({share:.1%})" for tensor, share in far)
                    found += ["", f"of what {name} changed most lies in {told}"]
                    continue
                told = ", ".join(f"{tensor} ({gap:.3g})" for tensor, gap in far)
                found += ["", f"{name} is farthest from [1], beside what that changed, in {told}"]
        if self.base == self.names[0]:
            found += ["", "[1] is what the others are held against: give --base to see what is in it of them"]
        if self.left_out:
            shown = ", ".join(self.left_out[:5]) + (", …" if len(self.left_out) > 5 else "")
            found += ["", f"{len(self.left_out)} tensor(s) are saved whole, no floats, or not in all: {shown}"]
        return found


def _shown(value: float | None, form: str) -> str:
    return f"{'–':>{form.partition('.')[0]}}" if value is None else f"{value:{form}}"


def _root(x: Any) -> F64:
    made: F64 = np.sqrt(np.maximum(x, 0.0))
    return made


def compare_changes(outputs: Sequence[str], *, base: str | None = None) -> Changes:
    """Read what several outputs (adapters, or models and `base+adapter`) changed, and take all inner products.

    Sums are in float64 over float32 values. Memory is one block of each, whatever their size. Raises what planning a
    merge of them raises, and ManifestError where some are adapters and some are models.
    """
    document, against = _document(outputs, base)
    planned = api.plan(document)
    if planned.problems:
        raise PlanError(planned.problems)
    count = len(outputs)
    reader = OperandReader(planned, Arena(), factor_bytes=1 << 28)
    by_tensor: dict[str, F64] = {}
    gaps: dict[str, F64] = {}
    left_out = []
    changed = [i for i, output in enumerate(outputs) if output != against]
    equal = np.zeros(count, np.int64)
    with one_torch_thread(planned):
        for task in planned.tasks:
            if task.results[0].call.method != _METHOD:
                if len(task.entries) > 1 or task.results[0].store.kind != "copy":  # else nobody changes it
                    left_out.append(task.name)
                continue
            gram, gap, is_first = _products(task, reader, changed, count)
            reader.forget_wholes()
            by_tensor[task.name], gaps[task.name] = gram, gap
            equal += is_first
    total: F64 = sum(by_tensor.values(), np.zeros((count, count)))
    return Changes(tuple(outputs), against, total, by_tensor, gaps, tuple(map(int, equal)), tuple(left_out))


def _document(outputs: Sequence[str], base: str | None) -> tuple[dict[str, object], str | None]:
    """The merge that brings outputs together, and what models are held against."""
    kinds = [_kind(output) for output in outputs]
    if len(set(outputs)) < max(2, len(outputs)):
        raise ManifestError.of("bad-arguments", "two or more outputs are compared", where="OUTPUT…",
                               why="one is alone, or is named twice", fix="name each once")  # fmt: skip
    if set(kinds) == {"adapter"}:
        adapters: dict[str, object] = {
            "merge_method": _METHOD, "adapters": [{"adapter": output} for output in outputs],
            "output": {"kind": "adapter", "modules_to_save": "average", "store": {"svd": {"rank": 1}}},
        }  # fmt: skip
        return (adapters if base is None else {**adapters, "base_model": base}), None
    if set(kinds) != {"model"}:
        raise ManifestError.of(
            "bad-arguments", "some outputs are adapters and some are models",
            where=", ".join(f"{o} ({k})" for o, k in zip(outputs, kinds, strict=True)),
            why="an adapter is no weights without its base", fix="write base+adapter for the adapters",
        )  # fmt: skip
    against = outputs[0] if base is None else base
    models = [{"model": output, "parameters": {"weight": 1.0}} for output in outputs if output != against]
    return {
        "merge_method": _METHOD, "base_model": against, "models": models,
        "output": {"kind": "model", "quantization": "none", "modules_to_save": "average"},
    }, against  # fmt: skip


def _kind(output: str) -> str:
    found = kind_named(output)
    if found == "tensors":
        raise ManifestError.of("bad-arguments", f"{output} is a bare file of tensors", where=output,
                               fix="name a folder with a config")  # fmt: skip
    return found


def _products(
    task: Task, reader: OperandReader, changed: Sequence[int], count: int
) -> tuple[F64, F64, npt.NDArray[np.bool_]]:
    """Of one tensor: ⟨Δᵢ, Δⱼ⟩ (count, count), ‖Δᵢ − Δ₁‖² and whether it is Δ₁. What is not `changed` is the base."""
    step = max(1, BLOCK_BYTES // (4 * max(1, task.cols) * (count + 1)))
    gram, gaps, same = np.zeros((count, count)), np.zeros(count), np.ones(count, np.bool_)
    experts = task.results[0].store
    parts = experts.experts if isinstance(experts, ExpertStore) else 1
    for part, first in product(range(parts), range(0, task.rows, step)):
        last = min(first + step, task.rows)
        rows = np.zeros((count, last - first, task.cols), np.float32)
        base = np.empty((last - first, task.cols), np.float32)
        if task.base is not None:
            reader.operand(task.base, first, last, base)
        for i, entry in zip(changed, task.entries, strict=True):
            terms = entry.terms if parts == 1 else entry.terms[part : part + 1]  # one an expert
            reader.operand(terms, first, last, rows[i])
            if entry.subtract_base:
                np.subtract(rows[i], base, out=rows[i])
        flat = rows.reshape(count, -1).astype(np.float64)
        gram += flat @ flat.T
        flat -= flat[0].copy()
        gaps += (flat * flat).sum(axis=1)
        same &= ~flat.any(axis=1)
    return gram, gaps, same
