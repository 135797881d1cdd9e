"""The plan is a pure function of the manifest and the pinned headers; it reads no tensor and needs no torch."""

from __future__ import annotations

import itertools
import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from merger import api
from merger.catalog import describe, inspect_source
from merger.formats.safetensors import FIRST_READ_BYTES
from merger.planning.build import check_machine, join_plans, write_bytes
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan, Task
from merger.planning.summary import passes, plan_json, plan_lines
from merger.storage import MemoryStore, RangeRead

ROOT = Path(__file__).parents[3]


class Sources:
    """A base, two models and two adapters."""

    def __init__(self, place: Any) -> None:
        g = np.random.default_rng(0)

        def model() -> str:
            return str(
                place.model(
                    {f"model.layers.{i}.w.weight": g.standard_normal((64, 48)) for i in range(3)}
                    | {"model.norm.weight": g.standard_normal(48), "ids": torch.arange(5)},
                    num_hidden_layers=3,
                )
            )

        def adapter() -> str:
            return str(
                place.adapter(
                    {f"model.layers.{i}.w": (g.standard_normal((4, 48)), g.standard_normal((64, 4))) for i in range(2)}
                )
            )

        self.base, self.a, self.b = model(), model(), model()
        self.adapters = [adapter(), adapter()]


@pytest.fixture
def sources(place: Any) -> Sources:
    return Sources(place)


def ties(tools: ModuleType, s: Sources, weight: float = 1.0, **keys: Any) -> dict[str, Any]:
    found = tools.models(
        keys.pop("method", "ties"), s.base, [s.a, s.b], [{"weight": weight}, {"weight": 0.5}],
        {"density": keys.pop("density", 0.5)}, **keys,
    )  # fmt: skip
    assert isinstance(found, dict)
    return found


def digest(manifest: Any, out: str | None = None) -> str:
    plan = api.plan(manifest, out)
    assert plan.problems == ()
    return plan.digest


# ---- digests ---------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_what_decides_bytes(tools: ModuleType, place: Any, sources: Sources) -> None:
    known = digest(ties(tools, sources))
    assert digest(ties(tools, sources)) == known
    assert digest(ties(tools, sources), place.out()) == digest(ties(tools, sources), "/tmp/elsewhere") == known
    different = [
        digest(ties(tools, sources, weight=1.1)),
        digest(ties(tools, sources, density=0.4)),
        digest(ties(tools, sources, dtype="bfloat16")),
        digest(ties(tools, sources, method="dare_ties")),
        digest(ties(tools, sources, method="dare_ties", seed=1)),
        api.plan(ties(tools, sources), device="cuda").digest,
    ]
    assert len({known, *different}) == 1 + len(different)
    assert digest(ties(tools, sources, method="dare_ties", seed=0)) == different[3]


def test_the_order_of_keys_and_the_form_of_the_manifest_matter_not(tools: ModuleType, sources: Sources) -> None:
    manifest = ties(tools, sources)
    turned = dict(reversed(manifest.items()))
    assert digest(turned) == digest(json.dumps(turned) + "\n") == digest(manifest)
    loaded = api.as_manifest(manifest)
    assert digest(loaded) == digest(manifest)


def test_another_pin_is_another_plan(tools: ModuleType, sources: Sources) -> None:
    before = digest(ties(tools, sources))
    files = MemoryStore(sources.a.removeprefix("memory://")).files
    files["model.safetensors"][-1] ^= 1
    assert digest(ties(tools, sources)) != before
    files["model.safetensors"][-1] ^= 1
    assert digest(ties(tools, sources)) == before


def test_a_plan_survives_pickling(tools: ModuleType, place: Any, sources: Sources) -> None:
    plan = api.plan(ties(tools, sources), place.out())
    again = pickle.loads(pickle.dumps(plan))
    assert again.digest == plan.digest
    assert again.units == plan.units


def test_replayed_from_its_own_manifest(tools: ModuleType, place: Any, sources: Sources) -> None:
    for manifest in (ties(tools, sources), tools.adapters("ties", sources.adapters, [{}, {}], {"density": 0.5})):
        plan = api.plan(manifest, place.out())
        assert api.plan(json.loads(json.dumps(plan.manifest)), place.out()).digest == plan.digest


def test_memory_and_workers_are_no_part_of_a_plan(tools: ModuleType, place: Any, sources: Sources) -> None:
    plan = api.plan(ties(tools, sources), place.out())
    tools.run(plan, workers=3, memory=0)
    stored = json.loads(bytes(MemoryStore(plan.outputs[0].path.removeprefix("memory://")).files["raymerge.json"]))
    assert stored["plan_digest"] == plan.digest


# ---- what planning touches -------------------------------------------------------------------------------------------


