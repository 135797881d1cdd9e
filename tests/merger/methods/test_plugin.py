"""Methods of one's own: loaded from a file or a package, planned and run as any other, refused and checked."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import merger
from merger import api
from merger.crew import Assignment, Crew
from merger.errors import ManifestError, MergeFailedError, PlanError, RaymergeError, SourceError
from merger.manifest import load_manifest
from merger.methods import METHODS, plugin
from merger.methods.plugin import adopt, check_method, load_installed, load_plugin, plugins_of, spec_of
from merger.storage import MemoryStore
from merger.verify import verify_output

Array = npt.NDArray[Any]
Write = Callable[..., Path]

PLUGINS = Path(__file__).parents[3] / "manifests" / "plugins"
HEAD = "METHOD_API = 1\nfrom merger.methods.plugin import ParameterSpec, TileBlock, method\nimport numpy as np\n"


@pytest.fixture(autouse=True)
def _as_new() -> Iterator[None]:
    """Every test begins and ends without plugins."""
    methods, loaded, installed = dict(METHODS), dict(plugin._LOADED), list(plugin._INSTALLED)
    forget()
    yield
    METHODS.clear()
    METHODS.update(methods)
    plugin._LOADED.clear()
    plugin._LOADED.update(loaded)
    plugin._INSTALLED[:] = installed


def forget() -> None:
    """As another process is."""
    for name in plugin._LOADED:
        METHODS.pop(name, None)
    plugin._LOADED.clear()
    plugin._INSTALLED.clear()
    for name in [name for name in sys.modules if name.startswith("raymerge_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A plugin file of this text, which says for which API it is."""

    def made(body: str, name: str = "mine.py", head: str = HEAD) -> Path:
        path = tmp_path / name
        path.write_text(head + body)
        return path

    return made


# ---- the examples ----------------------------------------------------------------------------------------------------


