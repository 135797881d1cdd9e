"""What holds of every streamed method: no cut changes a bit, no mask hides a NaN, adapters are served as models are."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from merger import api
from merger.errors import MergeFailedError
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan

Array = npt.NDArray[Any]

W = {"weight": 0.8}
CASES: dict[str, tuple[str, dict[str, float], dict[str, Any]]] = {
    "nuslerp": ("nuslerp", W, {}),
    "nuslerp rows": ("nuslerp", W, {"nuslerp_flatten": False}),
    "nuslerp columns": ("nuslerp", W, {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "multislerp": ("multislerp", W, {}),
    "karcher": ("karcher", {}, {}),
    "model_stock": ("model_stock", {}, {}),
    "model_stock rows": ("model_stock", {}, {"filter_wise": True}),
    "sce": ("sce", {}, {}),
    "sce topk": ("sce", {}, {"select_topk": 0.3}),
    "ram": ("ram", {}, {"epsilon": 0.6}),
    "ramplus_tl": ("ramplus_tl", {}, {"epsilon": 0.6}),
    "magmax": ("magmax", W, {"lambda": 0.5}),
    "consensus_ta": ("consensus_ta", {"weight": 0.8, "tall_lambda": 0.5}, {}),
    "pcb": ("pcb", {}, {"scope": "tensor"}),
    "pcb model": ("pcb", {}, {"lambda": 0.5}),
    "breadcrumbs": ("breadcrumbs", {"weight": 0.8, "density": 0.4, "gamma": 0.1}, {}),
    "breadcrumbs l1": ("breadcrumbs", {"weight": 0.8, "density": 0.4, "gamma": 0.1}, {"rescale": "l1"}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"weight": 0.8, "density": 0.4}, {}),
    "della": ("della", {"weight": 0.8, "density": 0.4}, {"rescale": "inverse"}),
    "della_linear": ("della_linear", {"weight": 0.8, "density": 0.4}, {}),
    "arcee_fusion": ("arcee_fusion", {}, {}),
}
SUMMING = (
    "nuslerp", "nuslerp columns", "multislerp", "karcher", "model_stock", "sce", "sce topk", "breadcrumbs l1",
    "della_linear",
)  # fmt: skip
"""Methods with float sums, whose partials belong to units: another cut is another plan, right to float64's rounding."""
OPEN = ("karcher", "arcee_fusion")
"""Not closed on deltas."""
ONE_OTHER = ("arcee_fusion",)


def manifest(tools: ModuleType, case: str, base: str, others: list[str], **keys: Any) -> Any:
    method, each, shared = CASES[case]
    others = others[:1] if method in ONE_OTHER else others
    return tools.models(method, base, others, [each] * len(others), shared, **keys)


