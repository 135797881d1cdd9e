"""The Python face of raymerge: what the command line calls, and all that a program needs.

merger.plan(manifest)                        what a merge would do
merger.merge(manifest, out)                  do it
merger.fold(adapters, out, base=…)           adapters into their base
merger.add_weighted_adapter(adapters, …)     PEFT's call, from files to files
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from merger.catalog import Catalog
from merger.destination import Destination, OutputSettings, open_destination
from merger.errors import ManifestError, MergeFailedError, PlanError, Problem, RaymergeError, RefusedError
from merger.inputs import read_inputs
from merger.intermediates import (
    bytes_beside,
    bytes_in_memory,
    documents_read,
    made_first,
    needed,
    path_problems,
    plans_of,
)
from merger.made import made_catalog
from merger.manifest import Manifest, Reference, documents_named, load_manifest, parse_reference
from merger.methods.compose import method_label
from merger.methods.plugin import load_installed, load_plugin
from merger.planning.build import check_machine, plan_merge
from merger.planning.memory import peak_bytes
from merger.planning.nouns import MergePlan
from merger.storage import LocalStore, Store
from merger.storage.base import Sink

if TYPE_CHECKING:
    from merger.gates import HiddenStates

ManifestLike = str | Path | Mapping[str, object] | Manifest
"""A manifest's path or YAML text, plain data, or the typed value."""


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
    return load_manifest(manifest, overrides=overrides, strict=strict)


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
    return _plan_documents(loaded, path, device)


def _plan_documents(manifest: Manifest, path: str, device: Literal["cpu", "cuda"]) -> MergePlan:
    """The plan of a manifest, with those of the documents it reads before it: each is planned against the planned
    outputs of the others."""
    before: list[tuple[str, MergePlan]] = []
    made: dict[str, Catalog] = {}
    problems: list[Problem] = []
    for name, document in manifest.documents.items():
        if any(f"merge://{needed}" not in made for needed in documents_named(document.resolved())):
            continue  # what it reads is refused already
        place = "" if document.output.path is None else str(document.output.path)
        planned = plan_merge(document, read_inputs(document, made), path=place, device=device)
        problems += [replace(p, where=f"documents.{name}: {p.where}") for p in planned.problems]
        if not planned.problems:
            before.append((name, planned))
            made[f"merge://{name}"] = made_catalog(name, planned)
    own = manifest.model_copy(update={"documents": {}})
    if problems and any(f"merge://{needed}" not in made for needed in documents_named(own.resolved())):
        return MergePlan(sources=(), outputs=(), tasks=(), device=device, problems=tuple(problems))
    found = plan_merge(own, read_inputs(own, made), path=path, device=device)
    if not manifest.documents:
        return found
    found = replace(
        found, before=tuple(before), problems=(*problems, *found.problems),
        warnings=tuple(dict.fromkeys(w for plan in (*(p for _, p in before), found) for w in plan.warnings)),
    )  # fmt: skip
    plans = dict(needed(found, result=True))
    used = {name: plan.manifest for name, plan in plans.items() if name in documents_read(found)}
    return replace(
        found, problems=(*found.problems, *path_problems(found)),
        manifest={**found.manifest, **({"documents": used} if used else {})},
    )  # fmt: skip


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
) -> Any:
    """Merge what a manifest says and publish the result; resume what an earlier run left.

    `memory` is bytes of buffers shared by `workers` threads (or actors, with another `runner`); the output's bytes
    depend on neither. `run_dir` holds the state of a run whose output is a repository (a folder, or s3://…; all workers
    must reach it). `hidden` does the forward pass that gates of experts may need (`merger.moe` brings one).
    Returns a `merger.report.MergeReport`.

    Raises ManifestError, SourceError, PlanError (nothing was written), OutputExistsError, InfrastructureError (a lease
    that is held), MergeFailedError, StoppedError (the same call resumes).
    """
    planned = plan(manifest, out, device=device, overrides=overrides, strict=strict)
    return run_planned(
        planned, workers=workers, memory=memory, restart=restart, run_dir=run_dir, runner=runner, listener=listener,
        stop=stop, hidden=hidden,
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
) -> Any:
    """Run a plan without problems to its end. See `merge`."""
    if planned.problems:
        raise PlanError(planned.problems)
    if not planned.outputs or not planned.outputs[0].path:
        raise ManifestError.of("no-output", "no output is named", where="output.path", fix="give OUT or output.path")
    exists = output_options(planned).get("exists", "refuse")
    pointer: str | None = None
    if exists == "version":
        pointer = planned.outputs[0].path
        if parse_reference(pointer, bare="local").kind == "hub":
            raise ManifestError.of(
                "conflict", "a repository keeps its versions itself", where="output.exists",
                why="each merge is a commit, and its branch names the latest", fix="write exists: replace",
            )  # fmt: skip
        planned = versioned(planned)
    settings = output_settings(planned)
    state = None if run_dir is None else str(run_dir)
    destinations = [open_destination(output.path, run_dir=state, settings=settings) for output in planned.outputs]
    if restart or exists == "replace":
        _refuse_own_sources(planned, destinations)
    report = None if restart else finished_report(planned, destinations[0])
    if report is None and planned.gates is not None:
        _check_gates(planned, destinations[0], hidden, memory, restart=restart, replacing=exists == "replace")
    held: int | None = None
    if planned.before:
        allowed = memory or default_memory()
        held = None if runner is not None else bytes_in_memory(planned, allowed)
        if report is None:
            beside = 0 if held is not None else bytes_beside(planned)
            _check_documents(
                planned, destinations[0], workers, allowed, beside, hidden, restart=restart,
                replacing=exists == "replace",
            )  # fmt: skip
        memory = allowed - held if held else memory

    def make(one: MergePlan) -> Any:
        return run_planned(
            one, workers=workers, memory=memory, restart=restart, run_dir=run_dir, runner=runner, listener=listener,
            stop=stop, hidden=hidden,
        )  # fmt: skip

    place = destinations[0] if held is None else None
    with made_first(planned, place, make, result=report is None) as planned:
        if report is None:
            report = _prepare_and_run(
                _with_gates(planned, hidden), destinations, workers, memory, restart=restart,
                replacing=exists == "replace", runner=runner, listener=listener, stop=stop,
            )  # fmt: skip
    if pointer is not None:
        from merger.versions import point_to_latest

        point_to_latest(open_destination(pointer, run_dir=state, settings=settings), planned, report)
    return report


