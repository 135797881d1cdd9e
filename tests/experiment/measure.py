"""Merge as a row says, with raymerge itself, and score the result at scale 1 and at the scale validation chooses.

A measurement is a line of JSON; every line says which arm, seed and row it is of, so that a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merger.api import merge
from tests.experiment.adapters import folder_of
from tests.experiment.rows import FLIPPED, ROTATED, ROWS, SAME, SCALES, Row
from tests.experiment.scoring import Bench, Deltas, Scores, read_deltas
from tests.experiment.tasks import ARMS, SEEDS, TASKS, TRAININGS

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One row of one arm at one seed; `base`, `adapter NAME` and `same` are rows too."""

    arm: str
    seed: int
    row: str

    @property
    def key(self) -> tuple[str, int, str]:
        """What finds the job's lines again."""
        return self.arm, self.seed, self.row


@dataclass(frozen=True, slots=True)
class Places:
    """Folders of the run."""

    base: Path
    tail: Path
    adapters: Path


_BY_NAME: Final = {row.name: row for row in (*ROWS, FLIPPED, *ROTATED)}


def all_jobs() -> list[Job]:
    """Everything that is measured."""
    found = [Job("single", 0, "base")]
    for seed in SEEDS:
        found += [Job("single", seed, f"adapter {name}") for name in TRAININGS]
        found += [Job(arm, seed, row.name) for row in ROWS for arm in ARMS]
        found += [Job("distinct", seed, row.name) for row in (FLIPPED, *ROTATED)]
    return [*found, *(Job("distinct", seed, "same") for seed in SEEDS[:1])]


