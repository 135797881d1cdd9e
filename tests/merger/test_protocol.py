"""The protocol, proven by small runs of what later methods and stores need of it: statistics of a whole model, stages,
the exact core, several places of one unit, several results of one read, rows that move, and any extent by itself.
"""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch

from merger import api
from merger.errors import MergeFailedError
from merger.manifest import load_manifest
from merger.planning.build import join_plans
from merger.planning.layout import lay_out
from merger.planning.nouns import DenseTerm, Entry, MergePlan, Output, Place, Result, StoreSpec
from merger.quantization.writing import blocks_parameters
from merger.run import Progression
from merger.storage import MemoryStore
from merger.tensors import DTYPES, F32, RowRun, TensorSpec
from merger.unit import UnitRunner, prepare_process
from merger.verify import verify_output

Array = npt.NDArray[Any]


NAMES = ("model.layers.0.w", "model.layers.2.w", "model.layers.10.w", "model.norm")
SHAPES = ((90, 33), (40, 70), (7, 11), (70,))


def weights_of(seed: int, *, whole: bool = True) -> dict[str, Array]:
    """Four tensors; `whole` makes magnitudes tie in every tensor and between them."""
    g = np.random.default_rng(seed)
    return {
        n: ((g.integers(-6, 7, s) / 8) if whole else g.standard_normal(s)).astype(np.float32)
        for n, s in zip(NAMES, SHAPES, strict=True)
    }


def outcome(tools: ModuleType, place: Any, plan: MergePlan, **options: Any) -> dict[str, bytes]:
    out = place.out()
    tools.run(tools.at(plan, out), **options)
    found = tools.read_bytes(out)
    assert isinstance(found, dict)
    return found


# ---- statistics of the whole model -----------------------------------------------------------------------------------


def test_model_wide_ties_is_ties_of_the_concatenated_model(twins: Any, tools: ModuleType, place: Any) -> None:
    base, *sources = [weights_of(i) for i in range(3)]
    manifest = tools.models(
        "ties", place.model(base), [place.model(s) for s in sources], [{"weight": 0.5}, {"weight": 1.0}],
        {"density": 0.3, "scope": "model"},
    )  # fmt: skip
    plan = api.plan(manifest, place.out())
    assert plan.num_stages == 3
    assert not any(task.fused for task in plan.tasks)
    found = tools.merge(place, manifest)
    deltas = [{n: twins.delta(s[n], base[n]) for n in NAMES} for s in sources]
    expected = twins.ties_model(base, deltas, [0.5, 1.0], [0.3, 0.3])
    for name in NAMES:
        np.testing.assert_allclose(found[name].numpy(), expected[name], rtol=1e-6, atol=1e-6)
    # It is another merge than one tensor at a time.
    apart = tools.merge(place, {**manifest, "parameters": {"density": 0.3}})
    assert not torch.equal(apart[NAMES[0]], found[NAMES[0]])
    # One threshold, and exactly k survive of each source.
    whole = tools.recut(plan, tile_rows=16, extent_rows=1)
    digests = {
        json.dumps({f: hash(b) for f, b in outcome(tools, place, whole, workers=w, memory=m).items()})
        for w, m in ((1, None), (2, 0), (5, 0), (5, None))
    }
    assert len(digests) == 1


def test_model_wide_pruning_keeps_k_of_the_model(tools: ModuleType, place: Any) -> None:
    base = {n: x * 0 for n, x in weights_of(0).items()}
    source = weights_of(1)
    numel = sum(x.size for x in source.values())
    for density in (0.01, 0.1, 0.5):
        manifest = tools.models(
            "magnitude_prune", place.model(base), [place.model(source)], [{"weight": 1.0, "density": density}],
            {"scope": "model"},
        )  # fmt: skip
        found = tools.merge(place, manifest)
        assert sum(int((x != 0).sum()) for x in found.values()) == int(density * numel)


