"""An svd cut at an energy: ranks follow from the data, and all that holds of other merges holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from merger import api
from merger.errors import MergeFailedError, StoppedError
from merger.planning.nouns import MergePlan
from merger.planning.settle import measured_results, measuring, settle
from merger.planning.summary import plan_json, plan_lines
from merger.run import Stop
from merger.verify import verify_output
from tests.conformance.folders import ROOT, adapter, content_digest, names

F64 = npt.NDArray[np.float64]

MODULES = {"l.0.a": (40, 30), "l.0.b": (12, 50), "l.1.a": (40, 30), "l.1.b": (9, 9)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a worker: bits hang on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sources(place: Any, seed: int = 0) -> list[str]:
    """Three adapters whose singular values fall faster in some modules than in others."""
    g = np.random.default_rng(seed)
    found = []
    for rank in (4, 6, 3):
        pairs = {}
        for at, (module, (rows, cols)) in enumerate(MODULES.items()):
            fall = np.exp(-np.arange(rank) * at / 2)
            pairs[module] = (g.standard_normal((rank, cols)) * fall[:, None], g.standard_normal((rows, rank)))
        found.append(place.adapter(pairs, scaling=0.5))
    return found


def factors(found: dict[str, torch.Tensor], module: str) -> tuple[F64, F64]:
    a, b = (found[f"base_model.model.{module}.lora_{which}.weight"].double().numpy() for which in "AB")
    return a, b


def ranks(found: dict[str, torch.Tensor]) -> dict[str, int]:
    return {module: len(factors(found, module)[0]) for module in MODULES}


def energy(share: float) -> dict[str, Any]:
    return {"output": {"store": {"svd": {"energy": share}}}}


METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {}, "linear": {}, "ties": {"density": 0.4}, "core_ties": {"density": 0.4}, "tsv_m": {},
    "svc": {}, "nan": {}, "dare_ties": {"density": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_each_module_has_the_least_rank_that_keeps_the_energy(
    tools: ModuleType, place: Any, method: str, share: float
) -> None:
    uris = sources(place)
    document = tools.adapters(method, uris, [{}] * 3, METHODS[method])
    whole = tools.merge(place, {**document, "output": {"store": {"svd": {"rank": 50}}}})
    found = tools.merge(place, {**document, **energy(share)})
    for module in MODULES:
        a, b = factors(whole, module)
        u, s, vt = np.linalg.svd(b @ a, full_matrices=False)
        kept = np.cumsum(s**2) / np.sum(s**2)
        a, b = factors(found, module)
        rank = len(a)
        assert kept[rank - 1] >= share - 1e-6
        assert rank == 1 or kept[rank - 2] < share + 1e-6
        if rank < len(s) and s[rank - 1] - s[rank] > 1e-3 * s[0]:
            np.testing.assert_allclose(b @ a, (u[:, :rank] * s[:rank]) @ vt[:rank], rtol=1e-4, atol=1e-4 * s[0])


def test_a_module_that_does_not_change_has_rank_one(tools: ModuleType, place: Any) -> None:
    zero, other = (np.zeros((2, 5)), np.ones((4, 2))), (np.ones((2, 5)), np.ones((4, 2)))
    uri = place.adapter({"l.a": zero, "l.b": other})
    found = tools.merge(place, {**tools.adapters("svd", [uri], [{}]), **energy(0.9)})
    a, b = factors(found, "l.a")
    assert a.shape == (1, 5)
    assert not (b @ a).any()


def test_the_plan_shows_bounds_and_its_digest_is_that_of_the_merge(tools: ModuleType, place: Any) -> None:
    document = {**tools.adapters("task_arithmetic", sources(place), [{}] * 3), **energy(0.9)}
    out = place.out()
    plan = api.plan(document, out)
    assert plan.problems == ()
    assert plan.unsettled
    said = plan_json(plan)
    assert said["settles"] == {"energy": 0.9, "rank_bound": 13}
    assert (said["passes"], said["stages"], said["units"]) == (2, 2, 8)
    assert any("at most 13" in line for line in plan_lines(plan))
    report = tools.run(plan)
    found = tools.read_tensors(out)
    assert report.plan_digest == plan.digest
    assert report.rank == max(ranks(found).values()) < 13
    assert report.bytes_written < said["write_bytes"]
    assert report.bytes_read == 2 * said["read_bytes"]
    assert len(set(ranks(found).values())) > 1
    assert tools.run(api.plan(document, out)).already_done
    assert api.plan({**document, **energy(0.8)}, out).digest != plan.digest


def test_bytes_do_not_depend_on_memory_or_workers(tools: ModuleType, place: Any) -> None:
    uris = sources(place)
    for method, shared in (("task_arithmetic", {}), ("ties", {"density": 0.4, "scope": "model"})):
        document = {**tools.adapters(method, uris, [{}] * 3, shared), **energy(0.9)}
        outs = []
        for memory, workers in ((None, 1), (0, 1), (0, 3)):
            outs.append(place.out())
            tools.run(api.plan(document, outs[-1]), memory=memory, workers=workers)
        first, *others = [tools.read_bytes(out) for out in outs]
        assert all(other == first for other in others)


def test_an_adapter_of_many_ranks_loads_in_peft(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    entries = []
    for seed in range(2):
        torch.manual_seed(seed + 1)
        lora = peft.LoraConfig(r=4 + seed, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), lora)
        model.save_pretrained(str(tmp_path / f"a{seed}"))
        entries.append({"adapter": str(tmp_path / f"a{seed}")})
    document = {"merge_method": "ties", "parameters": {"density": 0.5}, "adapters": entries, **energy(0.8)}
    api.merge({**document, "base_model": str(tmp_path / "base")}, tmp_path / "out")
    file = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len({len(x) for name, x in file.items() if "lora_A" in name}) > 1
    loaded = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    kept = peft.get_peft_model_state_dict(loaded)
    assert kept.keys() == file.keys()
    for name, value in file.items():
        assert torch.equal(kept[name], value)
    layers = [layer for layer in loaded.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    assert {layer.scaling["default"] for layer in layers} == {1.0}


# ---- stops, kills, replays -------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for seed in range(2):
        adapter(tmp_path / f"a{seed}", seed)
    return tmp_path


def manifest(folder: Path) -> dict[str, Any]:
    return {"adapters": [{"adapter": str(folder / f"a{seed}")} for seed in range(2)], **energy(0.7)}


@pytest.mark.parametrize("count", range(1, 5))
def test_what_was_stopped_anywhere_is_finished_by_the_same_command(here: Path, count: int) -> None:
    api.merge(manifest(here), here / "whole")
    stop, done, last = Stop(), 0, 0

    def listen(progress: Any) -> None:
        nonlocal done, last
        done += progress.units_done not in (0, last)
        last = progress.units_done
        if done == count:
            stop.set(signal.SIGTERM)

    planned = api.plan(manifest(here), here / "out")
    with pytest.raises(StoppedError):
        api.run_planned(planned, workers=1, listener=listen, stop=stop)
    assert names(here / "out") == set()
    report = api.merge(manifest(here), here / "out", workers=1)
    assert report.content_digest == content_digest(here / "whole")
    assert not (here / "out" / ".raymerge").exists()
    # Two modules, two stages: what was done is not done again.
    assert report.units_resumed == max(0, count - 2)


_KILLED = """
import os, signal, sys
from merger import api
count = 0
def listen(progress):
    global count
    count += progress.units_done > 0
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
import json, merger.run
merger.run.FLUSH_SECONDS = 0.0
api.merge(json.loads(sys.argv[1]), sys.argv[2], workers=1, listener=listen)
"""


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_was_killed_in_either_stage_is_finished_by_the_same_command(here: Path, count: int) -> None:
    api.merge(manifest(here), here / "whole")
    arguments = [sys.executable, "-c", _KILLED, json.dumps(manifest(here)), str(here / "out"), str(count)]
    ended = subprocess.run(arguments, cwd=ROOT, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == -signal.SIGKILL
    assert names(here / "out") == set()
    report = api.merge(manifest(here), here / "out")
    assert report.content_digest == content_digest(here / "whole")


def test_verify_replays_it_and_notices_other_ranks(here: Path) -> None:
    api.merge(manifest(here), here / "out")
    found = verify_output(str(here / "out"), replay=None)
    assert found.replayed == 4
    result = here / "out" / "raymerge.json"
    document = json.loads(result.read_text())
    assert set(document["ranks"]) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    document["ranks"] = {name: rank + 1 for name, rank in document["ranks"].items()}
    result.write_text(json.dumps(document))
    with pytest.raises(MergeFailedError):
        verify_output(str(here / "out"), replay=None)


def test_a_unit_looks_whether_its_rank_still_is_the_least(here: Path) -> None:
    planned = api.plan(manifest(here), here / "out")
    keys = measured_results(planned)
    wrong = settle(planned, dict.fromkeys(keys, 8))
    with pytest.raises(MergeFailedError) as caught:
        api.run_planned(wrong)
    assert [p.code for p in caught.value.problems] == ["rank-moved"]


def test_settling_is_the_plan_that_these_ranks_would_have_had(here: Path) -> None:
    """Where all modules have one rank, a manifest can say it: the same files at the same places."""
    planned = api.plan(manifest(here), here / "out")
    settled = settle(planned, dict.fromkeys(measured_results(planned), 3))
    by_hand = api.plan({**manifest(here), "output": {"store": {"svd": {"rank": 3}}}}, here / "out")
    assert settled.outputs == by_hand.outputs
    for ours, theirs in zip(settled.tasks, by_hand.tasks, strict=True):
        (one,), (other,) = ours.results, theirs.results
        assert one.places == other.places
        assert replace(one.store, energy=None) == other.store
    assert settled.identity == planned.digest != settled.digest
    assert not settled.unsettled
    assert all(r.store.measure for task in measuring(planned).tasks for r in task.results)


def test_a_plan_with_bounds_is_never_run_as_it_is(here: Path) -> None:
    """A runner that is handed one refuses it, rather than pad factors to their bounds."""
    planned: MergePlan = replace(api.plan(manifest(here), here / "out"), settled_from="elsewhere")
    with pytest.raises(MergeFailedError) as caught:
        api.run_planned(planned)
    assert [p.code for p in caught.value.problems] == ["rank-moved"]


# ---- the dense way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties"])
def test_the_dense_way_gives_what_the_core_gives(tools: ModuleType, place: Any, method: str) -> None:
    document = tools.adapters(method, sources(place), [{"weight": w} for w in (1.0, 0.5, -2.0)], {"lambda": 0.5}
                              if method == "task_arithmetic" else {})  # fmt: skip
    found = [
        tools.merge(place, {**document, "output": {"store": {"svd": {"rank": 5, "exact": exact}}}})
        for exact in (False, True)
    ]
    for module in MODULES:
        (a, b), (c, d) = (factors(tensors, module) for tensors in found)
        np.testing.assert_allclose(d @ c, b @ a, rtol=1e-5, atol=1e-5 * float(np.abs(b @ a).max()))


def test_what_is_merged_in_the_core_takes_no_dense_way(tools: ModuleType, place: Any) -> None:
    for method in ("tsv_m", "core_ties", "svc"):
        document = tools.adapters(method, sources(place), [{}] * 3, output={"store": {"svd": {"exact": True}}})
        assert {p.code for p in api.plan(document, place.out()).problems} == {"null-space"}


def test_a_store_that_has_no_use_is_refused(tools: ModuleType, place: Any) -> None:
    uris = sources(place)
    peft_document = {"combination_type": "svd", "adapters": [{"adapter": u} for u in uris], **energy(0.9)}
    assert [p.code for p in api.plan(peft_document, place.out()).problems] == ["conflict"]
    models = [place.model({"w": np.ones((3, 3))}) for _ in range(2)]
    document = {**tools.models("task_arithmetic", models[0], models[1:], [{"weight": 1.0}]), **energy(0.9)}
    assert [p.code for p in api.plan(document, place.out()).problems] == ["bad-store"]