def merged_deltas(row: Row, sources: Sequence[Path], tail: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The deltas of the merge of these adapters: by raymerge, folded into the base's float32 weights."""
    with tempfile.TemporaryDirectory() as work:
        adapters = [Path(source) for source in sources]
        if row.rotated:
            adapters = [rotate(source, Path(work) / f"rotated{i}", seed=i) for i, source in enumerate(sources)]
        manifest = manifest_of(row, adapters, tail)
        out = Path(work) / "merged"
        merge(manifest, out, workers=1)
        if row.by_adapter:
            adapter, out = out, Path(work) / "folded"
            merge({"base_model": str(tail), "adapters": [{"adapter": str(adapter)}], "output": {"kind": "model"}}, out,
                  workers=1)  # fmt: skip
        return read_deltas(out, weights)


def manifest_of(row: Row, sources: Sequence[Path], base: Path) -> dict[str, Any]:
    """The row's manifest with sources, base and the kind of output."""
    given = [row.weights.get(i, 1.0) for i in range(len(sources))]
    manifest: dict[str, Any] = {
        **row.manifest,
        "base_model": str(base),
        "adapters": [{"adapter": str(source)} for source in sources],
        "output": {"kind": "adapter" if row.by_adapter else "model"},
    }
    if row.rank is not None:
        manifest["output"]["store"] = {"svd": {"rank": row.rank}}
    if "combination_type" in row.manifest:
        manifest["weights"] = given
    elif row.weights:
        for entry, weight in zip(manifest["adapters"], given, strict=True):
            entry["parameters"] = {"weight": weight}
    return manifest


def rotate(source: Path, out: Path, *, seed: int) -> Path:
    """A copy of an adapter, in float32, with B·Q and Qᵀ·A for B and A: the same ΔW."""
    shutil.copytree(source, out)
    file = out / "adapter_model.safetensors"
    factors = {name: w.float() for name, w in load_file(file).items()}
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(factors):
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        rank = factors[name].shape[0]
        q = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
        factors[name] = (q.T @ factors[name].double()).float().contiguous()
        factors[other] = (factors[other].double() @ q).float().contiguous()
    save_file(factors, file, metadata={"format": "pt"})
    return out


def climb(value: Callable[[float], tuple[float, float]]) -> float:
    """The scale of the shared grid that is reached from 1 by going on for as long as it gets better."""
    at = SCALES.index(1.0)
    for step in (-1, 1):
        start = at
        while 0 <= at + step < len(SCALES) and value(SCALES[at + step]) > value(SCALES[at]):
            at += step
        if at != start:
            break
    return SCALES[at]


def norm(deltas: Deltas) -> float:
    """The Frobenius norm of all deltas together."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(d)) ** 2 for d in deltas.values()))


def distance(deltas: Deltas, reference: Deltas) -> float:
    """‖deltas − reference‖ / ‖reference‖."""
    return norm({name: deltas[name] - d for name, d in reference.items()}) / norm(reference)


def cosine(deltas: Deltas, reference: Deltas) -> float:
    """The cosine of the angle between two sets of deltas."""
    inner = sum(float(torch.dot(deltas[name].flatten(), d.flatten())) for name, d in reference.items())
    return inner / (norm(deltas) * norm(reference))


class Worker:
    """A process that measures: the base in memory, the plain sum of each arm and seed for comparison."""

    def __init__(self, places: Places) -> None:
        """Read the base and compute every item's states."""
        torch.set_num_threads(1)
        self._places = places
        self._bench = Bench(places.base, places.tail, list(TASKS))
        self._sums: dict[tuple[str, int], dict[str, Tensor]] = {}

    def measure(self, job: Job) -> list[Line]:
        """The job's lines."""
        started = time.perf_counter()
        lines = list(self._measure(job))
        lines[0]["seconds"] = round(time.perf_counter() - started, 1)
        return lines

    def _deltas(self, row: Row, arm: str, seed: int) -> dict[str, Tensor]:
        sources = [folder_of(self._places.adapters, name, seed) for name in ARMS[arm].sources]
        return merged_deltas(row, sources, self._places.tail, self._bench.tail)

    def _sum(self, arm: str, seed: int) -> dict[str, Tensor]:
        if (arm, seed) not in self._sums:
            self._sums[arm, seed] = self._deltas(_BY_NAME["task_arithmetic"], arm, seed)
        return self._sums[arm, seed]

    def _measure(self, job: Job) -> Iterator[Line]:
        head: Line = {"arm": job.arm, "seed": job.seed, "row": job.row}
        if job.row == "same":
            yield {**head, "what": "same", "distance": {row.name: d for row, d in self._same(job)}}
            return
        if job.arm == "single":
            deltas = {} if job.row == "base" else self._single(job)
            yield {**head, "what": "merge", **({"norm": norm(deltas)} if deltas else {})}
            for task, scores in self._bench.score(deltas, list(TASKS), "test").items():
                yield _scored(head, "default", 1.0, task, scores)
            return
        row, tasks = _BY_NAME[job.row], ARMS[job.arm].tasks
        started = time.perf_counter()
        deltas = self._deltas(row, job.arm, job.seed)
        plain = self._sum(job.arm, job.seed)
        merged: Line = {
            **head, "what": "merge", "merge_seconds": round(time.perf_counter() - started, 1),
            "norm": norm(deltas), "cosine": cosine(deltas, plain),
        }  # fmt: skip
        if row.rotated:
            whole = _BY_NAME[row.name.removesuffix(", rotated")]
            merged["rotation"] = distance(deltas, self._deltas(whole, job.arm, job.seed))
        yield merged
        for task, scores in self._bench.score(deltas, tasks, "test").items():
            yield _scored(head, "default", 1.0, task, scores)
        if not row.tuned:
            return
        found: dict[float, tuple[float, float]] = {}
        best = climb(lambda scale: self._validated(found, deltas, tasks, scale))
        yield {**head, "what": "validation", "scales": [[s, round(a, 4), round(n, 4)] for s, (a, n) in found.items()]}
        for task, scores in self._bench.score(deltas, tasks, "test", scale=best).items() if best != 1.0 else ():
            yield _scored(head, "tuned", best, task, scores)

    def _validated(
        self, found: dict[float, tuple[float, float]], deltas: Deltas, tasks: Sequence[str], scale: float
    ) -> tuple[float, float]:
        """Accuracy and negative loss on validation items: the larger, the better; equal accuracies go by loss."""
        if scale not in found:
            found[scale] = _mean(self._bench.score(deltas, tasks, "validation", scale=scale))
        accuracy, loss = found[scale]
        return round(accuracy, 9), -loss

    def _single(self, job: Job) -> dict[str, Tensor]:
        folder = folder_of(self._places.adapters, job.row.removeprefix("adapter "), job.seed)
        return merged_deltas(_BY_NAME["task_arithmetic"], [folder], self._places.tail, self._bench.tail)

    def _same(self, job: Job) -> Iterator[tuple[Row, float]]:
        for row, reference in SAME:
            other = self._deltas(_BY_NAME[reference], job.arm, job.seed)
            yield row, distance(self._deltas(row, job.arm, job.seed), other)


def _scored(head: Line, at: str, scale: float, task: str, scores: Scores) -> Line:
    right = "".join("01"[r] for r in scores.right)
    return {**head, "what": "scores", "at": at, "scale": scale, "task": task, "right": right, "loss": scores.loss}


def _mean(scores: Mapping[str, Scores]) -> tuple[float, float]:
    """Accuracy and loss, the mean over the tasks."""
    accuracy = [sum(s.right) / len(s.right) for s in scores.values()]
    loss = [sum(s.loss) / len(s.loss) for s in scores.values()]
    return sum(accuracy) / len(accuracy), sum(loss) / len(loss)


_worker: Worker


def _start(places: Places) -> None:
    global _worker  # noqa: PLW0603 - a process of the pool has one
    _worker = Worker(places)


def _run(job: Job) -> list[Line]:
    return _worker.measure(job)


def read_lines(log: Path) -> list[Line]:
    """The lines of a run so far; one that was cut short is left out."""
    found = []
    for text in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def run(places: Places, log: Path, jobs: Sequence[Job], *, processes: int = 2) -> Iterator[Job]:
    """Measure what the log lacks, and append it; one line of the log is one job's lines."""
    done = {(entry["arm"], entry["seed"], entry["row"]) for entry in read_lines(log)}
    missing = [job for job in jobs if job.key not in done]
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(processes, len(missing)), _start, (places,)) as pool, log.open("a", encoding="utf-8") as file:
        for job, lines in zip(missing, pool.imap(_run, missing), strict=True):
            entry = {"arm": job.arm, "seed": job.seed, "row": job.row, "lines": lines}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            yield job


def digest(folder: Path) -> str:
    """The SHA-256 of an adapter's weights."""
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