def _with_gates(planned: MergePlan, hidden: HiddenStates | None) -> MergePlan:
    if planned.gates is None:
        return planned
    from merger.gates import fill_gates

    return fill_gates(planned, hidden)


def _check_gates(
    planned: MergePlan, destination: Destination, hidden: HiddenStates | None, memory: int | None, *, restart: bool,
    replacing: bool,
) -> None:  # fmt: skip
    """Whether gates can be made and the output may be written: seen first, since a forward pass may take long."""
    from merger.gates import check_forward
    from merger.journal import check_output
    from merger.output import plan_document

    check_forward(planned, hidden, memory or default_memory())
    check_output(
        destination.state, destination.content, plan_document(planned), restart=restart, replace=replacing
    )  # fmt: skip


def _check_documents(
    planned: MergePlan, destination: Destination, workers: int | None, allowed: int, beside: int,
    hidden: HiddenStates | None, *, restart: bool, replacing: bool,
) -> None:  # fmt: skip
    """Whether the last merge of several could begin: seen before the first of them does. `beside` is bytes of
    intermediates that will lie with its output."""
    from merger.journal import check_output
    from merger.output import plan_document

    check_output(
        destination.state, destination.content, plan_document(planned), restart=restart, replace=replacing
    )  # fmt: skip
    free = _free(destination, restart=restart)
    problems: list[Problem] = []
    for name, plan in plans_of(planned).items():
        share = allowed // (workers or default_workers(plan, allowed))
        room = None if free is None or name else free - beside
        problems += check_machine(plan, memory=share, free_bytes=room)
        if plan.gates is not None:
            from merger.gates import check_forward

            check_forward(plan, hidden, allowed)
    if problems:
        raise PlanError(problems)


def output_options(planned: MergePlan) -> dict[str, Any]:
    """The manifest's `output:` as the plan keeps it."""
    options = planned.manifest.get("output")
    return dict(options) if isinstance(options, dict) else {}


def output_settings(planned: MergePlan) -> OutputSettings:
    """What the manifest says of the place of the output."""
    options = output_options(planned)
    s3 = options.get("s3") or {}
    return OutputSettings(
        options.get("private"),
        s3.get("kms_key_id"),
        s3.get("storage_class"),
        tuple(sorted((s3.get("tags") or {}).items())),
    )


def versioned(planned: MergePlan) -> MergePlan:
    """The same plan with its output at PATH/<fingerprint>."""
    made = planned.outputs[0]
    from merger.versions import fingerprint

    path = str(parse_reference(made.path, bare="local").child(fingerprint(planned)))
    return replace(planned, outputs=(replace(made, path=path), *planned.outputs[1:]))


def _refuse_own_sources(planned: MergePlan, destinations: Sequence[Destination]) -> None:
    """What is removed to make way is what an earlier merge made there: never what this one reads."""
    for destination in destinations:
        for source in planned.sources:
            for name in source.catalog.pins:
                if _lies_in(source.catalog.store, name, destination.content):
                    raise PlanError.of(
                        "output-is-source", "a source of this merge would be removed", why="the source lies in the "
                        "output's folder, which is cleared first", fix="choose another output",
                        where=f"{destination.uri} (source {source.label})",
                    )  # fmt: skip


def _lies_in(store: Store, name: str, place: Store) -> bool:
    if isinstance(store, LocalStore) and isinstance(place, LocalStore):
        root = os.path.realpath(place.root)
        return os.path.commonpath([root, os.path.realpath(store.path(name))]) == root
    return store.remote and place.remote and f"{store.uri}/{name}".startswith(f"{place.uri}/")


