"""Mixtures of experts are planned from configs, headers and a tokenizer.json alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from merger import api
from merger.catalog import Catalog
from merger.generated import GivenStore
from tests.conformance.folders import ROOT
from tests.conformance.llamas import llama
from tests.test_house import BLOCKED


def experts(folder: Path, mode: str = "cheap_embed", **more: Any) -> dict[str, Any]:
    for seed, name in enumerate(("base", "a", "b")):
        if not (folder / name).exists():  # another file is another pin
            llama(folder / name, seed)
    prompts = (["w3 w4"], ["w5"])
    return {
        "base_model": str(folder / "base"), "gate_mode": mode,
        "experts": [
            {"source_model": str(folder / n), "positive_prompts": p} for n, p in zip("ab", prompts, strict=True)
        ], **more,
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed", "random"])
def test_the_plan_needs_no_torch(mode: str, tmp_path: Path) -> None:
    file = tmp_path / "moe.yaml"
    file.write_text(json.dumps(experts(tmp_path, mode)))
    program = f"{BLOCKED}\nfrom jobs.cli import main\nsys.exit(main(['plan', {str(file)!r}, '--json']))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["problems"] == []


def digest(found: dict[str, Any]) -> str:
    plan = api.plan(found)
    assert plan.problems == ()
    return plan.digest


def test_the_digest_is_of_what_gates_are_made_from(tmp_path: Path) -> None:
    known = digest(experts(tmp_path))
    prompts = experts(tmp_path)
    prompts["experts"][0]["positive_prompts"] = ["w3"]
    different = [digest(prompts), digest(experts(tmp_path, "hidden")), digest(experts(tmp_path, "random"))]
    different += [digest(experts(tmp_path, "random", seed=1)), digest(experts(tmp_path, "uniform_random"))]
    assert len({known, *different}) == 1 + len(different)
    assert digest(experts(tmp_path, seed=1)) == known  # nothing in it is random


def test_gates_have_one_digest_before_and_after_they_are_made(tmp_path: Path) -> None:
    from merger.gates import fill_gates

    plan = api.plan(experts(tmp_path))
    filled = fill_gates(plan, None)
    assert filled.digest == plan.digest
    assert plan.gates is not None
    before, after = (p.sources[plan.gates.source].catalog.store for p in (plan, filled))
    assert isinstance(before, GivenStore)
    assert isinstance(after, GivenStore)
    assert before.data is None
    assert after.data is not None
    assert {name: len(data) for name, data in after.data.items()} == dict(before.sizes)


def test_a_copied_expert_is_read_and_written_once(tmp_path: Path) -> None:
    plan = api.plan(experts(tmp_path, "random"))
    copies = [task for task in plan.tasks if task.results[0].store.kind == "copy"]
    gates = [task for task in plan.tasks if task.name.endswith("gate.weight")]
    assert len(copies) + len(gates) == len(plan.tasks)
    kinds = [source.catalog.kind for source in plan.sources]
    assert kinds.count("generated") == 1
    assert all(isinstance(source.catalog, Catalog) for source in plan.sources)
