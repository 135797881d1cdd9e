"""A bulk against the same merges one by one: time and bytes read.

    python -m tests.benchmarks.bench_bulk [adapters|sweep] [--count N]

adapters   N merges of three small adapters each, over one base (default 200)
sweep      N variants of one ties merge of two models (default 50)

"One by one" is a loop in one process that has loaded everything already: what separate commands cost beside, about a
second each to start, is not counted.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from merger import api
from merger.bulk import load_bulk, plan_bulk
from merger.bulk_run import run_bulk
from merger.tensors import format_size
from tests.conformance.folders import adapter, content_digest, model, model_tensors

MODULES = tuple(f"model.layers.{i}.self_attn.{p}_proj" for i in range(12) for p in "qv")
MEMORY = 1 << 30


def adapters_bulk(folder: Path, count: int) -> dict[str, Any]:
    for seed in range(20):
        adapter(folder / "in" / f"a{seed}", seed, rank=8, rows=576, cols=576, modules=MODULES)
    base = {f"{module}.weight": torch.zeros(576, 576, dtype=torch.bfloat16) for module in MODULES}
    model(folder / "base", 0, tensors=base)
    merges = [
        {"name": f"m{n}", "adapters": [{"adapter": str(folder / "in" / f"a{(n * k + k) % 20}")} for k in (1, 3, 7)]}
        for n in range(count)
    ]
    defaults = {
        "merge_method": "linear", "base_model": str(folder / "base"),
        "output": {"path": str(folder / "out" / "{name}"), "store": "concat"},
    }  # fmt: skip
    return {"merges": merges, "defaults": defaults}


def sweep_bulk(folder: Path, count: int) -> dict[str, Any]:
    for seed, name in enumerate(("base", "m1", "m2")):
        model(folder / name, seed, tensors=model_tensors(seed, rows=1024, cols=1024, layers=16, dtype=torch.bfloat16))
    merge = {
        "name": "ties", "merge_method": "ties", "base_model": str(folder / "base"), "parameters": {"density": 0.5},
        "models": [{"model": str(folder / m), "parameters": {"weight": 1.0}} for m in ("m1", "m2")],
    }  # fmt: skip
    output = {"path": str(folder / "out" / "{parameters.density}-{parameters.lambda}")}
    densities = [round(0.1 + 0.08 * n, 2) for n in range(10)]
    lambdas = [round(0.5 + 0.1 * n, 1) for n in range(max(1, count // 10))]
    return {
        "merges": [merge], "defaults": {"output": output},
        "matrix": {"parameters.density": densities[:count], "parameters.lambda": lambdas},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=["adapters", "sweep"])
    parser.add_argument("--count", type=int)
    told = parser.parse_args()
    makers: dict[str, tuple[Callable[[Path, int], dict[str, Any]], int]] = {
        "adapters": (adapters_bulk, 200), "sweep": (sweep_bulk, 50),
    }  # fmt: skip
    make, default = makers[told.case]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        document = make(folder, told.count or default)
        bulk = load_bulk(document)
        api.merge(bulk.merges[0].manifest, folder / "warm", memory=MEMORY, workers=2)
        started = time.monotonic()
        report = run_bulk(plan_bulk(load_bulk(document)), workers=2, memory=MEMORY)
        together = time.monotonic() - started
        assert report.count("done") == len(report.merges), report.lines()
        again = time.monotonic()
        second = run_bulk(plan_bulk(load_bulk(document)), workers=2, memory=MEMORY)
        again = time.monotonic() - again
        assert second.count("already done") == len(report.merges)
        digests = [content_digest(Path(merge.path)) for merge in report.merges]
        shutil.rmtree(folder / "out")
        started = time.monotonic()
        apart = [api.merge(merge.manifest, memory=MEMORY, workers=2) for merge in bulk.merges]
        one_by_one = time.monotonic() - started
        assert [made.content_digest for made in apart] == digests
        read = sum(made.bytes_read for made in apart)
        print(f"{len(apart)} merges, same bytes")
        print(f"  bulk        {together:7.1f} s  read {format_size(report.bytes_read)}")
        print(f"  one by one  {one_by_one:7.1f} s  read {format_size(read)}")
        print(f"  bulk again  {again:7.1f} s  read {format_size(second.bytes_read)}")


if __name__ == "__main__":
    main()