def _prepare_and_run(
    planned: MergePlan, destinations: Sequence[Destination], workers: int | None, memory: int | None, *, restart: bool,
    replacing: bool, runner: Runner | None, listener: Any, stop: Any,
) -> Any:  # fmt: skip
    from merger.crew import lanes, thread_bytes

    sinks = [destination.sink for destination in destinations]
    memory = memory or default_memory()
    workers = workers or default_workers(planned, memory)
    share = thread_bytes(planned, sinks, memory=memory, threads=workers * lanes(planned, sinks))
    problems = check_machine(planned, memory=max(0, share), free_bytes=_free(destinations[0], restart=restart))
    if problems:
        raise PlanError(problems)
    for sink in sinks:
        sink.probe()
    for source in planned.sources:
        source.catalog.store.resolve(sorted({stored.file for stored in source.catalog.tensors.values()}))
    return _run(
        planned, destinations, workers, memory, restart=restart, replacing=replacing, runner=runner, listener=listener,
        stop=stop,
    )  # fmt: skip


def _run(
    planned: MergePlan, destinations: Sequence[Destination], workers: int, memory: int, *, restart: bool,
    replacing: bool, runner: Runner | None, listener: Any, stop: Any,
) -> Any:  # fmt: skip
    from merger.journal import Journal
    from merger.output import begin, finish, plan_document, surviving, to_seal
    from merger.run import Progression, Recorder, run_here

    started = time.monotonic()
    first = destinations[0]
    fresh = (
        first.content.root if isinstance(first.content, LocalStore) and not os.path.exists(first.content.root) else None
    )
    sinks = [destination.sink for destination in destinations]
    journal = Journal.open(
        first.state, plan_document(planned), content=first.content, sink=first.sink, restart=restart, replace=replacing
    )
    progression: Progression | None = None
    try:
        begin(planned, sinks)
        kept = surviving(planned, sinks, journal.receipts().values())
        batch = max(sink.batch_bytes for sink in sinks)
        progression = Progression(planned, kept, to_seal(planned, sinks), batch_bytes=batch)
        resumed = len(progression.receipts)
        recorder = Recorder(progression, journal.append, listener, aside=first.state.remote)
        (runner or run_here)(
            planned, progression, sinks, recorder, memory=memory, workers=workers, device=planned.device, stop=stop
        )
        (report, *_) = finish(
            planned, sinks, progression.receipts, journal, seconds=time.monotonic() - started, resumed=resumed,
            workers=f"{workers}", message=commit_message(planned),
        )  # fmt: skip
    except RefusedError as error:
        if progression is None or not progression.receipts:  # it never started: the output is left as it was found
            for output, sink in zip(planned.outputs, sinks, strict=True):
                sink.abandon([file.name for file in output.files])
            journal.remove()
            if fresh is not None:
                with contextlib.suppress(OSError):
                    os.rmdir(fresh)
            raise
        journal.close()
        raise MergeFailedError(error.problems) from error  # it had begun, and what is done is kept
    except BaseException:  # whatever ends the run, a stop too, the lease is given back
        journal.close()
        raise
    return report


def commit_message(planned: MergePlan) -> str:
    """What a repository's history says of this merge."""
    given = output_options(planned).get("commit_message")
    method = method_label(planned.manifest)
    return str(given) if given else f"Merge of {len(planned.sources)} sources with {method} (raymerge)"


def finished_report(planned: MergePlan, destination: Destination) -> Any:
    """The report of an output that holds this very merge already, else None."""
    from merger.journal import output_state, read_result
    from merger.report import MergeReport

    if output_state(destination.content, destination.state) != "finished":
        return None
    found = read_result(destination.content)
    if found.get("plan_digest") != planned.digest:
        return None
    return MergeReport(
        planned.outputs[0].path, planned.outputs[0].kind, str(found["plan_digest"]), str(found["content_digest"]),
        already_done=True, warnings=planned.warnings, deviations=planned.deviations,
    )  # fmt: skip


def _free(destination: Destination, *, restart: bool) -> int | None:
    """Free bytes, counting what an unfinished run reserved already and what `restart` will remove."""
    store = destination.state
    free = store.free_bytes()
    if free is None:
        return None
    from merger.journal import RESULT_FILE, STATE_FOLDER, output_state, read_result

    names = [name for name in store.list_files() if name.startswith(f"{STATE_FOLDER}/")]
    if restart and output_state(destination.content, store) == "finished":
        names = [RESULT_FILE, *(str(file["name"]) for file in read_result(destination.content)["files"])]
    present = set(store.list_files())
    return free + sum(store.stat(name).size for name in names if name in present)


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
    """The manifest that `raymerge fold` stands for."""
    adapters = _several(adapters)
    document: dict[str, object] = {"merge_method": "task_arithmetic"}
    if base is not None:
        document["base_model"] = str(base)
    given: Sequence[float | None] = weights if weights is not None else [None] * len(adapters)
    document["adapters"] = [
        {"adapter": str(a), **({"parameters": {"weight": w}} if w is not None else {})}
        for a, w in zip(adapters, given, strict=True)
    ]
    output: dict[str, object] = {"kind": "model"}
    if rounding != "once":
        output["rounding"] = rounding
    document["output"] = output
    return document


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