@pytest.fixture
def document(tools: ModuleType, place: Any, request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """Three models of many tiles, with many equal magnitudes in one tensor."""

    def make(seed: int) -> str:
        g = np.random.default_rng(seed)
        return str(place.model({
            "model.layers.0.w": g.standard_normal((160, 90)), "model.layers.1.w": g.integers(-3, 4, (210, 60)) / 4,
            "model.norm": g.standard_normal(257),
        }))  # fmt: skip

    found = manifest(tools, request.param, make(0), [make(1), make(2)])
    assert isinstance(found, dict)
    return found


def outcome(tools: ModuleType, place: Any, plan: MergePlan, **options: Any) -> dict[str, bytes]:
    out = place.out()
    tools.run(tools.at(plan, out), **options)
    found = tools.read_bytes(out)
    assert isinstance(found, dict)
    return found


def recut(tools: ModuleType, plan: MergePlan, **changes: Any) -> MergePlan:
    """As `tools.recut`; a vector that a method needs whole stays so."""
    changed = tools.recut(plan, **changes)
    tasks = tuple(
        old if old.vector and old.tile_rows >= old.rows else new
        for old, new in zip(plan.tasks, changed.tasks, strict=True)
    )
    found = type(plan)(**{**{f: getattr(plan, f) for f in plan.__dataclass_fields__}, "tasks": tasks})
    assert isinstance(found, MergePlan)
    return found


@pytest.mark.parametrize("document", CASES, indirect=True)
def test_memory_and_workers_change_nothing(tools: ModuleType, place: Any, document: Mapping[str, Any]) -> None:
    plan = recut(tools, api.plan(document, place.out()), tile_rows=16, extent_rows=4)
    assert plan.problems == ()
    whole = outcome(tools, place, plan)
    for memory, workers in ((0, 1), (0, 3), (peak_bytes(plan) * 2 + (2 << 20), 2), (1 << 30, 5)):
        assert outcome(tools, place, plan, memory=memory, workers=workers) == whole, (memory, workers)


@pytest.mark.parametrize("document", CASES, indirect=True)
def test_any_cut_is_the_whole(
    tools: ModuleType, place: Any, document: Mapping[str, Any], request: pytest.FixtureRequest
) -> None:
    case = request.node.callspec.params["document"]
    planned = recut(tools, api.plan(document, place.out()), tile_rows=16)
    whole = outcome(tools, place, planned)
    cuts: list[dict[str, Any]] = [{"extent_rows": 1}, {"extent_rows": 3}]
    if case != "pcb model":
        cuts += [{"fused": False, "extent_rows": 2}, {"fused": False, "extent_rows": 7}]
    for cut in cuts:
        found = outcome(tools, place, recut(tools, planned, **cut), workers=2, memory=0)
        if case in SUMMING:
            for file, data in whole.items():
                ours, theirs = (np.frombuffer(d, np.float32, offset=8 + int.from_bytes(d[:8], "little"))
                                for d in (found[file], data))  # fmt: skip
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
        else:
            assert found == whole, cut


@pytest.mark.parametrize("document", [c for c in CASES if c not in SUMMING], indirect=True)
def test_tiles_change_nothing_either(tools: ModuleType, place: Any, document: Mapping[str, Any]) -> None:
    planned = api.plan(document, place.out())
    whole = outcome(tools, place, planned)
    for tile in (1, 17, 5000):
        assert outcome(tools, place, recut(tools, planned, tile_rows=tile)) == whole, tile


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_what_is_no_number_ends_the_merge(tools: ModuleType, place: Any, case: str, where: int, bad: float) -> None:
    if CASES[case][0] in ONE_OTHER and where == 2:
        return
    g = np.random.default_rng(3)
    values = [g.standard_normal((9, 5)).astype(np.float32) for _ in range(3)]
    values[where][3, 2] = bad
    uris = [place.model({"w": v}) for v in values]
    with pytest.raises(MergeFailedError) as caught:
        tools.merge(place, manifest(tools, case, uris[0], uris[1:]))
    assert caught.value.problems[0].code == "not-finite"
    assert f"{uris[where]} holds NaN or Inf in w, first in row 3" in caught.value.problems[0].why


@pytest.mark.parametrize("case", CASES)
def test_empty_tensors_and_scalars(tools: ModuleType, place: Any, case: str) -> None:
    tensors = {"no_rows": np.zeros((0, 4)), "no_columns": np.zeros((4, 0)), "nothing": np.zeros(0),
               "scalar": np.array(0.5), "one": np.array([[0.5]])}  # fmt: skip
    uris = [place.model({n: x + i for n, x in tensors.items()}) for i in (0, 1, 3)]
    found = tools.merge(place, manifest(tools, case, uris[0], uris[1:]))
    assert {n: tuple(x.shape) for n, x in found.items()} == {n: x.shape for n, x in tensors.items()}


@pytest.mark.parametrize("case", CASES)
def test_models_that_are_the_base_give_the_base(tools: ModuleType, place: Any, case: str) -> None:
    x = (np.random.default_rng(4).integers(-9, 9, (7, 5)) / 8).astype(np.float32)
    uris = [place.model({"w": x}) for _ in range(3)]
    np.testing.assert_allclose(tools.merge_one(place, manifest(tools, case, uris[0], uris[1:])), x, rtol=1e-6)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.split()[0] not in (*ONE_OTHER, "nuslerp", "della", "della_linear")]
)
def test_the_order_of_sources_matters_not(tools: ModuleType, place: Any, case: str) -> None:
    g = np.random.default_rng(5)
    uris = [place.model({"w": g.standard_normal((11, 6)).astype(np.float32)}) for _ in range(4)]
    found = [
        tools.merge_one(place, manifest(tools, case, uris[0], [uris[i] for i in order]))
        for order in ((1, 2, 3), (3, 1, 2), (2, 1, 3))
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-6)


