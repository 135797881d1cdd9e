"""Bulks over small sources, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from merger.bulk import load_bulk, plan_bulk
from merger.bulk_report import BulkReport
from merger.bulk_run import run_bulk
from tests.conformance.folders import adapter, model

SWEEP = {"parameters.density": [0.2, 0.5, 0.8], "parameters.lambda": [0.5, 1.0]}


def bulk_sources(folder: Path) -> Path:
    """Three models and four adapters."""
    for seed, name in enumerate(("base", "m1", "m2")):
        model(folder / name, seed, layers=3)
    for seed in range(4):
        adapter(folder / "adapters" / f"a{seed}", seed)
    return folder


def sweep(folder: Path, **more: object) -> dict[str, Any]:
    """Six variants of one ties merge."""
    return {
        "merges": [{"name": "ties", **ties(folder)}],
        "defaults": {"output": {"path": str(folder / "out" / "{name}-{parameters.density}-{parameters.lambda}")}},
        "matrix": {key: list(values) for key, values in SWEEP.items()}, **more,
    }  # fmt: skip


def ties(folder: Path, *models: str) -> dict[str, Any]:
    return {
        "merge_method": "ties", "base_model": str(folder / "base"), "parameters": {"density": 0.5},
        "models": [{"model": str(folder / m), "parameters": {"weight": 1.0}} for m in models or ("m1", "m2")],
    }  # fmt: skip


def each(folder: Path, **more: object) -> dict[str, Any]:
    """Every adapter folded into the base."""
    output = {"kind": "model", "path": str(folder / "out" / "{name}")}
    return {
        "each": str(folder / "adapters"),
        "defaults": {"base_model": str(folder / "base"), "output": output},
        **more,
    }


def energy(folder: Path, **output: object) -> dict[str, Any]:
    """ties of three adapters at the rank that keeps nine tenths."""
    return {
        "merge_method": "ties", "base_model": str(folder / "base"), "parameters": {"density": 0.5},
        "adapters": [{"adapter": str(folder / "adapters" / f"a{n}")} for n in range(3)],
        "output": {"kind": "adapter", "store": {"svd": {"energy": 0.9}}, **output},
    }  # fmt: skip


def several(folder: Path, **last: Any) -> dict[str, Any]:
    """ties → `mixed`, which the result averages with a third model."""
    return {
        "documents": {"mixed": {**ties(folder), "dtype": "bfloat16"}},
        "merge_method": "linear", "dtype": "bfloat16",
        "models": [{"model": m, "parameters": {"weight": 1.0}} for m in ("mixed", str(folder / "base"))], **last,
    }  # fmt: skip


def everything(folder: Path, **more: Any) -> dict[str, Any]:
    """Of each kind one, and a fold between them."""
    merges = [
        {"name": "ranks", **energy(folder)},
        {"name": "fold", "base_model": str(folder / "base"), "adapters": [{"adapter": str(folder / "adapters" / "a0")}],
         "output": {"kind": "model"}},
        {"name": "documents", **several(folder)},
        {"name": "ties", **ties(folder)},
    ]  # fmt: skip
    return {"merges": merges, "defaults": {"output": {"path": str(folder / "out" / "{name}")}}, **more}


def run(document: Mapping[str, object], **options: Any) -> BulkReport:
    return run_bulk(plan_bulk(load_bulk(document)), **{"workers": 2, "memory": 256 << 20, **options})


def states(report: BulkReport) -> dict[str, str]:
    return {merge.label: merge.state for merge in report.merges}


def broken(folder: Path) -> None:
    """Adapter a1 has a NaN, which no header shows."""
    path = folder / "adapters" / "a1" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
