"""A plugin on Ray: workers are sent its text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.connect import quiet
from cluster.run import run_on_ray
from merger import api
from merger.methods import METHODS, plugin
from merger.methods.plugin import load_plugin
from tests.cluster.runs import check_finished
from tests.conformance.folders import manifest

pytestmark = pytest.mark.ray

PLUGINS = Path(__file__).parents[2] / "manifests" / "plugins"


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
        object_store_memory=100 << 20, namespace="raymerge",
    )  # fmt: skip
    with quiet():
        yield
    ray.shutdown()


@pytest.fixture
def _without_plugins() -> Iterator[None]:
    yield
    for name in plugin._LOADED:
        METHODS.pop(name, None)
    plugin._LOADED.clear()


@pytest.mark.parametrize("name", ["clipped_sum", "trimmed_mean"])
@pytest.mark.usefixtures("private_ray", "_without_plugins")
def test_workers_merge_with_a_plugin_that_they_do_not_have(small: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "mine.py"
    shutil.copy(PLUGINS / f"{name}.py", file)
    load_plugin(file)
    path = manifest(tmp_path / "merge.yaml", {
        "merge_method": name, "base_model": str(small / "base"),
        "models": [{"model": str(small / f"m{n}"), "parameters": {"weight": 1.0 / n}} for n in (1, 2)],
    })  # fmt: skip
    api.merge(path, tmp_path / "whole", workers=1)
    plan = api.plan(path, tmp_path / "out")
    file.unlink()
    api.run_planned(plan, workers=2, runner=run_on_ray)
    check_finished(tmp_path / "out", tmp_path / "whole")
