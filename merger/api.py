"""The Python face of raymerge: what the command line calls, and all that a program needs.

merger.plan(manifest)                        what a merge would do
merger.merge(manifest, out)                  do it
merger.fold(adapters, out, base=…)           adapters into their base
merger.add_weighted_adapter(adapters, …)     PEFT's call, from files to files
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from merger.bulk import manifest_text
from merger.documents import plan_documents, plans_of
from merger.errors import ManifestError, PlanError, RaymergeError
from merger.intermediates import bytes_in_memory, made_first
from merger.manifest import Manifest, Reference, load_manifest, parse_model_reference, parse_reference
from merger.methods.plugin import load_installed, load_plugin
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan
from merger.storage.base import Sink

if TYPE_CHECKING:
    from merger.gates import HiddenStates
    from merger.watch import Watch

ManifestLike = str | Path | Mapping[str, object] | Manifest
"""A manifest's path or YAML text, plain data, or the typed value."""
EXTRACTED_RANK: Final = 16
"""What engines serve without being told otherwise."""


class Runner(Protocol):
    """Something that runs what is left of a plan: merger.run.run_here, or cluster.run's on Ray."""

    def __call__(
        self, plan: MergePlan, progression: Any, sinks: Sequence[Sink], recorder: Any, *, memory: int, workers: int,
        device: str, stop: Any,
    ) -> None: ...  # fmt: skip


def as_manifest(manifest: ManifestLike, *, overrides: Sequence[str] = (), strict: bool = False) -> Manifest:
    """Load a manifest from any of its forms. Raises ManifestError with every problem."""
    if isinstance(manifest, Manifest):
        return manifest
    if not isinstance(manifest, str):
        return load_manifest(manifest, overrides=overrides, strict=strict)
    text = manifest_text(manifest)
    return load_manifest(text, overrides=overrides, strict=strict, name="" if text is manifest else manifest)


def output_reference(manifest: Manifest, out: str | Path | None) -> Reference:
    """Where the result goes. Raises ManifestError(code `no-output`)."""
    if out is not None:
        return parse_reference(str(out), bare="local")
    if manifest.output.path is not None:
        return manifest.output.path
    raise ManifestError.of(
        "no-output", "no output is named", where="output.path", fix="give OUT, -o OUT, or output.path in the manifest"
    )


def plan(
    manifest: ManifestLike, out: str | Path | None = None, *, device: Literal["cpu", "cuda"] = "cpu",
    overrides: Sequence[str] = (), strict: bool = False,
) -> MergePlan:  # fmt: skip
    """Decide everything about a merge from configs and headers; read no tensor data and import no torch.

    What is wrong with the inputs is in `MergePlan.problems`. Raises ManifestError for what is wrong with the manifest.
    """
    load_installed()
    loaded = as_manifest(manifest, overrides=overrides, strict=strict)
    path = str(output_reference(loaded, out)) if out is not None or loaded.output.path is not None else ""
    return plan_documents(loaded, path, device)


def merge(
    manifest: ManifestLike,
    out: str | Path | None = None,
    *,
    workers: int | None = None,
    memory: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    restart: bool = False,
    run_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    strict: bool = False,
    runner: Runner | None = None,
    listener: Any = None,
    stop: Any = None,
    hidden: HiddenStates | None = None,
    watch: Watch | None = None,
    device_memory: int | None = None,
) -> Any:
    """Merge what a manifest says and publish the result; resume what an earlier run left.

    `memory` is bytes of buffers shared by `workers` threads (or actors, with another `runner`); the output's bytes
    depend on neither. `run_dir` holds the state of a run whose output is a repository (a folder, or s3://…; all workers
    must reach it). `hidden` does the forward pass that gates of experts may need (`merger.moe` brings one); `watch` is
    told what happens (merger/watch.py); `device_memory` is what a worker may take of its GPU, in bytes.
    Returns a `merger.report.MergeReport`.

    Raises ManifestError, SourceError, PlanError (nothing was written), OutputExistsError, InfrastructureError (a lease
    that is held), MergeFailedError, StoppedError (the same call resumes).
    """
    planned = plan(manifest, out, device=device, overrides=overrides, strict=strict)
    return run_planned(
        planned, workers=workers, memory=memory, restart=restart, run_dir=run_dir, runner=runner, listener=listener,
        stop=stop, hidden=hidden, watch=watch, device_memory=device_memory,
    )  # fmt: skip


