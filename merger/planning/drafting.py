"""From the operands of an output tensor to its draft: shapes and dtypes checked, rows cut into tiles and extents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from merger.adapters.bind import HEAD, matrix_of
from merger.errors import PlanError
from merger.manifest import Manifest
from merger.methods import METHODS
from merger.methods.rounds import Call, rounds_of
from merger.planning.drafts import Draft, copied
from merger.planning.inputs import MergeInput, SourceTable
from merger.planning.layout import promote
from merger.planning.linear import is_embedding
from merger.planning.memory import FUSED_ELEMENTS, extent_rows, tile_rows
from merger.planning.nouns import DenseTerm, Entry, FormulaTerm, LowRankTerm, Operand, StoreSpec, Task, Term
from merger.planning.token_rows import TokenRows
from merger.tensors import DType, StoredTensor, TensorSpec, dtype_from_torch_name

SHOWN: Final = 8


@dataclass(slots=True)
class Drafting:
    """Drafts of output tensors from what their sources store."""

    manifest: Manifest
    table: SourceTable
    tokens: TokenRows = field(init=False)
    """What becomes of rows that are tokens."""

    def __post_init__(self) -> None:
        self.tokens = TokenRows(self.table)

    def _check_shapes(self, name: str, operands: Sequence[tuple[MergeInput, Operand]]) -> tuple[tuple[int, ...], bool]:
        specs = [(s, self._stored(o[0]).spec) for s, o in operands]
        specs = [(s, self._in_rows(spec, o)) for (s, spec), (_, o) in zip(specs, operands, strict=True)]
        shapes = {spec.shape for _, spec in specs}
        if len(shapes) > 1:
            vocabulary = is_embedding(name) or name == HEAD
            raise PlanError.of(
                "shape-mismatch",
                f"the sources disagree on the shape of {name}",
                where="; ".join(f"{s.label}: {' × '.join(map(str, spec.shape))}" for s, spec in specs[:SHOWN]),
                why="their vocabularies differ" if vocabulary else "they are models of different sizes",
                fix="write tokenizer_source: union, or resize the models first"
                if vocabulary
                else "use models of one architecture",
            )
        kinds = {spec.dtype.is_float for _, spec in specs}
        dtypes = {spec.dtype for _, spec in specs}
        if kinds == {True, False} or (kinds == {False} and len(dtypes) > 1):
            raise PlanError.of(
                "dtype-mismatch",
                f"{name} is of different kinds: {', '.join(sorted(d.code for d in dtypes))}",
                where="; ".join(f"{s.label}: {spec.dtype}" for s, spec in specs[:SHOWN]),
                why="floats and codes cannot be merged",
                fix="use unquantised sources of one architecture",
            )
        codes = [spec for _, spec in specs if spec.dtype.code in ("U8", "I8", "F4") or spec.dtype.code.startswith("F8")]
        if codes and name.endswith("weight"):
            raise PlanError.of(
                "quantised-source",
                f"{name} is stored as {codes[0].dtype}, which this version cannot decode",
                where=specs[0][0].label,
                why="codes are not weights: merging them gives noise",
                fix="use the unquantised checkpoint",
            )
        return specs[0][1].shape, kinds == {True}

    def _in_rows(self, spec: TensorSpec, operand: Operand) -> TensorSpec:
        """A stored tensor's spec with the rows that the operand has."""
        if as_it_lies(operand):
            return spec
        assert self.tokens.plan.rows is not None
        return replace(spec, shape=(self.tokens.plan.rows, *spec.shape[1:]))

    def _stored(self, term: Term) -> StoredTensor:
        assert isinstance(term, DenseTerm)
        return self.table.catalog(term.source).stored(term.tensor)

    def _is_copied(self, operand: Operand) -> bool:
        """Whether an operand is a stored tensor whose bytes are its values."""
        first = operand[0]
        dense = isinstance(first, DenseTerm) and first.grid is None and self._stored(first).coded is None
        return dense and as_it_lies(operand)

    def _stored_dtype(self, operand: Operand) -> DType:
        return self._stored(operand[0]).spec.dtype

    def _dtype(self, operands: Sequence[Operand]) -> DType:
        named = self.manifest.out_dtype or self.manifest.dtype
        if named is not None and (dtype := dtype_from_torch_name(named)) is not None and dtype.is_float:
            return dtype
        # Two orders matter not: the widest of what is stored, so that nothing is cast down unasked.
        widest = promote(self._stored_dtype(o) for o in operands)
        assert widest is not None
        return widest

    def _passed(self, name: str, shape: tuple[int, ...], base: Operand, dtype: DType) -> Draft:
        """A tensor that no source changes."""
        if len(base) == 1 and self._is_copied(base) and self._stored_dtype(base) == dtype:
            return copied(self.table, name, shape, [base])
        call = Call(method="copy", combine="pass", weights=(1.0,))
        return self._rows(name, shape, None, (Entry(base),), call, dtype)

    def _rows(
        self, name: str, shape: tuple[int, ...], base: Operand | None, entries: tuple[Entry, ...], call: Call,
        dtype: DType,
    ) -> Draft:  # fmt: skip
        spec = TensorSpec(name, dtype, shape)
        terms = [*(base or ()), *(term for entry in entries for term in entry.terms)]
        if any(isinstance(term, DenseTerm) and self._stored(term).spec.dtype.code == "F64" for term in terms):
            raise PlanError.of(
                "dtype-mismatch", f"{name} is float64, and arithmetic is float32", where=name,
                why="merging it would lose digits silently", fix="convert the checkpoint to float32 first",
            )  # fmt: skip
        changed = any(not isinstance(term, DenseTerm) for term in terms)
        rows, cols = matrix_of(spec) if changed else (spec.rows, spec.cols)
        products = any(isinstance(term, LowRankTerm) or (changed and len(shape) == 2) for term in terms)
        tile = tile_rows(cols, products=products)
        whole = METHODS[call.method].whole if call.combine == "block" else None
        if len(shape) != 2:
            call = replace(call, calibrate=None)  # what is no matrix has no singular values
        vector = len(shape) != 2 if whole is not None else len(shape) <= 1
        block = METHODS[call.method].tile if call.method in METHODS else None
        if vector and (call.prepare == "magprune" or (block is not None and block.whole_rows)):
            tile = max(1, rows)
        draft = Task(
            name=name, rows=rows, cols=cols, base=base, entries=entries, results=(), tile_rows=tile,
            extent_rows=extent_rows(tile, max(1, cols * dtype.itemsize)), vector=vector,
        )  # fmt: skip
        gridded = any(isinstance(term, DenseTerm) and term.grid is not None for term in terms)
        fused = bool(rounds_of(call)) and call.scope == "tensor" and spec.numel <= FUSED_ELEMENTS
        fused = fused or (
            gridded and not rounds_of(call)
        )  # its grid may need the tensor whole: one unit, one pass more
        if any(isinstance(term, FormulaTerm) and term.whole for term in terms):
            fused = call.scope == "tensor" or not rounds_of(call)  # what is computed whole is computed once
        if whole is not None or call.calibrate is not None:
            cut_whole = call.scope == "tensor" or not rounds_of(call)
            return Draft(spec, replace(draft, cut="whole", fused=cut_whole), StoreSpec("dense"), call)
        return Draft(spec, replace(draft, fused=fused), StoreSpec("dense"), call)


def as_it_lies(operand: Operand) -> bool:
    """Whether an operand begins with a whole stored tensor, row by row."""
    first = operand[0]
    return not isinstance(first, DenseTerm) or (first.runs is None and first.share == 1.0)
