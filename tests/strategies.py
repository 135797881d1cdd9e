"""Small sources on MemoryStores, runs of real plans over them, and what hypothesis draws."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

from merger import api
from merger.manifest import Manifest
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan, Task
from merger.report import MergeReport
from merger.storage import MemoryStore

Array = npt.NDArray[Any]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# ---- what is drawn: values whose float32 arithmetic is exact, so that no election hangs on a rounding ----------------

shapes = st.sampled_from([(1, 1), (1, 7), (7, 1), (3, 5), (8, 8), (9, 4), (33, 2), (5,), (1,), (), (2, 3, 4)])
weights = st.sampled_from([-1.5, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0])
densities = st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.34, 0.5, 0.75, 0.9, 1.0])
scales = st.sampled_from([-1.0, 0.5, 1.0, 2.0])


@st.composite
def grid(draw: st.DrawFn, shape: Sequence[int], *, bound: int = 8) -> Array:
    """Multiples of 1/8 with many equal magnitudes and zeros of both signs."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([1, 2, bound]))
    values = generator.integers(-spread, spread + 1, size=tuple(shape)).astype(np.float32) / 8
    return np.where(generator.random(tuple(shape)) < 0.1, np.float32(-0.0), values).astype(np.float32)


# ---- sources ---------------------------------------------------------------------------------------------------------

_counter = itertools.count()


class Places:
    """Names of memory stores, emptied at the end."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def fresh(self) -> str:
        name = f"test-{next(_counter)}"
        self.names.append(name)
        return name

    def clear(self) -> None:
        for name in self.names:
            MemoryStore(name).files.clear()
        self.names.clear()

    def out(self) -> str:
        return f"memory://{self.fresh()}"

    def model(self, tensors: Mapping[str, Tensor | Array], **config: Any) -> str:
        """A checkpoint of one file. Arrays are stored as float32."""
        store = MemoryStore(self.fresh())
        document = {"architectures": ["TinyForCausalLM"], "model_type": "tiny", **config}
        store.put("config.json", json.dumps(document).encode())
        store.put("model.safetensors", safetensors.torch.save(_tensors(tensors), metadata={"format": "pt"}))
        return store.uri

    def statistics(self, tensors: Mapping[str, Tensor | Array]) -> str:
        """One file of statistics. Arrays are stored as float32."""
        store = MemoryStore(self.fresh())
        store.put("statistics.safetensors", safetensors.torch.save(_tensors(tensors)))
        return f"{store.uri}/statistics.safetensors"

    def adapter(
        self, pairs: Mapping[str, tuple[Tensor | Array, Tensor | Array]], *, scaling: float = 1.0, **config: Any
    ) -> str:
        """A LoRA adapter with A and B a module; its scaling is alpha / r for all, whatever the ranks."""
        store = MemoryStore(self.fresh())
        ranks = {module: int(a.shape[0]) for module, (a, _) in pairs.items()}
        rank = max(ranks.values())
        document = {
            "peft_type": "LORA", "r": rank, "lora_alpha": scaling * rank, "target_modules": sorted(pairs),
            "rank_pattern": ranks, "alpha_pattern": {m: scaling * r for m, r in ranks.items()},
            "base_model_name_or_path": "org/base", **config,
        }  # fmt: skip
        tensors: dict[str, Tensor | Array] = {}
        for module, (a, b) in pairs.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
        store.put("adapter_config.json", json.dumps(document).encode())
        store.put("adapter_model.safetensors", safetensors.torch.save(_tensors(tensors), metadata={"format": "pt"}))
        return store.uri


def _tensors(tensors: Mapping[str, Tensor | Array]) -> dict[str, Tensor]:
    return {
        name: value.contiguous() if isinstance(value, Tensor)
        else torch.from_numpy(np.array(value, dtype=np.float32, order="C"))
        for name, value in tensors.items()
    }  # fmt: skip


@contextlib.contextmanager
def places() -> Iterator[Places]:
    found = Places()
    try:
        yield found
    finally:
        found.clear()


# ---- runs ------------------------------------------------------------------------------------------------------------


def read_tensors(uri: str) -> dict[str, Tensor]:
    """Every tensor of an output on a memory store."""
    files = MemoryStore(uri.removeprefix("memory://")).files
    found: dict[str, Tensor] = {}
    for name, data in sorted(files.items()):
        if name.endswith(".safetensors"):
            found |= safetensors.torch.load(bytes(data))
    return found


def read_bytes(uri: str) -> dict[str, bytes]:
    """Every file with tensors of an output on a memory store."""
    files = MemoryStore(uri.removeprefix("memory://")).files
    return {name: bytes(data) for name, data in files.items() if name.endswith(".safetensors")}


def run(plan: MergePlan, *, memory: int | None = None, workers: int = 1) -> MergeReport:
    """Run a plan here. `memory=0` gives each worker the least that the plan can do with."""
    if memory == 0:
        memory = peak_bytes(plan) * workers
    report = api.run_planned(plan, workers=workers, memory=memory or 256 << 20)
    assert isinstance(report, MergeReport)
    return report


def merge(place: Places, manifest: Mapping[str, object] | Manifest, **options: Any) -> dict[str, Tensor]:
    """Plan, run, read."""
    out = place.out()
    run(api.plan(manifest, out), **options)
    return read_tensors(out)


def merge_one(place: Places, manifest: Mapping[str, object], name: str = "w") -> Array:
    """The tensor of this name, in float64."""
    return merge(place, manifest)[name].double().numpy()


def at(plan: MergePlan, out: str) -> MergePlan:
    """The same plan with another output."""
    (output,) = plan.outputs
    return replace(plan, outputs=(replace(output, path=out),))


def recut(plan: MergePlan, **changes: Any) -> MergePlan:
    """The same plan with every task that computes cut otherwise; `extent_rows` is in tiles."""

    def changed(task: Task) -> Task:
        if task.results[0].store.kind == "copy" or task.cut == "whole":
            return task
        tile = int(changes.get("tile_rows", task.tile_rows))
        update = dict(changes)
        if "extent_rows" in changes:
            update["extent_rows"] = changes["extent_rows"] * tile
        elif "tile_rows" in changes:
            update["extent_rows"] = max(1, task.extent_rows // tile) * tile
        return replace(task, **update)

    return replace(plan, tasks=tuple(changed(task) for task in plan.tasks))


def models(
    method: str, base: str | None, others: Sequence[str], parameters: Sequence[Mapping[str, object]],
    shared: Mapping[str, object] | None = None, **keys: object,
) -> dict[str, object]:  # fmt: skip
    """A manifest of models."""
    document: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": o, "parameters": dict(p)} for o, p in zip(others, parameters, strict=True)],
        **keys,
    }
    if base is not None:
        document["base_model"] = base
    if shared:
        document["parameters"] = dict(shared)
    return document


def adapters(
    method: str, sources: Sequence[str], parameters: Sequence[Mapping[str, object]],
    shared: Mapping[str, object] | None = None, **keys: object,
) -> dict[str, object]:  # fmt: skip
    """A manifest of adapters."""
    document: dict[str, object] = {
        "merge_method": method,
        "adapters": [{"adapter": s, "parameters": dict(p)} for s, p in zip(sources, parameters, strict=True)],
        **keys,
    }
    if shared:
        document["parameters"] = dict(shared)
    return document