def test_planning_and_inspecting_read_headers_only(
    tools: ModuleType, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = {"model.w.weight": torch.zeros(512, 512)}
    models = [place.model(big) for _ in range(3)]
    adapters = [place.adapter({"model.w": (torch.zeros(256, 512), torch.zeros(512, 256))}) for _ in range(2)]
    read_into = MemoryStore.read_into
    seen: list[str] = []

    def guarded(self: MemoryStore, name: str, reads: Sequence[RangeRead], *, pin: str | None = None) -> None:
        if name.endswith(".safetensors"):
            header = 8 + int.from_bytes(self.files[name][:8], "little")
            for read in reads:
                assert read.start + read.into.nbytes <= max(header, FIRST_READ_BYTES), name
            seen.append(name)
        read_into(self, name, reads, pin=pin)

    monkeypatch.setattr(MemoryStore, "read_into", guarded)
    for manifest in (
        tools.models("ties", models[0], models[1:], [{"weight": 1.0}] * 2, {"density": 0.5}),
        tools.adapters("ties", adapters, [{}, {}], {"density": 0.5, "scope": "model"}),
        tools.adapters("task_arithmetic", adapters, [{}, {}], base_model=models[0], output={"kind": "model"}),
    ):
        plan = api.plan(manifest, place.out())
        assert plan.problems == ()
        plan_json(plan)
        list(plan_lines(plan))
    for reference in (models[0], adapters[0]):
        describe(inspect_source(reference))
    assert seen.count("model.safetensors") == 5
    assert seen.count("adapter_model.safetensors") == 5


PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"torch", "transformers", "ray", "peft", "bitsandbytes", "numba", "safetensors"}}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
from merger import api
from merger.catalog import describe, inspect_source
from merger.planning.summary import plan_json, plan_lines

for manifest in {manifests!r}:
    plan = api.plan(manifest, "/nowhere/out")
    assert not plan.problems, plan.problems
    plan_json(plan)
    list(plan_lines(plan))
    print(plan.digest)
for source in {sources!r}:
    describe(inspect_source(source))