def trimmed_mean(base: Array, deltas: list[Array], weights: list[float], cut: int, scale: float) -> Array:
    k = len(deltas)
    ordered = np.sort(np.stack([w * d for w, d in zip(weights, deltas, strict=True)]), axis=0)
    left = min(cut, (k - 1) // 2)
    found: Array = base + scale * k * ordered[left : k - left].mean(axis=0)
    return found


def clipped_sum(base: Array, deltas: list[Array], weights: list[float], limits: list[float], scale: float) -> Array:
    merged = np.zeros_like(base)
    for d, w, limit in zip(deltas, weights, limits, strict=True):
        bound = limit * np.sqrt((d**2).mean())
        merged += w * np.clip(d, -bound, bound)
    return base + scale * merged


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    g = np.random.default_rng(seed)
    return {name: (g.integers(-64, 65, shape) / 8).astype(np.float32) for name, shape in shapes.items()}


SHAPES = {"model.layers.0.w": (70, 33), "model.layers.1.w": (1, 50), "norm": (41,), "conv": (3, 4, 5)}
WEIGHTS = [1.5, -0.5, 0.25]


def manifest_of(place: Any, method: str, parameters: dict[str, Any], each: list[dict[str, Any]]) -> dict[str, Any]:
    base, *others = (place.model(drawn(SHAPES, seed)) for seed in range(4))
    return {
        "merge_method": method, "base_model": base, "parameters": parameters,
        "models": [{"model": o, "parameters": p} for o, p in zip(others, each, strict=True)],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["trimmed_mean", "clipped_sum"])
def test_an_example_has_the_properties_of_a_method(name: str) -> None:
    loaded = load_plugin(PLUGINS / f"{name}.py")
    assert loaded.methods == (name,)
    assert loaded.sha256 == hashlib.sha256((PLUGINS / f"{name}.py").read_bytes()).hexdigest()
    check_method(METHODS[name])
    check_method(name, seed=1)


def test_a_function_merges_models(tools: ModuleType, place: Any) -> None:
    merger.load_plugin(PLUGINS / "trimmed_mean.py")
    document = manifest_of(place, "trimmed_mean", {"cut": 1, "lambda": 0.5}, [{"weight": w} for w in WEIGHTS])
    found = tools.merge(place, document)
    base, *others = (drawn(SHAPES, seed) for seed in range(4))
    for name in SHAPES:
        deltas = [o[name].astype(np.float64) - base[name] for o in others]
        expected = trimmed_mean(base[name].astype(np.float64), deltas, WEIGHTS, 1, 0.5)
        np.testing.assert_allclose(found[name].double().numpy(), expected, rtol=1e-6, atol=1e-5, err_msg=name)


def test_a_streamed_method_merges_models_whatever_the_cut(tools: ModuleType, place: Any) -> None:
    load_plugin(PLUGINS / "clipped_sum.py")
    limits = [0.5, 1.0, 3.0]
    each = [{"weight": w, "limit": v} for w, v in zip(WEIGHTS, limits, strict=True)]
    document = manifest_of(place, "clipped_sum", {"lambda": 0.5}, each)
    base, *others = (drawn(SHAPES, seed) for seed in range(4))
    plan = api.plan(document, place.out())
    assert plan.problems == ()
    assert plan.tasks[0].rounds == ("block.0",)
    whole = tools.read_tensors(tools.run(plan).path)
    for name in SHAPES:
        deltas = [o[name].astype(np.float64) - base[name] for o in others]
        expected = clipped_sum(base[name].astype(np.float64), deltas, WEIGHTS, limits, 0.5)
        np.testing.assert_allclose(whole[name].double().numpy(), expected, rtol=1e-6, atol=1e-5, err_msg=name)
    small = tools.recut(plan, tile_rows=16, extent_rows=1, fused=False)
    first = None
    for memory, workers in ((0, 1), (0, 3), (1 << 30, 2)):
        out = place.out()
        tools.run(tools.at(small, out), memory=memory, workers=workers)
        first = first or tools.read_bytes(out)
        assert tools.read_bytes(out) == first


@pytest.mark.parametrize("name", ["trimmed_mean", "clipped_sum"])
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_method_of_ones_own_merges_adapters(tools: ModuleType, place: Any, name: str, kind: str) -> None:
    load_plugin(PLUGINS / f"{name}.py")
    g = np.random.default_rng(8)
    pairs = [(g.standard_normal((2, 20)), g.standard_normal((30, 2))) for _ in WEIGHTS]
    deltas = [b.astype(np.float32).astype(np.float64) @ a.astype(np.float32).astype(np.float64) for a, b in pairs]
    base = np.zeros((30, 20))
    document = {
        "merge_method": name,
        "adapters": [{"adapter": place.adapter({"q": pair}), "parameters": {"weight": w}}
                     for pair, w in zip(pairs, WEIGHTS, strict=True)],
        "output": {"kind": kind, **({"store": {"svd": {"rank": 20}}} if kind == "adapter" else {})},
        "dtype": "float32",
    }  # fmt: skip
    if kind == "model":
        document["base_model"] = place.model({"q.weight": base})
    found = {n: t.double().numpy() for n, t in tools.merge(place, document).items()}
    merged = (
        found["q.weight"] if kind == "model"
        else found["base_model.model.q.lora_B.weight"] @ found["base_model.model.q.lora_A.weight"]
    )  # fmt: skip
    expected = (
        trimmed_mean(base, deltas, WEIGHTS, 1, 1.0) if name == "trimmed_mean"
        else clipped_sum(base, deltas, WEIGHTS, [3.0] * 3, 1.0)
    )  # fmt: skip
    np.testing.assert_allclose(merged, expected, atol=1e-5)


def test_a_streamed_method_of_ones_own_is_a_block(tools: ModuleType, place: Any) -> None:
    load_plugin(PLUGINS / "clipped_sum.py")
    named = manifest_of(place, "clipped_sum", {"limit": 2.0}, [{"weight": w} for w in WEIGHTS])
    blocks = {key: value for key, value in named.items() if key not in ("merge_method", "parameters")}
    written = {**blocks, "combine": {"clipped_sum": {"limit": 2.0}}}
    assert tools.read_bytes(tools.run(api.plan(written, place.out())).path) == tools.read_bytes(
        tools.run(api.plan(named, place.out())).path
    )
    trimmed = {**written, "prepare": {"trim": {"density": 0.5}}}
    assert api.plan(trimmed, place.out()).tasks[0].rounds == ("trim_high", "trim_low", "block.0")


@pytest.mark.parametrize(
    "body",
    ["def largest(deltas, weights):\n    import torch\n    return torch.stack(list(deltas)).amax(0)\n",
     "class Largest(TileBlock):\n    def apply(self, call, known, tile): return tile.x_Kn.max(axis=0)\n"],
)  # fmt: skip
def test_a_method_may_work_on_weights(tools: ModuleType, place: Any, write: Write, body: str) -> None:
    load_plugin(write(f"@method(name='largest', summary='s', space='weight', any_order=True)\n{body}"))
    check_method("largest")
    sources = [drawn(SHAPES, seed) for seed in range(3)]
    document: dict[str, Any] = {
        "merge_method": "largest",
        "models": [{"model": place.model(s), "parameters": {"weight": 1.0}} for s in sources],
    }
    found = tools.merge(place, document)
    for name in SHAPES:
        np.testing.assert_array_equal(found[name].numpy(), np.max([s[name] for s in sources], axis=0))
    adapter = place.adapter({"q": (np.ones((1, 2)), np.ones((2, 1)))})
    refused = api.plan({"merge_method": "largest", "adapters": [{"adapter": adapter}]}, place.out())
    assert [p.code for p in refused.problems] == ["not-closed"]


def test_memory_of_a_function_is_what_it_declares(place: Any, write: Write) -> None:
    load_plugin(write(
        "@method(name='small', summary='s', bytes=1)\ndef small(deltas, weights): return deltas[0] * 1\n"
        "@method(name='large', summary='s', bytes=lambda rows, cols, count: 10**12)\n"
        "def large(deltas, weights): return deltas[0] * 1\n"
        "@method(name='plain', summary='s')\ndef plain(deltas, weights): return deltas[0] * 1\n"
    ))  # fmt: skip
    found = {}
    for name in ("small", "plain", "large"):
        document = manifest_of(place, name, {}, [{"weight": 1.0}] * 3)
        found[name] = api.plan(document, place.out())
        assert found[name].problems == ()
    from merger.planning.memory import peak_bytes

    size = 4 * 70 * 33 * 3
    assert peak_bytes(found["plain"]) - peak_bytes(found["small"]) == 2 * size
    assert peak_bytes(found["large"]) > 10**12


# ---- what a plan and an output say -----------------------------------------------------------------------------------


def test_the_digest_of_the_plugin_is_in_the_plan_and_in_the_output(tools: ModuleType, place: Any, write: Write) -> None:
    body = "@method(name='mine', summary='s')\ndef mine(deltas, weights): return deltas[0] * {}\n"
    document = manifest_of(place, "mine", {}, [{"weight": 1.0}] * 3)
    digests = set()
    for factor in (1, 2):
        forget()
        made = load_plugin(write(body.format(factor)))
        plan = api.plan(document, place.out())
        assert plan.plugins == (made,)
        digests.add(plan.digest)
    assert len(digests) == 2
    report = tools.run(plan)
    stored = json.loads(bytes(MemoryStore(report.path.removeprefix("memory://")).files["raymerge.json"]))
    assert stored["plugins"] == [{"name": "mine.py", "sha256": made.sha256, "methods": ["mine"]}]
    assert stored["plan_digest"] == plan.digest
    assert verify_output(report.path, replay=None).replayed > 0
    forget()
    with pytest.raises(SourceError, match=r"made with the plugin mine\.py"):
        verify_output(report.path, replay=1)
    load_plugin(write(body.format(1)))
    with pytest.raises(SourceError, match="that very file"):
        verify_output(report.path, replay=1)


def test_a_plugin_that_a_merge_does_not_use_changes_no_digest(place: Any) -> None:
    document = manifest_of(place, "ties", {}, [{"weight": 1.0}] * 3)
    before = api.plan(document, place.out())
    load_plugin(PLUGINS / "clipped_sum.py")
    after = api.plan(document, place.out())
    assert after.digest == before.digest
    assert after.plugins == ()


def test_a_process_that_was_sent_a_plan_loads_its_plugins(tools: ModuleType, place: Any, write: Write) -> None:
    path = write("@method(name='mine', summary='s')\ndef mine(deltas, weights): return deltas[0] * 3\n")
    load_plugin(path)
    document = manifest_of(place, "mine", {}, [{"weight": 1.0}] * 3)
    plan = api.plan(document, place.out())
    sent = pickle.loads(pickle.dumps(plan))
    forget()
    path.unlink()
    with pytest.raises(ManifestError, match="'mine' is no merge_method"):
        load_manifest(document)
    crew = Crew(threads=1)
    crew.learn(0, Assignment(sent, [], 1 << 20))
    crew.close()
    assert plugins_of(["mine"]) == plan.plugins
    assert sent.digest == plan.digest
    found = tools.read_tensors(tools.run(sent).path)
    base, first, *_ = (drawn(SHAPES, seed) for seed in range(4))
    np.testing.assert_array_equal(found["norm"].numpy(), base["norm"] + 3 * (first["norm"] - base["norm"]))


def test_a_process_with_another_plugin_of_that_method_refuses_a_plan(place: Any, write: Write) -> None:
    body = "@method(name='mine', summary='s')\ndef mine(deltas, weights): return deltas[0] * {}\n"
    load_plugin(write(body.format(1)))
    plan = api.plan(manifest_of(place, "mine", {}, [{"weight": 1.0}] * 3), place.out())
    forget()
    load_plugin(write(body.format(2)))
    crew = Crew(threads=1)
    with pytest.raises(PlanError, match="plugin-differs"):
        crew.learn(0, Assignment(plan, [], 1 << 20))
    crew.close()


def test_a_plugin_is_loaded_once(write: Write) -> None:
    path = write("@method(name='mine', summary='s')\ndef mine(deltas, weights): ...\n")
    first = load_plugin(path)
    assert load_plugin(path) is first
    adopt([first])
    assert len([name for name in sys.modules if name.startswith("raymerge_plugin_" + first.sha256[:16])]) == 1


# ---- installed packages ----------------------------------------------------------------------------------------------


def install(site: Path, body: str, point: str = "median = ours.median", head: str = HEAD) -> None:
    (site / "ours").mkdir(parents=True)
    (site / "ours" / "__init__.py").write_text("")
    (site / "ours" / "median.py").write_text(head + body)
    info = site / "our_methods-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-methods\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(f"[raymerge.methods]\n{point}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield tmp_path / "site"
    for name in [name for name in sys.modules if name.partition(".")[0] == "ours"]:
        del sys.modules[name]


def test_an_installed_package_brings_methods(place: Any, site: Path) -> None:
    install(site, "@method(name='mid', summary='s')\ndef mid(deltas, weights): return deltas[0] * 1\n")
    plan = api.plan(manifest_of(place, "mid", {}, [{"weight": 1.0}] * 3), place.out())
    assert plan.problems == ()
    assert [p.name for p in plan.plugins] == ["our-methods 1.5: median"]
    assert load_installed()[0].methods == ("mid",)


@pytest.mark.parametrize(
    "options, said",
    [({"point": "m = ours.nothing"}, "no plugin"), ({"point": "m = ours.median:mid"}, "names a module"),
     ({"point": "m = nowhere.at.all"}, "cannot be found"), ({"head": ""}, "METHOD_API")],
)  # fmt: skip
def test_a_broken_package_is_named(site: Path, options: dict[str, str], said: str) -> None:
    install(site, "x = 1\n", **options)
    with pytest.raises(ManifestError, match=said) as refused:
        load_installed()
    assert "our-methods 1.5" in str(refused.value) or "ours/median.py" in str(refused.value)


# ---- what is refused -------------------------------------------------------------------------------------------------

GOOD = "@method(name='mine', summary='s')\ndef mine(deltas, weights): ...\n"
SPEC = "ParameterSpec(name='{}', kind='{}', scope='{}', default=1, doc='d')"


@pytest.mark.parametrize(
    "head, body, said",
    [
        ("from merger.methods.plugin import method\n", GOOD, "for which METHOD_API"),
        ("from merger.methods.plugin import METHOD_API, method\n", GOOD, "write METHOD_API = 1"),
        ("METHOD_API = 2\nraise SystemExit\n", GOOD, "written for METHOD_API 2, and this raymerge has 1"),
        ("METHOD_API = 1 + 0\n", GOOD, "no number"),
        (HEAD, "from . import other\n" + GOOD, "relative"),
        (HEAD, "def broken(:\n", "no Python"),
        (HEAD, "x = 1\n", "declares no method"),
        (HEAD, "import nothing_of_that_name\n", "ModuleNotFoundError"),
        (HEAD, "raise SystemError('no')\n", "SystemError: no"),
        (HEAD, GOOD.replace("mine'", "ties'"), "ties is a name of raymerge's own"),
        (HEAD, GOOD.replace("mine'", "dare_linear_svd'"), "raymerge's own"),
        (HEAD, GOOD.replace("mine'", "elect'"), "raymerge's own"),
        (HEAD, GOOD.replace("mine'", "My Method'"), "cannot name a method"),
        (HEAD, GOOD.replace("summary='s'", "summary=''"), "no summary"),
        (HEAD, GOOD.replace("summary", "space='core', summary"), "no space of a plugin"),
        (HEAD, GOOD + GOOD.replace("def mine", "def other"), "declares mine twice"),
        (HEAD, GOOD.replace("weights)", "weights, more)"), "does not take (deltas, weights)"),
        (HEAD, GOOD.replace("summary", f"parameters=({SPEC.format('t', 'float', 'global')},), summary"),
         "does not take (deltas, weights, t)"),
        (HEAD, GOOD.replace("summary", f"parameters=({SPEC.format('density', 'float', 'source')},), summary"),
         "'density' cannot name a parameter"),
        (HEAD, GOOD.replace("summary", f"parameters=({SPEC.format('lambda', 'float', 'global')},), summary"),
         "cannot name a parameter"),
        (HEAD, GOOD.replace("summary", f"parameters=({SPEC.format('t', 'bool', 'source')},), summary"),
         "parameters of a source are numbers"),
        (HEAD, "@method(name='mine', summary='s')\nclass Mine: ...\n", "no TileBlock"),
        (HEAD, "@method(name='mine', summary='s', bytes=3)\nclass Mine(TileBlock): ...\n", "declares bytes"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_one_is_refused(write: Write, head: str, body: str, said: str) -> None:
    path = write(body, head=head)
    with pytest.raises(ManifestError) as refused:
        load_plugin(path)
    assert said in str(refused.value)
    assert str(path) in refused.value.problems[0].where
    assert [p.code for p in refused.value.problems] == ["bad-plugin"]
    assert not any(name.startswith("raymerge_plugin_") for name in sys.modules)
    assert "mine" not in METHODS


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        load_plugin(tmp_path / "nothing.py")
    (tmp_path / "latin.py").write_bytes(b"METHOD_API = 1 # \xe9\n")
    with pytest.raises(ManifestError, match="not UTF-8"):
        load_plugin(tmp_path / "latin.py")


def test_two_plugins_of_one_name_are_refused(write: Write) -> None:
    load_plugin(write(GOOD))
    with pytest.raises(ManifestError, match=r"a method mine already, of mine\.py"):
        load_plugin(write(GOOD + "\n", "other.py"))


@pytest.mark.parametrize(
    "change, path",
    [({"plugin": "evil.py"}, "plugin"), ({"plugins": ["evil.py"]}, "plugins"),
     ({"merge_method": "evil.py"}, "merge_method")],
)  # fmt: skip
def test_a_manifest_names_no_file_of_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], path: str
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ManifestError, match=r"--plugin FILE\.py") as refused:
        load_manifest({"merge_method": "ties", "adapters": [{"adapter": "/a"}], **change})
    assert [p.where for p in refused.value.problems] == [path]


def test_parameters_of_a_plugin_are_validated(write: Write) -> None:
    load_plugin(PLUGINS / "trimmed_mean.py")
    document = {"merge_method": "trimmed_mean", "adapters": [{"adapter": "/a", "parameters": {"cut": 1}}],
                "parameters": {"cut": -1, "cutt": 2}}  # fmt: skip
    with pytest.raises(ManifestError) as refused:
        load_manifest(document)
    assert {(p.code, p.where) for p in refused.value.problems} == {
        ("out-of-bounds", "parameters.cut"), ("unknown-key", "parameters.cutt"),
        ("unknown-key", "adapters[0].parameters.cut"),
    }  # fmt: skip


# ---- what goes wrong in a merge --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, said",
    [
        ("return 1 / 0", r"ZeroDivisionError: division by zero"),
        ("return deltas[0].double()", "its result is torch.float64"),
        ("return deltas[0][:1, :1]", "its result is torch.float32"),
        ("return None", "its result is NoneType"),
        ("deltas[0].mul_(2); return deltas[0]", "changed a tensor that it was given"),
        ("return deltas[0] / 0", "not-finite"),
    ],
)
def test_a_function_that_fails_fails_the_merge(
    tools: ModuleType, place: Any, write: Write, body: str, said: str
) -> None:
    path = write(f"@method(name='mine', summary='s')\ndef mine(deltas, weights):\n    {body}\n")
    load_plugin(path)
    plan = api.plan(manifest_of(place, "mine", {}, [{"weight": 1.0}] * 3), place.out())
    with pytest.raises(MergeFailedError, match=said) as failed:
        tools.run(plan)
    if "ZeroDivision" in said:
        assert f"{path}, line 6" in str(failed.value)


def test_what_a_function_returns_of_its_inputs_is_a_copy(tools: ModuleType, place: Any, write: Write) -> None:
    load_plugin(write("@method(name='mine', summary='s')\ndef mine(deltas, weights): return deltas[0]\n"))
    found = tools.merge(place, manifest_of(place, "mine", {"lambda": 2.0}, [{"weight": 1.0}] * 3))
    base, first, *_ = (drawn(SHAPES, seed) for seed in range(4))
    np.testing.assert_array_equal(found["conv"].numpy(), base["conv"] + 2 * (first["conv"] - base["conv"]))


@pytest.mark.parametrize(
    "body, kind, said",
    [
        ("    def apply(self, call, known, tile): return tile.x_Kn[0].astype(np.float64)", MergeFailedError, "float64"),
        ("    def apply(self, call, known, tile): return tile.x_Kn[0][:-1]", MergeFailedError, "its tile is float32"),
        ("    def apply(self, call, known, tile): return known[3]", MergeFailedError, "IndexError"),
        ("    def rounds(self, call): return 1", MergeFailedError, "NotImplementedError"),
        ("    def rounds(self, call): return call.number('t')", PlanError, "KeyError"),
    ],
)
def test_a_block_that_fails_fails_the_merge(
    tools: ModuleType, place: Any, write: Write, body: str, kind: type[RaymergeError], said: str
) -> None:
    load_plugin(write(f"@method(name='mine', summary='s')\nclass Mine(TileBlock):\n{body}\n"))
    with pytest.raises(kind, match=said):
        tools.merge(place, manifest_of(place, "mine", {}, [{"weight": 1.0}] * 3))


# ---- check_method ----------------------------------------------------------------------------------------------------

FUNCTION = "@method(name='mine', summary='s', any_order=True, one_is_itself=True)\ndef mine(deltas, weights):\n    {}\n"
BLOCK = "@method(name='mine', summary='s')\nclass Mine(TileBlock):\n{}\n"


@pytest.mark.parametrize(
    "body, said",
    [
        (FUNCTION.format("return sum(d * w for d, w in zip(deltas, weights))"), None),
        (FUNCTION.format("return deltas[0] * weights[0]"), "order"),
        (FUNCTION.format("return 2 * sum(d * w for d, w in zip(deltas, weights))"), "not itself"),
        (FUNCTION.format("return sum(d * w for d, w in zip(deltas, weights)) / sum(float(d.norm()) for d in deltas)"),
         "not finite|ZeroDivisionError"),
        (FUNCTION.format("import torch; return torch.rand_like(deltas[0])"), "second run"),
        (FUNCTION.format("deltas[0].add_(1); return deltas[0]"), "changed a tensor"),
        (FUNCTION.format("deltas[0].numpy()[:] = 0; return deltas[0] * 1"), "changed its inputs"),
        (BLOCK.format("    def apply(self, call, known, tile): return tile.x_Kn[0] - tile.x_Kn[0].mean()"), "tiles of"),
        (BLOCK.format("    def apply(self, call, known, tile): tile.x_Kn[0] += 1; return tile.x_Kn[0]"), "read-only"),
        (BLOCK.format("    seen = 0.0\n    def apply(self, call, known, tile):\n        Mine.seen += 1\n"
                      "        return tile.x_Kn[0] * np.float32(Mine.seen)"), "second run"),
        (BLOCK.format("    def apply(self, call, known, tile): return tile.x_Krl[0, :, 0]"), "its tile is"),
    ],
)  # fmt: skip
def test_check_method_finds_what_is_wrong(write: Write, body: str, said: str | None) -> None:
    load_plugin(write(body))
    if said is None:
        check_method("mine")
        return
    with pytest.raises(AssertionError, match=said):
        check_method("mine")


def test_check_method_takes_what_is_declared(write: Write) -> None:
    @plugin.method(name="halved", summary="half of the first")
    def halved(deltas: Any, weights: Any) -> torch.Tensor:
        found: torch.Tensor = deltas[0] / 2
        return found

    check_method(halved)
    assert spec_of(halved).name == "halved"
    assert "halved" not in METHODS
    with pytest.raises(ValueError, match="no block of its own"):
        check_method("ties")
    with pytest.raises(ValueError, match="is no method"):
        check_method("tiess")
    with pytest.raises(ValueError, match="no parameter t"):
        check_method(halved, t=1)


@pytest.mark.parametrize("name", [n for n, s in METHODS.items() if s.tile is not None or s.whole is not None])
def test_our_own_methods_pass_the_check(name: str) -> None:
    check_method(name)
