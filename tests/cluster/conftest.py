"""Models to merge, and the merge as it should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merger import api
from tests.cluster.runs import LAYERS, ties
from tests.conformance.folders import manifest, model, model_tensors


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of eight small layers, a manifest of several shards, and the merge as it should be."""
    folder = tmp_path_factory.mktemp("small")
    for seed, name in enumerate(("base", "m1", "m2")):
        model(folder / name, seed, layers=LAYERS)
    manifest(folder / "merge.yaml", ties(folder, output={"shard_size": "40KB"}))
    api.merge(folder / "merge.yaml", folder / "whole", workers=1)
    return folder


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors that take a worker a while."""
    folder = tmp_path_factory.mktemp("large")
    for seed, name in enumerate(("base", "m1", "m2")):
        model(folder / name, seed, tensors=model_tensors(seed, rows=2500, cols=2048, layers=6, dtype=torch.bfloat16))
    manifest(folder / "merge.yaml", ties(folder))
    api.merge(folder / "merge.yaml", folder / "whole")
    return folder