assert "torch" not in sys.modules
"""


def test_planning_and_inspecting_import_no_torch(
    tools: ModuleType, place: Any, sources: Sources, tmp_path: Path
) -> None:
    def on_disk(uri: str) -> str:
        folder = tmp_path / uri.removeprefix("memory://")
        folder.mkdir(exist_ok=True)
        for name, data in MemoryStore(uri.removeprefix("memory://")).files.items():
            (folder / name).write_bytes(bytes(data))
        return str(folder)

    base, a, b = (on_disk(u) for u in (sources.base, sources.a, sources.b))
    adapters = [on_disk(u) for u in sources.adapters]
    manifests = [
        tools.models("dare_ties", base, [a, b], [{"weight": 1.0}] * 2, {"density": 0.5}),
        tools.adapters("ties", adapters, [{}, {}], {"density": 0.5}),
        tools.adapters("task_arithmetic", adapters, [{}, {}], base_model=base, output={"kind": "model"}),
        {"combination_type": "ties_svd", "adapters": [{"adapter": x} for x in adapters], "weights": [1.0, 2.0],
         "density": 0.5},
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(manifests=manifests, sources=[base, adapters[0]])],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest(m) for m in manifests]


# ---- units and spans -------------------------------------------------------------------------------------------------


def test_every_row_has_one_unit_and_every_byte_one_place(tools: ModuleType, place: Any, sources: Sources) -> None:
    plan = tools.recut(api.plan(ties(tools, sources), place.out()), tile_rows=16, extent_rows=1, fused=False)
    units = plan.units
    assert [u.index for u in units] == list(range(len(units)))
    assert plan.num_stages == 3
    for index, task in enumerate(plan.tasks):
        for stage in range(plan.num_stages):
            spans = [(u.first, u.last) for u in units if u.task == index and u.stage == stage]
            if spans:
                assert spans[0][0] == 0
                assert spans[-1][1] == task.rows
                assert all(x[1] == y[0] for x, y in itertools.pairwise(spans))
    (file,) = (f for f in plan.outputs[0].files if f.kind == "tensors")
    places = sorted(p.span(0, p.rows) for t in plan.tasks for r in t.results for p in r.places)
    assert places[0][0] == len(file.prefix)
    assert places[-1][1] == file.size
    assert all(x[1] == y[0] for x, y in itertools.pairwise(places))
    assert write_bytes(plan) == sum(f.size for f in plan.outputs[0].files)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 64, 79, 80, 81, 1000])
@pytest.mark.parametrize("tile, tiles", [(1, 1), (1, 7), (16, 1), (64, 1), (64, 3)])
def test_spans_cover_and_join_short_tails(rows: int, tile: int, tiles: int) -> None:
    task = Task(
        name="w", rows=rows, cols=3, base=None, entries=(), results=(), tile_rows=tile, extent_rows=tile * tiles
    )
    spans = list(task.row_spans())
    assert spans[0][0] == 0
    assert spans[-1][1] == rows
    bounds = list(task.tiles(0, rows))
    assert [x[0] for x in bounds] == sorted({x[0] for x in bounds})
    if rows:
        assert bounds[-1][1] == rows
        # Tiles of every extent are the tiles of the whole: that is what makes the cut invisible.
        assert [t for span in spans for t in task.tiles(*span)] == bounds
    if tile > 1:
        assert all(last - first >= min(rows, 16) for first, last in [*spans, *bounds] if rows)


# ---- refusals --------------------------------------------------------------------------------------------------------


def codes(manifest: Any) -> list[str]:
    plan = api.plan(manifest)
    assert plan.problems
    assert plan_json(plan)["digest"] is None
    return [p.code for p in plan.problems]


def test_everything_wrong_is_said_at_once(tools: ModuleType, place: Any) -> None:
    base = place.model({"a": np.zeros((2, 2)), "b": np.zeros((2, 2)), "c": np.zeros((2, 2))})
    other = place.model({"a": np.zeros((2, 3)), "b": torch.zeros(2, 2, dtype=torch.int64)})
    found = codes(tools.models("task_arithmetic", base, [other], [{"weight": 1.0}]))
    assert sorted(found) == ["dtype-mismatch", "missing-tensor", "shape-mismatch"]


def test_what_an_adapter_cannot_hold_is_refused(tools: ModuleType, sources: Sources) -> None:
    entries = [{"adapter": a} for a in sources.adapters]
    slerp = {"merge_method": "slerp", "base_model": sources.base, "adapters": entries[:1], "parameters": {"t": 0.5}}
    assert codes({**slerp, "output": {"kind": "adapter"}}) == ["not-closed"]
    assert codes(tools.adapters("linear", sources.adapters, [{}, {}], {"normalize": False})) == ["not-closed"]
    stored = tools.adapters("ties", sources.adapters, [{}, {}], {"density": 0.5}, output={"store": "concat"})
    assert codes(stored) == ["bad-store"]


def test_weights_that_cancel_are_refused(tools: ModuleType, sources: Sources) -> None:
    each = [{"weight": 1.0}, {"weight": -1.0}]
    assert set(codes(tools.models("linear", None, [sources.a, sources.b], each))) == {"weights-cancel"}
    assert set(codes(tools.adapters("linear", sources.adapters, each))) == {"weights-cancel"}


def test_float64_is_not_narrowed_in_silence(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(0)
    wide = place.model({"model.w.weight": torch.from_numpy(g.standard_normal((8, 6)))})
    same = place.model({"model.w.weight": torch.from_numpy(g.standard_normal((8, 6)))})
    adapter = place.adapter({"model.w": (g.standard_normal((2, 6)), g.standard_normal((8, 2)))})
    assert codes(tools.models("linear", None, [wide, same], [{"weight": 1.0}] * 2)) == ["dtype-mismatch"]
    fold = tools.adapters("task_arithmetic", [adapter], [{}], base_model=wide, output={"kind": "model"})
    assert codes(fold) == ["dtype-mismatch"]


def test_a_density_that_varies_has_no_meaning_over_a_whole_model(tools: ModuleType, sources: Sources) -> None:
    varied = [{"filter": "layers.0", "value": 0.2}, {"value": 0.5}]
    manifest = tools.models("ties", sources.base, [sources.a], [{"weight": 1.0}], {"density": varied, "scope": "model"})
    assert codes(manifest)
    assert api.plan({**manifest, "parameters": {"density": varied}}).problems == ()


def test_a_machine_too_small_is_refused(tools: ModuleType, place: Any, sources: Sources) -> None:
    plan = api.plan(ties(tools, sources), place.out())
    assert check_machine(plan, memory=peak_bytes(plan), free_bytes=write_bytes(plan)) == ()
    assert [p.code for p in check_machine(plan, memory=peak_bytes(plan) - 1, free_bytes=write_bytes(plan) - 1)] == [
        "memory", "disk",
    ]  # fmt: skip


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_reads_each_tensor_once(tools: ModuleType, place: Any, sources: Sources) -> None:
    plans = [api.plan(ties(tools, sources, density=d), place.out()) for d in (0.2, 0.4, 0.6)]
    joined = join_plans(plans)
    assert len(joined.tasks) == len(plans[0].tasks)
    assert len(joined.outputs) == 3
    assert passes(joined) == passes(plans[0])
    assert plan_json(joined)["read_bytes"] == plan_json(plans[0])["read_bytes"]
    assert isinstance(joined, MergePlan)
    assert joined.digest != plans[0].digest
