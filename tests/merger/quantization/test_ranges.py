"""What a coded tensor reads: the rows of each part that its own rows need, no fewer, and remote ones ahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merger.catalog import inspect_source
from merger.operands import Arena, OperandReader
from merger.planning.memory import extent_rows, tile_rows
from merger.planning.nouns import DenseTerm, Entry, MergePlan, Source, Task
from merger.storage.base import RangeRead
from merger.storage.local import LocalStore
from merger.tensors import DTYPES, UNREAD, WHOLE, Part, StoredTensor, TensorSpec
from tests.merger.quantization.test_aqlm import checkpoint as aqlm
from tests.merger.quantization.test_bnb import checkpoint as bnb
from tests.merger.quantization.test_columns import awq
from tests.merger.quantization.test_compressed import checkpoint as compressed
from tests.merger.quantization.test_eetq import checkpoint as eetq
from tests.merger.quantization.test_fp8 import checkpoint as fp8
from tests.merger.quantization.test_hqq import checkpoint as hqq
from tests.merger.quantization.test_mxfp4 import gpt_oss
from tests.merger.quantization.test_torchao import checkpoint as torchao
from tests.quantised import QuantBench


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 50), st.data())
def test_a_span_is_the_rows_that_hold_the_elements(rows: int, cols: int, covers: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    stored = StoredTensor(TensorSpec("x", DTYPES["U8"], (100,)), "f", 0)
    part = Part("codes", stored, -(-rows * cols // covers), covers)
    needed = {element // covers for element in range(first * cols, last * cols)}
    assert part.span(cols, first, last) == (min(needed), max(needed) + 1)
    assert Part("table", stored, 3, WHOLE).span(cols, first, last) == (0, 3)
    assert Part("beside", stored, 3, UNREAD).span(cols, first, last) == (0, 0)


@pytest.mark.parametrize(
    "kind", ["nf4-double", "fp8", "int4-zeros", "awq", "gpt-oss", "torchao", "hqq", "aqlm", "eetq"]
)
def test_what_is_fetched_ahead_is_all_that_is_read(
    quant_bench: QuantBench, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    makes: dict[str, Path] = {
        "nf4-double": bnb(quant_bench, "nf4-double"), "fp8": fp8(quant_bench, "ragged"),
        "int4-zeros": compressed(quant_bench, "int4-zeros"), "awq": awq(quant_bench), "gpt-oss": gpt_oss(quant_bench),
        "torchao": torchao(quant_bench, "nvfp4"), "hqq": hqq(quant_bench, "4-runs"),
        "aqlm": aqlm(quant_bench, "2x8-tall"), "eetq": eetq(quant_bench),
    }  # fmt: skip
    monkeypatch.setattr(LocalStore, "remote", property(lambda self: True))
    catalog = inspect_source(str(makes[kind]))
    plan = MergePlan(sources=(Source("base", catalog),), outputs=(), tasks=())
    for name, tensor in [(n, t) for n, t in catalog.tensors.items() if t.coded is not None][:3]:
        spec, tile = tensor.spec, tile_rows(tensor.spec.cols, products=False)
        term = DenseTerm(0, name)
        task = Task(name=name, rows=spec.rows, cols=spec.cols, base=None, entries=(Entry((term,)),), results=(),
                    tile_rows=tile, extent_rows=extent_rows(tile, spec.cols))  # fmt: skip
        first, last = spec.rows // 3, spec.rows // 3 + 5
        reader = OperandReader(plan, Arena(), factor_bytes=1 << 20)
        ranges = reader.missing([(task, first, last)])
        assert sum(end - start for _, _, start, end in ranges) <= tensor.stored_bytes
        reader.fetch(ranges)
        before = reader.read_bytes

        def refuse(file: str, reads: list[RangeRead], *, pin: str | None = None) -> None:
            raise AssertionError(file, reads)

        out = np.empty((last - first, spec.cols), np.float32)
        with monkeypatch.context() as patch:
            patch.setattr(type(catalog.store), "read_into", lambda self, *a, **k: refuse(*a, **k))
            reader.operand((term,), first, last, out)
        assert reader.read_bytes == before
        plain = np.empty_like(out)
        OperandReader(plan, Arena(), factor_bytes=1 << 20).operand((term,), first, last, plain)
        assert out.tobytes() == plain.tobytes()