ITSELF = ["multislerp", "sce", "ram", "ramplus_tl", "magmax", "breadcrumbs", "breadcrumbs_ties", "della",
          "della_linear", "karcher"]  # fmt: skip


@pytest.mark.parametrize("method", ITSELF)
def test_one_source_at_weight_one_is_itself(tools: ModuleType, place: Any, method: str) -> None:
    g = np.random.default_rng(6)
    base, source = ((g.integers(-100, 100, (37, 5)) / 8).astype(np.float32) for _ in range(2))
    each = {"weight": 1.0} if "weight" in CASES[method][1] else {}
    shared = {"r": 0.0} if method == "ramplus_tl" else {}
    manifest = tools.models(
        method, None if method == "karcher" else place.model({"w": base}), [place.model({"w": source})], [each], shared
    )
    np.testing.assert_allclose(tools.merge_one(place, manifest), source, rtol=1e-6)


# ---- adapters --------------------------------------------------------------------------------------------------------

MODULE = "model.layers.0.q_proj"


class Adapters:
    """Two adapters over a base, in small whole numbers, and the models that they stand for."""

    def __init__(self, place: Any) -> None:
        g = np.random.default_rng(7)
        self.base = (g.integers(-9, 9, (6, 9)) / 8).astype(np.float32)
        pairs = [(g.integers(-2, 3, (2, 9)).astype(np.float32), g.integers(-2, 3, (6, 2)).astype(np.float32) / 4)
                 for _ in range(2)]  # fmt: skip
        names = f"{MODULE}.weight"
        self.base_uri = place.model({names: self.base, "norm": np.ones(5)})
        self.adapters = [place.adapter({MODULE: p}) for p in pairs]
        self.models = [place.model({names: self.base + b @ a, "norm": np.ones(5)}) for a, b in pairs]


@pytest.mark.parametrize("case", CASES)
def test_a_fold_is_the_merge_of_the_models_that_the_adapters_stand_for(
    tools: ModuleType, place: Any, case: str
) -> None:
    d = Adapters(place)
    method, each, shared = CASES[case]
    count = 1 if method in ONE_OTHER else 2
    fold = tools.adapters(
        method, d.adapters[:count], [each] * count, shared, base_model=d.base_uri, output={"kind": "model"}
    )
    # karcher counts a base that models name; the base of a fold is only where the adapters lie.
    models = tools.models(method, None if method == "karcher" else d.base_uri, d.models[:count], [each] * count, shared)
    found, expected = tools.merge(place, fold), tools.merge(place, models)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value.numpy(), rtol=1e-6, atol=1e-6)
    assert not torch.equal(found[f"{MODULE}.weight"], torch.from_numpy(d.base))


@pytest.mark.parametrize("case", ["karcher", "arcee_fusion", "slerp"])
def test_what_no_adapter_changes_is_copied(tools: ModuleType, place: Any, case: str) -> None:
    g = np.random.default_rng(8)
    norm = g.standard_normal(257).astype(np.float32)
    base = place.model({f"{MODULE}.weight": g.standard_normal((6, 9)), "norm": norm})
    pair = (g.standard_normal((2, 9)), g.standard_normal((6, 2)))
    method, each, shared = CASES.get(case, (case, {}, {"t": 0.3}))
    document = tools.adapters(
        method, [place.adapter({MODULE: pair})], [each], shared, base_model=base, output={"kind": "model"}
    )
    plan = api.plan(document, place.out())
    (task,) = [task for task in plan.tasks if task.name == "norm"]
    assert task.results[0].store.kind == "copy"
    np.testing.assert_array_equal(tools.merge(place, document)["norm"].numpy(), norm)


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][0] not in OPEN])
def test_adapters_make_an_adapter_with_the_same_delta(tools: ModuleType, place: Any, case: str) -> None:
    d = Adapters(place)
    method, each, shared = CASES[case]
    document = tools.adapters(method, d.adapters, [each] * 2, shared, output={"store": {"svd": {"rank": 6}}})
    found = tools.merge(place, document)
    a, b = (found[f"base_model.model.{MODULE}.lora_{w}.weight"].double().numpy() for w in "AB")
    fold = tools.adapters(method, d.adapters, [each] * 2, shared, base_model=d.base_uri, output={"kind": "model"})
    expected = tools.merge(place, fold)[f"{MODULE}.weight"].double().numpy() - d.base
    np.testing.assert_allclose(b @ a, expected, atol=1e-5)
