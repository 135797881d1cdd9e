"""Adapters that stand out among the others of a merge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merger
from merger.outliers import outliers
from tests.conformance.folders import adapter, lora_tensors

MODULES = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(8))


def made(folder: Path, seed: int, *, scale: float = 1.0, loud: str = "") -> Path:
    tensors = lora_tensors(seed, modules=MODULES, rows=12, cols=8)
    for name in tensors:
        if name.endswith("lora_B.weight"):
            tensors[name] *= scale * (20 if loud and loud in name else 1)
    return adapter(folder, seed, tensors=tensors)


def norm(path: Path) -> float:
    """‖2·B·A‖ over all modules, in float64."""
    held = load_file(path / "adapter_model.safetensors")
    factors = [(held[n].double(), held[n.replace("lora_A", "lora_B")].double()) for n in held if "lora_A" in n]
    return math.sqrt(sum(float((2 * b @ a).square().sum()) for a, b in factors))


def merge(out: Path, *paths: Path, **keys: Any) -> dict[str, Any]:
    document = {"adapters": [{"adapter": str(p), "name": p.name} for p in paths], **keys}
    merger.merge(document, out, workers=1)
    found: dict[str, Any] = json.loads((out / "raymerge-report.json").read_text())
    return found


def codes(report: dict[str, Any]) -> list[str]:
    return [w["code"] for w in report["warnings"] if w["code"].endswith("stands-out")]


@pytest.mark.parametrize("store", [None, {"svd": {"rank": 4}}])
def test_the_report_says_how_large_each_source_is(store: Any, tmp_path: Path) -> None:
    paths = [made(tmp_path / name, seed, scale=1 + seed) for seed, name in enumerate("abc")]
    report = merge(tmp_path / "out", *paths, output={} if store is None else {"store": store})
    assert [s["source"] for s in report["sources"]] == ["a", "b", "c"]
    for source, path in zip(report["sources"], paths, strict=True):
        assert source["norm"] == pytest.approx(norm(path), rel=1e-6)
        assert source["modules"] == len(MODULES)
    assert codes(report) == []


def test_a_source_that_is_far_larger_is_told(tmp_path: Path) -> None:
    paths = [made(tmp_path / name, seed, scale=50 if name == "c" else 1) for seed, name in enumerate("abc")]
    report = merge(tmp_path / "out", *paths)
    assert codes(report) == ["source-stands-out"]
    (told,) = [w for w in report["warnings"] if w["code"] == "source-stands-out"]
    assert told["where"] == "c"


def test_a_source_that_lies_in_one_module_is_told(tmp_path: Path) -> None:
    paths = [made(tmp_path / name, seed, loud="layers.5" if name == "b" else "") for seed, name in enumerate("abc")]
    report = merge(tmp_path / "out", *paths)
    (told,) = [w for w in report["warnings"] if w["code"] == "module-stands-out"]
    assert told["where"] == MODULES[5] + ".weight" or told["where"].startswith(MODULES[5])
    alike = [made(tmp_path / f"alike-{n}", s, loud="layers.5") for s, n in enumerate("ab")]
    assert codes(merge(tmp_path / "alike", *alike)) == []


def test_one_source_has_nothing_to_stand_out_among() -> None:
    assert outliers({"a": {"m": 1e9}}) == []
    assert outliers({}) == []


def test_bytes_do_not_know_of_it(tmp_path: Path) -> None:
    """Norms are notes: no digest covers them."""
    path = made(tmp_path / "a", 0)
    merge(tmp_path / "out", path)
    assert "size." not in (tmp_path / "out" / "raymerge.json").read_text()
    assert torch.isfinite(load_file(tmp_path / "out" / "adapter_model.safetensors").popitem()[1]).all()
