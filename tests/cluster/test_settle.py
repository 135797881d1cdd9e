"""A merge whose ranks follow from the data, on Ray: actors find them, then actors write, the bytes of this process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import save_file

from cluster.run import run_on_ray
from merger import api
from merger.errors import StoppedError
from merger.run import Stop
from tests.conformance.folders import adapter, content_digest, model

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        object_store_memory=100 << 20, namespace="raymerge",
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("private_ray")
def test_ranks_found_on_actors_make_the_same_bytes(tmp_path: Path) -> None:
    entries = [{"adapter": str(adapter(tmp_path / f"a{seed}", seed))} for seed in range(3)]
    document: dict[str, Any] = {
        "merge_method": "ties", "parameters": {"density": 0.4}, "adapters": entries,
        "output": {"store": {"svd": {"energy": 0.8}}},
    }  # fmt: skip
    api.merge(document, tmp_path / "whole", workers=1)
    api.merge(document, tmp_path / "ray", workers=2, runner=run_on_ray)
    assert content_digest(tmp_path / "ray") == content_digest(tmp_path / "whole")
    stop = Stop()

    def listen(progress: Any) -> None:
        if progress.units_done:
            stop.set(signal.SIGTERM)

    planned = api.plan(document, tmp_path / "stopped")
    with pytest.raises(StoppedError):
        api.run_planned(planned, workers=1, listener=listen, stop=stop, runner=run_on_ray)
    report = api.merge(document, tmp_path / "stopped", workers=2, runner=run_on_ray)
    assert report.content_digest == content_digest(tmp_path / "whole")


@pytest.mark.usefixtures("private_ray")
def test_actors_read_statistics(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    entries = []
    for seed in range(2):
        x = torch.randn(200, 64, generator=generator)
        grams = {f"model.layers.{i}.self_attn.q_proj.weight": x.T @ x for i in range(2)}
        save_file(grams, tmp_path / f"g{seed}.safetensors")
        made = model(tmp_path / f"m{seed}", seed)
        entries.append({"model": str(made), "statistics": f"{tmp_path}/g{seed}.safetensors"})
    document = {"merge_method": "regmean", "models": entries}
    api.merge(document, tmp_path / "whole", workers=1)
    api.merge(document, tmp_path / "ray", workers=2, runner=run_on_ray)
    assert content_digest(tmp_path / "ray") == content_digest(tmp_path / "whole")