def test_model_wide_ties_of_adapters(twins: Any, tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(2)
    shapes = {"model.layers.0.q": (12, 9), "model.layers.2.q": (9, 12), "model.layers.10.q": (5, 5)}
    pairs = [
        {n: (g.integers(-2, 3, (2, c)).astype(np.float32), g.integers(-2, 3, (r, 2)).astype(np.float32) / 4)
         for n, (r, c) in shapes.items()}
        for _ in range(2)
    ]  # fmt: skip
    uris = [place.adapter(p) for p in pairs]
    shared = {"density": 0.4, "scope": "model"}
    manifest = tools.adapters("ties", uris, [{}, {}], shared, output={"store": {"svd": {"rank": 12}}})
    out = [place.out() for _ in range(3)]
    for uri, workers in zip(out, (1, 2, 5), strict=True):
        tools.run(api.plan(manifest, uri), workers=workers)
    assert tools.read_bytes(out[0]) == tools.read_bytes(out[1]) == tools.read_bytes(out[2])
    found = tools.read_tensors(out[0])
    deltas = [{n: (b @ a).astype(np.float64) for n, (a, b) in p.items()} for p in pairs]
    zeros = {n: np.zeros(s) for n, s in shapes.items()}
    expected = twins.ties_model(zeros, deltas, [1.0, 1.0], [0.4, 0.4])
    for name in shapes:
        a, b = (found[f"base_model.model.{name}.lora_{w}.weight"].double().numpy() for w in "AB")
        np.testing.assert_allclose(b @ a, expected[name], rtol=1e-5, atol=1e-5)


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_slerp_in_stages(twins: Any, tools: ModuleType, place: Any) -> None:
    base, other = weights_of(3, whole=False), weights_of(4, whole=False)
    manifest = {"merge_method": "slerp", "base_model": place.model(base), "models": [{"model": place.model(other)}],
                "parameters": {"t": 0.35}}  # fmt: skip
    plan = tools.recut(api.plan(manifest, place.out()), tile_rows=16, extent_rows=1, fused=False)
    assert plan.num_stages == 2
    found = [outcome(tools, place, plan, workers=w, memory=m) for w, m in ((1, None), (2, 0), (5, 0))]
    assert found[0] == found[1] == found[2]
    tensors = safetensors.torch.load(found[0]["model.safetensors"])
    fused = tools.merge(place, manifest)
    for name in NAMES:
        expected = twins.slerp(base[name], other[name], 0.35)
        np.testing.assert_allclose(tensors[name].numpy(), expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(tensors[name].numpy(), fused[name].numpy(), rtol=1e-6, atol=1e-7)


def test_results_of_one_task_may_need_different_rounds(twins: Any, tools: ModuleType, place: Any) -> None:
    base, a, b = (place.model(weights_of(i)) for i in (5, 6, 7))
    each = [{"weight": 0.5, "density": 0.5}, {"weight": 1.0, "density": 0.25}]
    manifests = [
        tools.models("ties", base, [a, b], each),
        tools.models("dare_linear", base, [a, b], each),  # l1: needs sums, and no trim
        tools.models("task_arithmetic", base, [a, b], [{"weight": 1.0}] * 2),
        tools.models("magnitude_prune", base, [a, b], each, {"rescale": "l1"}),
    ]
    apart = [outcome(tools, place, api.plan(m, place.out())) for m in manifests]
    for order in ([0, 1, 2, 3], [1, 0], [2, 1, 0]):
        joined = join_plans([api.plan(manifests[i], place.out()) for i in order])
        assert len(joined.tasks) == len(NAMES)
        tools.run(joined)
        for output, i in zip(joined.outputs, order, strict=True):
            assert tools.read_bytes(output.path) == apart[i]


# ---- the exact core --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, cols", [(30, 20), (4, 40), (40, 4), (5, 5)])
@pytest.mark.parametrize("options", [{}, {"elect": "unweighted", "divisor": "count"}, {"rescale": "l1"}])
def test_ties_in_the_core(
    twins: Any, tools: ModuleType, place: Any, rows: int, cols: int, options: dict[str, str]
) -> None:
    g = np.random.default_rng(8)
    pairs = [
        (g.standard_normal((r, cols)).astype(np.float32), g.standard_normal((rows, r)).astype(np.float32))
        for r in (2, 4)
    ]
    scalings, weights, density = [2.0, 0.5], [1.0, 0.6], 0.4
    uris = [place.adapter({"l.q": p}, scaling=s) for p, s in zip(pairs, scalings, strict=True)]
    document = tools.adapters("ties", uris, [{"weight": w} for w in weights], {"density": density, **options},
                              output={"store": {"svd": {"rank": 6}}})  # fmt: skip
    manifest = load_manifest(document).model_copy(update={"space": "core"})
    plan = api.plan(manifest, place.out())
    assert [t.results[0].space for t in plan.tasks] == ["core"]
    tools.run(plan)
    found = tools.read_tensors(plan.outputs[0].path)
    left, right, cores = twins.cores([(a, b * s) for (a, b), s in zip(pairs, scalings, strict=True)])
    merged = twins.ties(np.zeros_like(cores[0]), cores, weights, [density] * 2, **options)
    expected = left @ merged @ right.T
    a, b = (found[f"base_model.model.l.q.lora_{w}.weight"].double().numpy() for w in "AB")
    np.testing.assert_allclose(b @ a, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_core_refuses_what_it_cannot_mean(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(8)
    uris = [place.adapter({"l.q": (g.standard_normal((2, 6)), g.standard_normal((5, 2)))}) for _ in range(2)]
    for method, shared in (("ties", {"density": 0.4, "scope": "model"}), ("dare_ties", {"density": 0.4})):
        manifest = load_manifest(tools.adapters(method, uris, [{}, {}], shared)).model_copy(update={"space": "core"})
        assert api.plan(manifest).problems


# ---- several places of one unit --------------------------------------------------------------------------------------


def quantised(plan: MergePlan) -> MergePlan:
    """A plan of one tensor, its result stored as nf4: codes and absmax of the same rows."""
    (task,) = plan.tasks
    (result,) = task.results
    specs = [
        TensorSpec("w", DTYPES["U8"], (task.rows * task.cols // 2, 1)),
        TensorSpec("w.absmax", F32, (task.rows * task.cols // 64,)),
    ]
    layout = lay_out(0, {"model.safetensors": specs})

    def put(name: str, part: str, row_bytes: int) -> Place:
        return replace(layout.place(name, part), row_bytes=row_bytes, rows=task.rows)

    places = (put("w", "codes", task.cols // 2), put("w.absmax", "absmax", 4 * task.cols // 64))
    recode = blocks_parameters("nf4", 64, 0, task.cols)
    assert not isinstance(recode, str)
    store = StoreSpec("coded", recode=(*recode, ("state", "{}")))
    (output,) = plan.outputs
    others = [f for f in output.files if f.kind != "tensors"]
    return replace(
        plan, tasks=(replace(task, results=(Result(result.call, store, places),)),),
        outputs=(Output(output.path, output.kind, (*layout.files, *others)),),
    )  # fmt: skip


def test_weight_and_scales_from_one_unit(tools: ModuleType, place: Any) -> None:
    g = torch.Generator().manual_seed(9)
    a, b = torch.randn(130, 192, generator=g), torch.randn(130, 192, generator=g)
    manifest = tools.models(
        "task_arithmetic", place.model({"w": a}), [place.model({"w": b})], [{"weight": 0.5, "density": 0.5}]
    )
    manifest["models"][0]["parameters"].pop("density")
    dense = tools.merge(place, manifest)["w"]
    plan = quantised(tools.recut(api.plan(manifest, place.out()), tile_rows=16, extent_rows=3))
    found = outcome(tools, place, plan, workers=2, memory=0)
    assert found == outcome(tools, place, plan)
    tensors = safetensors.torch.load(found["model.safetensors"])

    from merger.quantization.grid import NF4

    absmax = dense.view(-1, 64).abs().amax(1)
    assert torch.equal(tensors["w.absmax"], absmax)
    codes = tensors["w"].reshape(-1)
    levels = torch.from_numpy(NF4)[torch.stack([codes >> 4, codes & 15], 1).reshape(-1, 64).long()]
    step = max(y - x for x, y in itertools.pairwise(NF4.tolist()))
    assert bool(
        ((levels * absmax[:, None] - dense.view(-1, 64)).abs() <= absmax[:, None] * step / 2 * (1 + 1e-6)).all()
    )


@pytest.mark.filterwarnings("ignore")
def test_written_nf4_is_that_of_bitsandbytes(tools: ModuleType, place: Any) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(33, 128, generator=torch.Generator().manual_seed(10))
    manifest = tools.models("linear", None, [place.model({"w": x})], [{"weight": 1.0}])
    plan = quantised(api.plan(manifest, place.out()))
    tools.run(plan)
    found = tools.read_tensors(plan.outputs[0].path)
    codes, state = functional.quantize_4bit(x, blocksize=64, compress_statistics=False, quant_type="nf4")
    assert torch.equal(found["w"].reshape(-1), codes.reshape(-1))
    assert torch.equal(found["w.absmax"], state.absmax)


def test_a_copy_goes_to_all_its_places(tools: ModuleType, place: Any) -> None:
    """Tied copies: one tensor read once, written twice."""
    x = torch.arange(12.0).reshape(4, 3)
    plan = api.plan(
        {"merge_method": "passthrough", "models": [{"model": place.model({"a": x, "b": x * 0})}]}, place.out()
    )
    first, second = plan.tasks
    (result,) = first.results
    both = replace(result, places=(*result.places, *second.results[0].places))
    plan = replace(plan, tasks=(replace(first, results=(both,)),))
    tools.run(plan)
    found = tools.read_tensors(plan.outputs[0].path)
    assert torch.equal(found["a"], x)
    assert torch.equal(found["b"], x)


# ---- several results of one read -------------------------------------------------------------------------------------


def content(out: str) -> str:
    stored = json.loads(bytes(MemoryStore(out.removeprefix("memory://")).files["raymerge.json"]))
    return str(stored["content_digest"])


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_sweep_reads_once_and_gives_what_three_runs_give(tools: ModuleType, place: Any, scope: str) -> None:
    base, a, b = (place.model(weights_of(i, whole=False)) for i in (11, 12, 13))
    manifests = [
        tools.models("ties", base, [a, b], [{"weight": w}, {"weight": 1.0}], {"density": d, "scope": scope})
        for w, d in ((0.5, 0.2), (1.0, 0.5), (-0.3, 0.9))
    ]
    apart = [tools.run(api.plan(m, place.out())) for m in manifests]
    joined = join_plans([api.plan(m, place.out()) for m in manifests])
    assert all(len(task.results) == 3 for task in joined.tasks)
    report = tools.run(joined, workers=2)
    assert [content(o.path) for o in joined.outputs] == [r.content_digest for r in apart]
    assert report.bytes_read == apart[0].bytes_read
    if scope == "tensor":  # statistics and the map of a tensor share one read of it
        assert report.bytes_read == sum(4 * x.size * 3 for x in weights_of(11).values())


def test_a_sweep_of_folds_copies_what_no_adapter_changes(tools: ModuleType, place: Any) -> None:
    g = np.random.default_rng(14)
    base = place.model({"l.w.weight": g.standard_normal((9, 8)), "norm.weight": g.standard_normal(8)})
    adapter = place.adapter({"l.w": (g.standard_normal((2, 8)), g.standard_normal((9, 2)))})
    manifests = [
        tools.adapters("task_arithmetic", [adapter], [{"weight": w}], base_model=base, output={"kind": "model"})
        for w in (0.5, 1.0, 2.0)
    ]
    apart = [tools.run(api.plan(m, place.out())) for m in manifests]
    joined = join_plans([api.plan(m, place.out()) for m in manifests])
    tools.run(joined)
    assert [content(o.path) for o in joined.outputs] == [r.content_digest for r in apart]


def test_a_sweep_of_copies_and_computations(tools: ModuleType, place: Any) -> None:
    model = place.model(weights_of(15))
    manifests: list[dict[str, object]] = [
        {"merge_method": "passthrough", "models": [{"model": model, "parameters": {"scale": s}}]} for s in (1.0, 2.0)
    ]  # at scale 1 the bytes are copied
    apart = [tools.run(api.plan(m, place.out())) for m in manifests]
    joined = join_plans([api.plan(m, place.out()) for m in manifests])
    tools.run(joined)
    assert [content(o.path) for o in joined.outputs] == [r.content_digest for r in apart]


def test_a_model_wide_sweep_of_outputs_that_share_some_tensors(tools: ModuleType, place: Any) -> None:
    """What one output excludes is a task of its own: the statistics of each output still cover all of its tensors."""
    g = np.random.default_rng(16)
    modules = ("model.layers.0.q", "model.layers.1.q")
    adapters = [
        place.adapter({n: (g.standard_normal((2, 7)), g.standard_normal((9, 2)) * s) for n, s in
                       zip(modules, (1.0, 5.0), strict=True)})
        for _ in range(2)
    ]  # fmt: skip
    manifests = []
    for exclude in ([], ["layers.0"]):
        document = tools.adapters("ties", adapters, [{}, {}], {"density": 0.3, "scope": "model"})
        if exclude:
            document["adapters"][0]["exclude"] = exclude
        manifests.append(document)
    apart = [tools.run(api.plan(m, place.out())) for m in manifests]
    joined = join_plans([api.plan(m, place.out()) for m in manifests])
    tools.run(joined)
    assert [content(o.path) for o in joined.outputs] == [r.content_digest for r in apart]


# ---- rows that move --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, 0])
def test_a_permuted_embedding(tools: ModuleType, place: Any, memory: int | None) -> None:
    g = np.random.default_rng(17)
    x, y = (g.standard_normal((100, 65)).astype(np.float32) for _ in range(2))
    uris = [place.model({"embed_tokens.weight": v}) for v in (x, y)]
    plan = tools.recut(
        api.plan(tools.models("linear", None, uris, [{"weight": 1.0}, {"weight": 3.0}]), place.out()),
        tile_rows=16, extent_rows=1,
    )  # fmt: skip
    (task,) = plan.tasks
    runs = (RowRun(0, 50, 20), RowRun(20, 0, 1), RowRun(30, 70, 30), RowRun(99, 5, 1))

    def expected(source: Array, runs_: tuple[RowRun, ...]) -> Array:
        out = np.zeros_like(source)
        for run in runs_:
            out[run.first : run.first + run.count] = source[run.stored : run.stored + run.count]
        return out

    for some in (runs, ()):
        entries = (Entry((DenseTerm(0, "embed_tokens.weight"),)), Entry((DenseTerm(1, "embed_tokens.weight", some),)))
        moved = replace(plan, tasks=(replace(task, entries=entries),))
        found = safetensors.torch.load(outcome(tools, place, moved, memory=memory)["model.safetensors"])
        np.testing.assert_allclose(
            found["embed_tokens.weight"].numpy(), (x + 3 * expected(y, some)) / 4, rtol=1e-6, atol=1e-7
        )


def test_a_permuted_view_of_a_storage(tools: ModuleType, place: Any) -> None:
    """The same of a tensor that lies strided in a .bin; without runs every row is zero."""
    store = MemoryStore(place.fresh())
    x = torch.arange(12.0).reshape(3, 4)
    buffer = io.BytesIO()
    torch.save({"w": x.T}, buffer)
    store.put("config.json", b"{}")
    store.put("pytorch_model.bin", buffer.getvalue())
    plan = api.plan(tools.models("linear", None, [store.uri], [{"weight": 1.0}]), place.out())
    (task,) = plan.tasks
    for runs, expected in (
        (None, x.T), ((RowRun(0, 2, 2),), torch.cat([x.T[2:], torch.zeros(2, 3)])), ((), torch.zeros(4, 3)),
    ):  # fmt: skip
        moved = replace(plan, tasks=(replace(task, entries=(Entry((DenseTerm(0, "w", runs),)),)),))
        found = safetensors.torch.load(outcome(tools, place, moved)["model.safetensors"])
        assert torch.equal(found["w"], expected)


# ---- law 9: any extent by itself -------------------------------------------------------------------------------------


def on_disk(folder: Path, uri: str) -> str:
    folder.mkdir()
    for name, data in MemoryStore(uri.removeprefix("memory://")).files.items():
        (folder / name).write_bytes(bytes(data))
    return str(folder)


@pytest.mark.parametrize(
    "method, shared", [("ties", {"density": 0.4}), ("ties", {"density": 0.4, "scope": "model"}), ("slerp", {"t": 0.3}),
                       ("dare_linear", {"density": 0.5})],
)  # fmt: skip
def test_verify_merges_every_extent_again_and_names_a_flipped_byte(
    tools: ModuleType, place: Any, tmp_path: Path, method: str, shared: dict[str, object]
) -> None:
    base, a = (on_disk(tmp_path / n, place.model(weights_of(i, whole=False))) for n, i in (("b", 18), ("a", 19)))
    manifest: dict[str, Any] = {
        "merge_method": method, "base_model": base, "parameters": shared,
        "models": [{"model": a, "parameters": {} if method == "slerp" else {"weight": 0.7}}],
    }  # fmt: skip
    out = tmp_path / "out"
    report = api.merge(manifest, out, workers=2)
    verified = verify_output(str(out), replay=None)
    assert verified.replayed == len(NAMES)
    assert verified.content_digest == report.content_digest
    assert verify_output(str(out), replay=1).replayed == 1
    stored = json.loads((out / "raymerge.json").read_text())
    tensors = [e for e in stored["extents"] if e[0] == "model.safetensors" and e[1] > 0]
    assert len(tensors) == len(NAMES)
    for file, start, end, _ in (tensors[0], tensors[-1]):
        data = bytearray((out / file).read_bytes())
        data[(start + end) // 2] ^= 1
        (out / file).write_bytes(data)
        with pytest.raises(MergeFailedError) as caught:
            verify_output(str(out), replay=None)
        (problem,) = caught.value.problems
        assert problem.code == "verify-mismatch"
        assert file in problem.what
        assert str(start) in problem.what
        assert str(end) in problem.what
        data[(start + end) // 2] ^= 1
        (out / file).write_bytes(data)
    verify_output(str(out))


def test_verify_of_adapters(tools: ModuleType, place: Any, tmp_path: Path) -> None:
    g = np.random.default_rng(20)
    uris = [
        on_disk(tmp_path / f"a{i}", place.adapter({f"l.{n}.q": (g.standard_normal((3, 9)), g.standard_normal((8, 3)))
                                                   for n in range(3)}))
        for i in range(2)
    ]  # fmt: skip
    for i, document in enumerate((
        tools.adapters("ties", uris, [{}, {}], {"density": 0.5}),
        tools.adapters("ties", uris, [{}, {}], {"density": 0.5, "scope": "model"}),
        tools.adapters("task_arithmetic", uris, [{}, {}]),
        {"combination_type": "dare_ties", "adapters": [{"adapter": u} for u in uris], "weights": [1.0, 0.5],
         "density": 0.5},
    )):  # fmt: skip
        out = tmp_path / f"out{i}"
        api.merge(document, out)
        assert verify_output(str(out), replay=None).replayed == 6


@pytest.mark.parametrize("method", ["ties", "ties-model", "slerp"])
def test_each_unit_alone_yields_its_extents(tools: ModuleType, place: Any, method: str) -> None:
    """A fresh runner a unit, in any order, given only the plan and the findings of earlier stages."""
    base, a = (place.model(weights_of(i, whole=False)) for i in (21, 22))
    if method == "slerp":
        manifest: Any = {"merge_method": "slerp", "base_model": base, "models": [{"model": a}],
                         "parameters": {"t": 0.3}}  # fmt: skip
    else:
        shared = {"density": 0.4, **({"scope": "model"} if method == "ties-model" else {})}
        manifest = tools.models("ties", base, [a], [{"weight": 0.7}], shared)
    plan = tools.recut(api.plan(manifest, place.out()), tile_rows=16, extent_rows=1, fused=False)
    tools.run(plan)
    stored = json.loads(bytes(MemoryStore(plan.outputs[0].path.removeprefix("memory://")).files["raymerge.json"]))
    wanted = {(f, s, e): d for f, s, e, d in stored["extents"]}
    whole = tools.read_bytes(plan.outputs[0].path)["model.safetensors"]
    prepare_process(plan)
    progression = Progression(plan)
    seen = 0
    for stage in range(plan.num_stages):
        units = [u for u in progression.units if u.stage == stage]
        for unit in reversed(units):
            written: list[tuple[int, bytes]] = []

            def write(
                output: int, file: str, offset: int, data: memoryview, written: list[tuple[int, bytes]] = written
            ) -> None:
                written.append((offset, bytes(data)))

            receipt = UnitRunner(plan, memory=8 << 20).run(unit, progression.ledger.findings(unit), write)
            if unit.round is not None:
                progression.ledger.add(receipt)
            for extent in receipt.extents:
                assert wanted[extent.file, extent.start, extent.end] == extent.sha256
                seen += 1
            for offset, data in written:
                assert whole[offset : offset + len(data)] == data
        progression.ledger.close_stage(stage)
    assert seen > len(NAMES)