def run_planned(
    planned: MergePlan,
    *,
    workers: int | None = None,
    memory: int | None = None,
    restart: bool = False,
    run_dir: str | Path | None = None,
    runner: Runner | None = None,
    listener: Any = None,
    stop: Any = None,
    hidden: HiddenStates | None = None,
    watch: Watch | None = None,
    device_memory: int | None = None,
) -> Any:
    """Run a plan without problems to its end. See `merge`. `device_memory` is what a worker may take of its GPU."""
    if planned.problems:
        raise PlanError(planned.problems)
    from merger.gates import fill_gates
    from merger.session import Session
    from merger.steps import check_steps

    session = Session.open(planned, restart=restart, run_dir=None if run_dir is None else str(run_dir))
    allowed = memory or default_memory()
    held = bytes_in_memory(planned, allowed) if planned.before and runner is None else None
    if session.done is None:
        count = workers or min(default_workers(one, allowed) for one in plans_of(planned).values())
        check_steps(session, allowed // count, allowed, hidden, beside=held is None)
    memory = allowed - held if held else memory

    def make(one: MergePlan) -> Any:
        return run_planned(
            one, workers=workers, memory=memory, restart=restart, run_dir=run_dir, runner=runner, listener=listener,
            stop=stop, hidden=hidden, watch=watch, device_memory=device_memory,
        )  # fmt: skip

    place = session.destinations[0] if held is None else None
    with made_first(session.planned, place, make, result=session.done is None) as ready:
        if session.done is not None:
            return session.conclude_done()
        session.planned = fill_gates(ready, hidden)
        return _run(
            session, workers, memory, runner=runner, listener=listener, stop=stop, watch=watch,
            device_memory=device_memory,
        )  # fmt: skip


def _run(
    session: Any, workers: int | None, memory: int | None, *, runner: Runner | None, listener: Any, stop: Any,
    watch: Watch | None, device_memory: int | None,
) -> Any:  # fmt: skip
    from merger.crew import check_gpu, lanes, thread_bytes
    from merger.events import Event
    from merger.run import Recorder, Stop, run_here
    from merger.run_files import RunFiles
    from merger.steps import end_without_result, stretches
    from merger.watch import Watch

    run = runner or functools.partial(run_here, device_memory=device_memory)
    planned, sinks = session.planned, session.sinks
    memory = memory or default_memory()
    workers = workers or default_workers(planned, memory)
    session.check(thread_bytes(planned, sinks, memory=memory, threads=workers * lanes(planned, sinks)))
    if device_memory is not None:
        sharing = lanes(planned, sinks) * (workers if runner is None else 1)
        check_gpu(planned, device_memory // sharing)
    session.take()
    try:
        state = session.destinations[0].state
        stop = stop or Stop()
        diary = session.diary
        with RunFiles(diary, state, session.epoch, stop):
            watch = (watch or Watch()).also(diary.announce, run=planned.identity[:12])
            watch.event(
                Event(
                    "run-begun", f"{len(planned.units)} units in {planned.num_stages} stages for {workers} workers",
                    {"units": len(planned.units), "workers": workers},
                )
            )  # fmt: skip
            for stretch in stretches(session):
                if session.resumed:
                    watch.event(
                        Event(
                            "resumed", f"{session.resumed} units are kept of an earlier run",
                            {"units": session.resumed},
                        )
                    )  # fmt: skip
                recorder = Recorder(
                    stretch.progression, stretch.record, diary.listen(listener), aside=state.remote, watch=watch
                )
                run(
                    stretch.plan, stretch.progression, stretch.sinks, recorder, memory=memory, workers=workers,
                    device=planned.device, stop=stop,
                )  # fmt: skip
            watch.event(
                Event("units-done", "all units are done", {"units": len(stretch.progression.receipts)})
            )  # fmt: skip
        report = session.finish(workers=f"{workers}", fingerprint=recorder.fingerprint)
        watch.event(
            Event("published", f"published {report.path}", {"path": report.path, "content": report.content_digest[:12]})
        )
        return report
    except BaseException as error:  # whatever ends the run, a stop too, the lease is given back
        failed = end_without_result(session, error)
        if failed is error:
            raise
        raise failed from error


def default_memory() -> int:
    """Half of what this machine has available. A bound, not a habit: blocks stay small where that is as fast."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 2
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, OSError):
        return 2 << 30


def default_workers(planned: MergePlan, memory: int) -> int:
    """As many as there are cores, or as many as `memory` has room for."""
    return max(1, min(os.cpu_count() or 1, memory // max(1, peak_bytes(planned))))


def _several(adapters: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [adapters] if isinstance(adapters, str | Path) else adapters


def fold_manifest(
    adapters: str | Path | Sequence[str | Path], *, base: str | Path | None = None,
    weights: Sequence[float] | None = None, rounding: Literal["once", "peft_safe"] = "once",
) -> dict[str, object]:  # fmt: skip
    """The manifest that `raymerge fold` stands for. An adapter may be written with its base, `base+adapter`.

    Raises ManifestError where bases differ."""
    adapters, base = _with_bases(_several(adapters), base)
    document: dict[str, object] = {"merge_method": "task_arithmetic"}
    if base is not None:
        document["base_model"] = str(base)
    given: Sequence[float | None] = weights if weights is not None else [None] * len(adapters)
    document["adapters"] = [
        {"adapter": str(a), **({"parameters": {"weight": w}} if w is not None else {})}
        for a, w in zip(adapters, given, strict=True)
    ]
    bare = base is not None and str(base).endswith(".safetensors") and not Path(base).is_dir()
    output: dict[str, object] = {"kind": "tensors" if bare else "model"}
    if rounding != "once":
        output["rounding"] = rounding
    document["output"] = output
    return document


def _with_bases(adapters: Sequence[str | Path], base: str | Path | None) -> tuple[list[str], str | Path | None]:
    """Adapters without the bases that are written before them, and the one base of all."""
    found: list[str] = []
    named = {} if base is None else {str(base): "--base"}
    for adapter in map(str, adapters):
        if "+" not in adapter or Path(adapter).exists():
            found.append(adapter)
            continue
        reference = parse_model_reference(adapter)
        named.setdefault(str(reference.model), adapter)
        found += map(str, reference.adapters)
    if len({str(parse_reference(name)) for name in named}) > 1:
        raise ManifestError.of(
            "conflict", f"{len(named)} bases are named: {', '.join(named)}", where=", ".join(named.values()),
            why="adapters are folded into one model", fix="name one base, or fold them one after another",
        )  # fmt: skip
    return found, next(iter(named), None)


def extract_manifest(
    model: str | Path, *, base: str | Path, rank: int | None = None, energy: float | None = None,
    modules_to_save: Literal["refuse", "all", "drop"] = "refuse",
) -> dict[str, object]:  # fmt: skip
    """The manifest that `raymerge extract` stands for. Raises ManifestError where both rank and energy are given."""
    if rank is not None and energy is not None:
        raise ManifestError.of(
            "bad-arguments", "an adapter is cut at a rank or at an energy, not at both", where="--rank, --energy",
            fix="give one of them",
        )  # fmt: skip
    svd = {"rank": EXTRACTED_RANK if rank is None else rank} if energy is None else {"energy": energy}
    output: dict[str, object] = {"kind": "adapter", "store": {"svd": svd}}
    if modules_to_save != "refuse":
        output["modules_to_save"] = modules_to_save
    return {
        "merge_method": "task_arithmetic", "base_model": str(base),
        "models": [{"model": str(model), "parameters": {"weight": 1.0}}], "output": output,
    }  # fmt: skip


def extract(
    model: str | Path, out: str | Path, *, base: str | Path, rank: int | None = None, energy: float | None = None,
    modules_to_save: Literal["refuse", "all", "drop"] = "refuse", **options: Any,
) -> Any:  # fmt: skip
    """Write what a model changed from its base as a LoRA, cut at a rank (default 16) or at a share of the energy.

    `options` are those of `merge`. Raises what `merge` raises.
    """
    document = extract_manifest(model, base=base, rank=rank, energy=energy, modules_to_save=modules_to_save)
    return merge(document, out, **options)


def fold(
    adapters: str | Path | Sequence[str | Path], out: str | Path, *, base: str | Path | None = None,
    rounding: Literal["once", "peft_safe"] = "once", **options: Any,
) -> Any:  # fmt: skip
    """Fold one or several adapters into their base and write the model, as PEFT's merge_and_unload would.

    `rounding="once"` adds all deltas in float32 and rounds once; `peft_safe` rounds each delta to the base's dtype
    first, as `merge_and_unload(safe_merge=True)` does. Further options are those of `merge`.
    """
    return merge(fold_manifest(adapters, base=base, rounding=rounding), out, **options)


def add_weighted_adapter(
    adapters: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    *,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool | None = None,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] | None = None,
    base: str | Path | None = None,
    **options: Any,
) -> Any:
    """PEFT's `add_weighted_adapter`, from adapter folders to a merged adapter, with no model.

    Keywords and values are PEFT 0.21.2's; where PEFT is silently wrong this is right or refuses. Further options are
    those of `merge`. Raises ManifestError when the numbers of adapters and weights differ (PEFT ignores the surplus).
    """
    document: dict[str, object] = {
        "combination_type": combination_type,
        "adapters": [{"adapter": str(a)} for a in adapters],
        "weights": [float(w) for w in weights],
        "output": {"kind": "adapter"},
    }
    given = {
        "svd_rank": svd_rank, "svd_clamp": svd_clamp, "svd_full_matrices": svd_full_matrices,
        "svd_driver": svd_driver, "density": density, "majority_sign_method": majority_sign_method,
        "base_model": None if base is None else str(base),
    }  # fmt: skip
    document.update({key: value for key, value in given.items() if value is not None})
    return merge(document, out, **options)


__all__ = [
    "RaymergeError", "add_weighted_adapter", "default_memory", "fold", "fold_manifest", "load_plugin", "merge", "plan",
    "run_planned",
]  # fmt: skip
