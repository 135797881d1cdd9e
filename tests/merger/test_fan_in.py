"""What models bring along to a merge, and other tools lose on the way: it is merged, kept, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import merger
from merger import api
from merger.errors import ManifestError, MergeFailedError
from tests.conformance.folders import adapter, model, model_tensors
from tests.strategies import models

EXTRA = "model.layers.7.eh_proj.weight"
GATES = [f"model.layers.{i}.mlp.gate.weight" for i in range(2)]


def merged(out: Path, *paths: Path, method: str = "linear", base: Path | None = None, **keys: Any) -> dict[str, Tensor]:
    own = [{"weight": 1.0} if method in {"linear", "task_arithmetic", "ties"} else {}] * len(paths)
    document = models(method, None if base is None else str(base), [str(p) for p in paths], own, **keys)
    merger.merge(document, out, workers=1)
    return load_file(out / "model.safetensors")


def plan(*paths: Path, method: str = "linear", **keys: Any) -> Any:
    return api.plan(models(method, None, [str(p) for p in paths], [{"weight": 1.0}] * len(paths), **keys), "memory://o")


# ---------------------------------------------------------------- tensors


def test_tensors_that_no_class_loads_are_merged(tmp_path: Path) -> None:
    held = [{**model_tensors(i, dtype=torch.float32), EXTRA: torch.full((4, 4), float(i))} for i in range(2)]
    paths = [model(tmp_path / f"m{i}", i, tensors=t) for i, t in enumerate(held)]
    made = merged(tmp_path / "out", *paths)
    assert set(made) == set(held[0])
    assert torch.equal(made[EXTRA], torch.full((4, 4), 0.5))


def test_a_tensor_that_one_source_lacks_is_refused_with_both_sides(tmp_path: Path) -> None:
    more = model(tmp_path / "more", 0, tensors={**model_tensors(0), EXTRA: torch.ones(4, 4)})
    less = model(tmp_path / "less", 1)
    for paths in ((more, less), (less, more)):
        (problem,) = plan(*paths).problems
        assert EXTRA in f"{problem.what} {problem.where}"
        assert str(less) in f"{problem.what} {problem.where} {problem.why}" or str(more) in str(problem)


def test_integer_tensors_are_copied_where_they_agree_and_refused_where_not(tmp_path: Path) -> None:
    name = "model.position_ids"
    same, other = torch.arange(8), torch.arange(1, 9)
    paths = [model(tmp_path / f"m{i}", i, tensors={**model_tensors(i), name: t}) for i, t in enumerate((same, same))]
    assert torch.equal(merged(tmp_path / "out", *paths)[name], same)
    third = model(tmp_path / "third", 2, tensors={**model_tensors(2), name: other})
    with pytest.raises(MergeFailedError, match="position_ids"):
        merged(tmp_path / "no", paths[0], third)


# ---------------------------------------------------------------- who counts how often


def test_a_model_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    a, b = (model(tmp_path / n, i) for i, n in enumerate("ab"))
    with pytest.raises(ManifestError, match="with the sum of the weights"):
        plan(a, a, b)


@pytest.mark.parametrize("method", ["arcee_fusion", "ramplus_tl"])
def test_every_method_writes_the_dtype_of_its_sources(method: str, tmp_path: Path) -> None:
    paths = [model(tmp_path / f"m{i}", i, dtype=torch.bfloat16) for i in range(2)]
    made = merged(tmp_path / "out", paths[1], method=method, base=paths[0])
    assert {value.dtype for value in made.values()} == {torch.bfloat16}


def test_config_and_companions_are_the_first_models_whatever_comes_after(tmp_path: Path) -> None:
    paths = [model(tmp_path / f"m{i}", i, config={"made_by": str(i)}) for i in range(3)]
    for i, path in enumerate(paths):
        (path / "generation_config.json").write_text(json.dumps({"max_new_tokens": i}))
        (path / "chat_template.jinja").write_text(f"{{{{ messages }}}} {i}")
    for order in ((0, 1, 2), (2, 0, 1)):
        out = tmp_path / f"out-{order[0]}"
        merged(out, *(paths[i] for i in order))
        assert json.loads((out / "config.json").read_text())["made_by"] == str(order[0])
        assert json.loads((out / "generation_config.json").read_text()) == {"max_new_tokens": order[0]}
        assert (out / "chat_template.jinja").read_text().endswith(str(order[0]))


def test_what_follows_the_layers_comes_from_the_last_slice(tmp_path: Path) -> None:
    """Where slices have several sources, and not equally many."""
    a, b = (model(tmp_path / n, i, dtype=torch.float32) for i, n in enumerate("ab"))
    one = {"model": str(a), "layer_range": [0, 1], "parameters": {"weight": 1.0}}
    two = [{"model": str(p), "layer_range": [1, 2], "parameters": {"weight": 1.0}} for p in (a, b)]
    out = tmp_path / "out"
    merger.merge({"merge_method": "linear", "slices": [{"sources": [one]}, {"sources": two}]}, out, workers=1)
    made, first, second = (load_file(p / "model.safetensors") for p in (out, a, b))
    norm = "model.norm.weight"
    torch.testing.assert_close(made[norm], (first[norm] + second[norm]) / 2)
    torch.testing.assert_close(made["model.layers.0.self_attn.q_proj.weight"],
                               first["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip


# ---------------------------------------------------------------- experts


def _moe(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    held = {name: torch.randn(2, 8, generator=generator) for name in GATES}
    for name in GATES:
        for expert in range(2):
            part = f"{name.removesuffix('gate.weight')}experts.{expert}.gate_proj.weight"
            held[part] = torch.randn(8, 8, generator=generator)
    return model(folder, seed, tensors=held)


def test_routers_that_are_mixed_are_told_and_a_filter_keeps_one(tmp_path: Path) -> None:
    a, b = _moe(tmp_path / "a", 0), _moe(tmp_path / "b", 1)
    (told,) = [w for w in plan(a, b).warnings if w.code == "merged-routers"]
    assert GATES[0] in told.where
    assert "{filter: mlp.gate., value: 0}" in told.fix
    kept = {"weight": [{"filter": "mlp.gate.", "value": 0}, {"value": 1}]}
    document = models("linear", None, [str(a), str(b)], [{"weight": 1.0}, kept])
    assert [w.code for w in api.plan(document, "memory://o").warnings] == []
    merger.merge(document, tmp_path / "out", workers=1)
    made, first = (load_file(p / "model.safetensors") for p in (tmp_path / "out", a))
    assert all(torch.equal(made[name], first[name]) for name in GATES)
    assert not torch.equal(made[GATES[0].replace("gate.", "experts.0.gate_proj.")],
                           first[GATES[0].replace("gate.", "experts.0.gate_proj.")])  # fmt: skip


def test_a_dense_model_has_no_routers(tmp_path: Path) -> None:
    held = {name: torch.ones(2, 8) for name in GATES}
    paths = [model(tmp_path / f"m{i}", i, tensors=held) for i in range(2)]
    assert [w.code for w in plan(*paths).warnings] == []


# ---------------------------------------------------------------- bases


def _of(folder: Path, base: str, revision: str | None) -> str:
    return str(adapter(folder, 0, config={"base_model_name_or_path": base, "revision": revision}))


def _codes(*adapters: str, **keys: Any) -> list[str]:
    document = {"adapters": [{"adapter": a} for a in adapters], **keys}
    return [w.code for w in api.plan(document, "memory://o").warnings]


def test_adapters_of_another_revision_of_the_base_are_told(tmp_path: Path) -> None:
    plain, old = _of(tmp_path / "a", "org/base", None), _of(tmp_path / "b", "org/base", "v1")
    elsewhere = _of(tmp_path / "c", "org/other", "v1")
    assert "base-revision-differs" in _codes(plain, old, base_model="org/base")
    assert "base-revision-differs" in _codes(plain, old, base_model="org/base@v2")
    assert "base-revision-differs" not in _codes(plain, old, base_model="org/base@v1")
    assert "base-revision-differs" not in _codes(plain, base_model="org/base")
    assert "base-revision-differs" not in _codes(elsewhere, base_model="org/base")
