"""The demo's data, adapters and manifest hold together. `make demo` itself takes minutes and is run by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.demo.tasks import TASKS
from merger.catalog import inspect_source
from merger.manifest import load_manifest

DEMO = Path(__file__).parents[2] / "manifests" / "demo"


@pytest.mark.parametrize("name", TASKS)
def test_data_is_the_same_every_time_and_held_out_prompts_are_not_trained_on(name: str) -> None:
    task = TASKS[name]
    train, held_out = task.train(200), task.held_out(40)
    assert train == task.train(200)
    assert held_out == task.held_out(40)
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    assert len({e.prompt for e in held_out}) == 40


@pytest.mark.parametrize("name", TASKS)
def test_the_committed_adapters_can_be_merged(name: str) -> None:
    catalog = inspect_source(str(DEMO / "adapters" / name))
    assert catalog.kind == "adapter"
    assert catalog.problems == ()
    assert len(catalog.modules) > 0
    assert catalog.base_name == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_adapters_are_small_enough_for_a_repository() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*.safetensors")) < 8e6


def test_the_manifest_merges_every_adapter() -> None:
    manifest = load_manifest(DEMO / "merge.yaml", cwd=DEMO.parents[1])
    assert manifest.adapters is not None
    assert {Path(str(entry.adapter)).name for entry in manifest.adapters} == set(TASKS)
