"""The commands. Their errors end in exits.py; what is printed goes through show.py."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from jobs import evaluate, show
from jobs.exits import CANNOT_START, FAILED, RETRY, exit_code, guarded
from jobs.options import (
    DebugOption,
    DeviceMemoryOption,
    DeviceOption,
    GpusOption,
    JsonOption,
    LogOption,
    MemoryOption,
    OnOption,
    OutOption,
    PluginOption,
    RestartOption,
    RunDirOption,
    SetOption,
    StrictOption,
    TimelineOption,
    WorkersOption,
    load_plugins,
)
from merger.errors import (
    ManifestError,
    MergeFailedError,
    PlanError,
    Problem,
)
from merger.tensors import parse_size

AUTO_HERE_BYTES = 1 << 30
"""Below this much reading and writing, `--on auto` stays in this process: starting a Ray takes longer."""
AUTO_HERE_FLOPS = 2e11
"""The same for dense spectral work: seconds of one core."""

app = typer.Typer(
    name="raymerge", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Merge LoRA adapters and full models, on a laptop or on Ray.",
)  # fmt: skip


# --------------------------------------------------------------------------------- merge and fold


@app.command("merge")
def merge_command(
    sources: Annotated[list[str], typer.Argument(metavar="MANIFEST [OUT] | SOURCE SOURCE…")],
    out: OutOption = None,
    base: Annotated[str | None, typer.Option("--base", help="The model that the sources were trained from.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="A method of `raymerge methods`.")] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="One a source, for example 2,1,1.")] = None,
    density: Annotated[float | None, typer.Option("--density", help="Share of each delta that is kept.")] = None,
    on: OnOption = "auto",
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    gpus_per_worker: GpusOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    restart: RestartOption = False,
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    plugin: PluginOption = None,
    strict: StrictOption = False,
    timeline: TimelineOption = None,
    log_format: LogOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Merge what a manifest says, or the sources given here."""

    def work() -> None:
        load_plugins(plugin)
        manifest: Any
        if _is_manifest(sources):
            given = (("--base", base), ("--method", method), ("--weights", weights), ("--density", density))
            refused = [name for name, value in given if value is not None]
            if refused or len(sources) > 2 or (len(sources) == 2 and out is not None):
                raise ManifestError.of(
                    "bad-arguments", "a manifest takes at most one more argument, OUT" if not refused
                    else f"{', '.join(refused)} cannot change a manifest",
                    where=sources[0], fix="edit the manifest, or use --set KEY=YAML",
                )  # fmt: skip
            manifest = sources[0]
            target = out or (sources[1] if len(sources) == 2 else None)
        else:
            target = out
            manifest = _written(_manifest_of(sources, base, method, weights, density), target, json_)
        _merge(
            manifest, target, on, workers, device, gpus_per_worker, memory, restart, run_dir, set_, strict, json_,
            timeline, device_memory,
        )  # fmt: skip

    guarded(work, json_=json_, debug=debug, log_format=log_format)


@app.command("moe")
def moe_command(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST")],
    target: Annotated[str | None, typer.Argument(metavar="[OUT]")] = None,
    out: OutOption = None,
    on: OnOption = "auto",
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    gpus_per_worker: GpusOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    restart: RestartOption = False,
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    strict: StrictOption = False,
    timeline: TimelineOption = None,
    log_format: LogOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Assemble a mixture of experts from dense models (mergekit-moe's files); `merge` takes them, too."""

    def work() -> None:
        from merger.manifest import load_manifest

        if load_manifest(manifest, overrides=set_ or (), strict=strict).experts is None:
            raise ManifestError.of(
                "missing-key", "it names no experts", where=manifest, why="moe assembles experts",
                fix="add experts: [{source_model: org/name, …}], or use `raymerge merge`",
            )  # fmt: skip
        if target is not None and out is not None:
            raise ManifestError.of("bad-arguments", "OUT is given twice", where=target, fix="give OUT, or -o OUT")
        _merge(
            manifest, out or target, on, workers, device, gpus_per_worker, memory, restart, run_dir, set_, strict,
            json_, timeline, device_memory,
        )  # fmt: skip

    guarded(work, json_=json_, debug=debug, log_format=log_format)


@app.command("fold")
def fold_command(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER…")],
    out: OutOption = None,
    base: Annotated[str | None, typer.Option("--base", help="The model to fold into; default: what they name.")] = None,
    safe: Annotated[
        bool, typer.Option("--peft-safe", help="Round each delta to the base's dtype first, as safe_merge does.")
    ] = False,
    on: OnOption = "auto",
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    gpus_per_worker: GpusOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    restart: RestartOption = False,
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    strict: StrictOption = False,
    timeline: TimelineOption = None,
    log_format: LogOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fold adapters into their base: the model that answers as base and adapters together do."""

    def work() -> None:
        from merger.api import fold_manifest

        document = fold_manifest(adapters, base=base, rounding="peft_safe" if safe else "once")
        _merge(
            _written(document, out, json_),
            out,
            on,
            workers,
            device,
            gpus_per_worker,
            memory,
            restart,
            run_dir,
            set_,
            strict,
            json_,
            timeline,
            device_memory,
        )

    guarded(work, json_=json_, debug=debug, log_format=log_format)


@app.command("extract")
def extract_command(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    base: Annotated[str, typer.Option("--base", help="The model that it was trained from.")],
    out: OutOption = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of every pair; default 16.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Or the share of each matrix's change to keep, for example 0.95.")
    ] = None,
    modules_to_save: Annotated[
        Literal["refuse", "all", "drop"],
        typer.Option("--modules-to-save", help="What becomes of changed norms, embeddings and heads."),
    ] = "refuse",
    on: OnOption = "auto",
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    gpus_per_worker: GpusOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    restart: RestartOption = False,
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    strict: StrictOption = False,
    timeline: TimelineOption = None,
    log_format: LogOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write what a fine-tuned model changed from its base as a LoRA adapter."""

    def work() -> None:
        from merger.api import extract_manifest

        document = extract_manifest(model, base=base, rank=rank, energy=energy, modules_to_save=modules_to_save)
        _merge(
            _written(document, out, json_), out, on, workers, device, gpus_per_worker, memory, restart, run_dir, set_,
            strict, json_, timeline, device_memory,
        )  # fmt: skip

    guarded(work, json_=json_, debug=debug, log_format=log_format)


def _is_manifest(sources: Sequence[str]) -> bool:
    first = Path(sources[0])
    if first.suffix.lower() == ".safetensors":
        return False
    return first.suffix.lower() in (".yaml", ".yml", ".json") or first.is_file()


def _manifest_of(
    sources: Sequence[str], base: str | None, method: str | None, weights: str | None, density: float | None
) -> dict[str, object]:
    """The manifest that `merge SOURCE SOURCE…` stands for: adapters where the folders hold adapters, else models."""
    values: list[float | None] = [None] * len(sources)
    if weights is not None:
        try:
            values = [float(w) for w in weights.split(",")]
        except ValueError:
            raise _bad_weights(weights, "they are not numbers") from None
        if len(values) != len(sources):
            raise _bad_weights(weights, f"there are {len(values)} for {len(sources)} sources")
    from merger.catalog import kind_named

    adapters = [kind_named(s) == "adapter" for s in sources]
    if any(adapters) and not all(adapters):
        raise ManifestError.of(
            "bad-arguments", "some sources are adapters and some are models",
            where=", ".join(s for s, a in zip(sources, adapters, strict=True) if not a),
            fix="write base+adapter for the adapters, or a manifest",
        )  # fmt: skip
    kind = "adapter" if all(adapters) else "model"
    entries = []
    for source, weight in zip(sources, values, strict=True):
        entry: dict[str, object] = {kind: source}
        if weight is not None:
            entry["parameters"] = {"weight": weight}
        elif kind == "model" and method not in ("slerp", "passthrough"):
            entry["parameters"] = {"weight": 1.0}
        entries.append(entry)
    document: dict[str, object] = {"merge_method": method or ("task_arithmetic" if kind == "adapter" else "linear")}
    if base is not None:
        document["base_model"] = base
    document[f"{kind}s"] = entries
    if density is not None:
        document["parameters"] = {"density": density}
    return document


def _bad_weights(weights: str, why: str) -> ManifestError:
    return ManifestError.of("bad-arguments", f"--weights {weights} cannot be used", where="--weights", why=why,
                            fix="give one number a source, separated by commas")  # fmt: skip


def _written(document: dict[str, object], out: str | None, quiet: bool) -> dict[str, object]:
    """Show the manifest that a short form stands for, with its output."""
    import yaml

    if out is not None:
        output = dict(cast("dict[str, object]", document.get("output", {})))
        document = {**document, "output": {**output, "path": out}}
    if not quiet:
        show.note("this command stands for the manifest:\n" + yaml.safe_dump(document, sort_keys=False).rstrip())
    return document


def _merge(
    manifest: Any, out: str | None, on: str, workers: int | None, device: str, gpus_per_worker: float | None,
    memory: str | None, restart: bool, run_dir: str | None, set_: list[str] | None, strict: bool, json_: bool,
    timeline: str | None, device_memory: str | None,
) -> None:  # fmt: skip
    from merger import api
    from merger.run import Stop

    loaded = api.as_manifest(manifest, overrides=set_ or (), strict=strict)
    placed = loaded.cluster  # what the command line leaves open
    workers, run_dir = workers or placed.workers, run_dir or placed.run_dir
    gpus_per_worker = gpus_per_worker or placed.gpus_per_worker or 1.0
    allowed = _memory(memory) or placed.memory
    of_gpu = _memory(device_memory, "--device-memory") or placed.device_memory
    planned = api.plan(loaded, out, device=_device(device, placed.device, on))
    if planned.problems:
        raise PlanError(planned.problems)
    for warning in planned.warnings:
        show.warn(warning)
    stop = Stop()
    where = _where(on, planned, *(made for _, made in planned.before))
    with _watching(timeline) as watch, show.progress(planned, quiet=json_) as listener:
        if where == "here":
            _catch_signals(stop)
            report = api.run_planned(
                planned, workers=workers, memory=allowed, restart=restart, run_dir=run_dir, listener=listener,
                stop=stop, hidden=_hidden_states, watch=watch, device_memory=of_gpu,
            )  # fmt: skip
        elif where == "private":
            report = api.run_planned(
                planned, workers=workers or os.cpu_count(), memory=allowed, restart=restart, run_dir=run_dir,
                runner=functools.partial(
                    _on_private_ray, gpus_per_worker=gpus_per_worker, device_memory=of_gpu
                ), listener=listener,
                stop=stop, hidden=_hidden_states, watch=watch, device_memory=of_gpu,
            )  # fmt: skip
        else:
            from cluster.connect import connection

            with connection(where, workers=workers or 0):
                from cluster import run as cluster_run

                _catch_signals(stop)  # after ray.init, which sets handlers of its own
                report = api.run_planned(
                    planned, workers=workers or cluster_run.default_workers(where),
                    memory=allowed or cluster_run.default_memory(), restart=restart, run_dir=run_dir,
                    runner=functools.partial(
                        cluster_run.run_on_ray, gpus_per_worker=gpus_per_worker, device_memory=of_gpu
                    ),
                    listener=listener, stop=stop, hidden=_hidden_states, watch=watch, device_memory=of_gpu,
                )  # fmt: skip
    show.report(report, json_=json_, warned=planned.warnings)


@contextlib.contextmanager
def _watching(timeline: str | None) -> Iterator[Any]:
    """Who looks on: Python's logging, and a timeline where one is asked for."""
    from merger.clock import now_ns
    from merger.timeline import TimelineFile
    from merger.watch import Watch

    if timeline is None:
        yield Watch()
        return
    with TimelineFile(timeline, now_ns()) as file:
        yield Watch(file)


def _hidden_states(*arguments: Any) -> Any:
    """The forward pass for gates of experts. Transformers is imported only when one is asked for."""
    from merger.evaluation.hidden import hidden_states

    return hidden_states(*arguments)


@app.command("bulk")
def bulk_command(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST")],
    max_failures: Annotated[
        int | None, typer.Option("--max-failures", min=1, help="Begin no more merges after so many have failed.")
    ] = None,
    on: OnOption = "auto",
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    gpus_per_worker: GpusOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    restart: RestartOption = False,
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    plugin: PluginOption = None,
    strict: StrictOption = False,
    timeline: TimelineOption = None,
    log_format: LogOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run the many merges of one manifest on one pool of workers; what is done already is left alone."""

    def work() -> None:
        load_plugins(plugin)
        _bulk(
            manifest, max_failures, on, workers, device, gpus_per_worker, memory, restart, run_dir, set_, strict,
            json_, timeline, device_memory,
        )  # fmt: skip

    guarded(work, json_=json_, debug=debug, log_format=log_format)


def _bulk(
    manifest: str, max_failures: int | None, on: str, workers: int | None, device: str, gpus_per_worker: float | None,
    memory: str | None, restart: bool, run_dir: str | None, set_: list[str] | None, strict: bool, json_: bool,
    timeline: str | None, device_memory: str | None,
) -> None:  # fmt: skip
    from merger.bulk import load_bulk, plan_bulk
    from merger.run import Stop

    loaded = load_bulk(manifest, overrides=set_ or (), strict=strict)
    placed = loaded.manifest.cluster  # what the command line leaves open
    workers, run_dir = workers or placed.workers, run_dir or placed.run_dir
    gpus_per_worker = gpus_per_worker or placed.gpus_per_worker or 1.0
    allowed = _memory(memory) or placed.memory
    of_gpu = _memory(device_memory, "--device-memory") or placed.device_memory
    kind = _device(device, placed.device, on)
    planned = plan_bulk(loaded, device=kind)
    for problem in planned.problems:
        show.warn(show.in_four_parts(problem))
    for warning in dict.fromkeys(warning for plan in planned.plans() for warning in plan.warnings):
        show.warn(warning)
    stop = Stop()
    where = _where(on, *planned.plans())
    with _watching(timeline) as watch, show.bulk_progress(quiet=json_) as listener:
        from merger.bulk_run import run_bulk, run_bulk_here

        run = functools.partial(
            run_bulk, planned, restart=restart, run_dir=run_dir, max_failures=max_failures, listener=listener,
            stop=stop, device=kind, hidden=_hidden_states, watch=watch,
        )  # fmt: skip
        if where == "here":
            _catch_signals(stop)
            here = functools.partial(run_bulk_here, device_memory=of_gpu)
            report = run(workers=workers, memory=allowed, executor=here)
        elif where == "private":
            executor = functools.partial(_bulk_on_private_ray, gpus_per_worker=gpus_per_worker, device_memory=of_gpu)
            report = run(workers=workers or os.cpu_count(), memory=allowed, executor=executor)
        else:
            from cluster.connect import connection

            with connection(where, workers=workers or 0):
                from cluster import run as cluster_run

                _catch_signals(stop)  # after ray.init, which sets handlers of its own
                report = run(
                    workers=workers or cluster_run.default_workers(where),
                    memory=allowed or cluster_run.default_memory(),
                    executor=functools.partial(
                        cluster_run.run_bulk_on_ray, gpus_per_worker=gpus_per_worker, device_memory=of_gpu
                    ),
                )  # fmt: skip
    code = bulk_exit_code(report)
    show.bulk_report(report, json_=json_, code=code)
    if code:
        raise typer.Exit(code)


def _bulk_on_private_ray(bulk: Any, *, workers: int, stop: Any, **options: Any) -> None:
    """An executor that starts a Ray only now, when there is work to do."""
    from cluster.connect import connection

    _catch_signals(stop)
    with connection("private", workers=workers):
        from cluster.run import run_bulk_on_ray

        _catch_signals(stop)  # ray.init sets handlers of its own
        run_bulk_on_ray(bulk, workers=workers, stop=stop, **options)


def bulk_exit_code(report: Any) -> int:
    """1 where any merge failed; but 2 where none could start, and 75 where nothing but the infrastructure failed."""
    if report.stopped is not None:
        return exit_code(report.stopped)
    codes = {exit_code(merge.error) for merge in report.failures}
    if not codes:
        return max((exit_code(merge.error) for merge in report.merges if merge.state == "stopped"), default=0)
    if codes == {RETRY}:
        return RETRY
    begun = any(merge.state not in ("refused", "not run") for merge in report.merges)
    return FAILED if begun else CANNOT_START


def _on_private_ray(plan: Any, progression: Any, *arguments: Any, workers: int, stop: Any, **options: Any) -> None:
    """A runner that starts a Ray only now: the output is ours, and there is work to do."""
    if progression.finished:
        return
    from cluster.connect import connection

    _catch_signals(stop)
    with connection("private", workers=workers):
        from cluster.run import run_on_ray

        _catch_signals(stop)  # ray.init sets handlers of its own
        run_on_ray(plan, progression, *arguments, workers=workers, stop=stop, **options)


def _memory(memory: str | None, option: str = "--memory") -> int | None:
    if memory is None:
        return None
    try:
        return parse_size(memory)
    except ValueError as error:
        raise ManifestError.of("bad-arguments", str(error), where=option, fix="write it as 4GB or 512MiB") from None


def _device(device: str, placed: str | None = None, on: str = "here") -> Literal["cpu", "cuda"]:
    """`placed` is what the manifest says, `on` where the work is done: a cluster's driver needs no GPU of its own."""
    if device not in ("auto", "cpu", "cuda"):
        raise ManifestError.of("bad-arguments", f"--device {device} is not auto, cpu or cuda", where="--device")
    if (placed or "cpu" if device == "auto" else device) == "cpu":
        return "cpu"
    attached = on == "auto" and (os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
    if attached or on not in ("auto", "here", "ray"):
        return "cuda"
    import torch

    if not torch.cuda.is_available():
        raise PlanError.of(
            "no-gpu", "there is no CUDA device on this machine", where="--device", fix="use --device cpu"
        )
    return "cuda"


def _where(on: str, *plans: Any) -> str:
    """`here`, `private`, or an address."""
    from merger.planning.build import write_bytes
    from merger.planning.summary import passes, read_bytes, spectral_flops

    if on == "here":
        return "here"
    if on == "ray":
        return "private"
    if on == "auto" and (os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")):
        on = os.environ.get("RAY_ADDRESS") or "attach"
    if on.startswith("ray://"):
        raise ManifestError.of(
            "ray-client", "ray:// addresses (Ray Client) are not supported", where="--on",
            why="the driver has to run inside the cluster", fix="submit the merge as a Ray job, or use HOST:PORT",
        )  # fmt: skip
    if on != "auto":
        return "auto" if on == "attach" else on  # Ray's own word for the cluster of the job we are in
    moved = sum(read_bytes(plan) * passes(plan) + write_bytes(plan) for plan in plans)
    spectral = sum(spectral_flops(plan) for plan in plans)
    return "private" if moved >= AUTO_HERE_BYTES or spectral >= AUTO_HERE_FLOPS else "here"


def _catch_signals(stop: Any) -> None:
    def caught(number: int, frame: object) -> None:
        del frame
        if stop.requested:
            os._exit(128 + number)  # asked twice: leave at once; the journal is resumable at any moment
        show.note("stopping after the units under way; what is done is kept (again to leave at once)")
        stop.set(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, caught)


# --------------------------------------------------------------------------------- looking


@app.command("plan")
def plan_command(
    manifests: Annotated[list[str], typer.Argument(metavar="MANIFEST…")],
    out: OutOption = None,
    device: DeviceOption = "auto",
    memory: MemoryOption = None,
    workers: WorkersOption = None,
    set_: SetOption = None,
    plugin: PluginOption = None,
    strict: StrictOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what would be read, computed, written and held in memory, and all that is wrong, from headers alone."""

    def work() -> None:
        load_plugins(plugin)
        from merger import api
        from merger.bulk import bulk_plan_json, bulk_plan_lines, is_bulk_manifest, load_bulk, plan_bulk
        from merger.destination import open_destination
        from merger.errors import SourceError
        from merger.planning.build import check_machine
        from merger.planning.summary import plan_json, plan_lines

        allowed = _memory(memory)
        problems: list[Problem] = []
        documents = []
        for manifest in manifests:
            if is_bulk_manifest(manifest):
                many = load_bulk(manifest, overrides=set_ or (), strict=strict)
                bulk = plan_bulk(many, device=_device(device, many.manifest.cluster.device, "elsewhere"))
                documents.append(bulk_plan_json(bulk))
                problems += bulk.problems
                if not json_:
                    show.lines(bulk_plan_lines(bulk))
                    show.problems(bulk.problems)
                continue
            loaded = api.as_manifest(manifest, overrides=set_ or (), strict=strict)
            planned = api.plan(loaded, out, device=_device(device, loaded.cluster.device, "elsewhere"))
            found = list(planned.problems)
            if not found:
                given = allowed or loaded.cluster.memory or api.default_memory()
                share = given // (workers or loaded.cluster.workers or api.default_workers(planned, given))
                path = planned.outputs[0].path
                free = None
                if path:
                    try:
                        free = open_destination(path).state.free_bytes()
                    except SourceError as error:
                        found += error.problems
                found += check_machine(planned, memory=share, free_bytes=free)
                for _, made in planned.before:
                    found += check_machine(made, memory=share, free_bytes=None)
            documents.append({**plan_json(planned), "problems": [p.as_json() for p in found]})
            problems += found
            if not json_:
                show.lines(plan_lines(planned))
                show.problems(found)
        if json_:
            show.document(documents[0] if len(documents) == 1 else documents)
        if problems:
            raise typer.Exit(CANNOT_START)

    guarded(work, json_=json_, debug=debug)


@app.command("inspect")
def inspect_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE")],
    for_: Annotated[
        str | None, typer.Option("--for", help="vllm: what that engine would refuse, ignore or change.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="With --for: the model that the adapter is to be served on.")
    ] = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what an adapter or a model holds, from its configs and headers."""

    def work() -> None:
        from merger.catalog import describe, inspect_source
        from merger.serving import for_vllm

        if for_ not in (None, "vllm"):
            raise ManifestError.of("bad-arguments", f"--for {for_} is not known", where="--for", fix="use --for vllm")
        if base is not None and for_ is None:
            raise ManifestError.of("bad-arguments", "--base says nothing without --for", where="--base",
                                   fix="add --for vllm, or leave it out")  # fmt: skip
        catalog = inspect_source(source)
        held_against = None if base is None else inspect_source(base)
        if held_against is not None and held_against.kind != "model":
            raise ManifestError.of("bad-arguments", f"--base {base} is no model", where="--base",
                                   why="adapters are served on a model", fix="name the model")  # fmt: skip
        document = describe(catalog)
        if for_ == "vllm":
            document["vllm"] = for_vllm(catalog, held_against).as_json()
        if json_:
            show.document(document)
        else:
            show.description(document)

    guarded(work, json_=json_, debug=debug)


@app.command("verify")
def verify_command(
    output: Annotated[str, typer.Argument(metavar="OUTPUT")],
    replay: Annotated[str | None, typer.Option("--replay", metavar="N|all", help="Merge so many units again.")] = None,
    plugin: PluginOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Digest every byte of an output again, and merge some of it again."""

    def work() -> None:
        load_plugins(plugin)
        from merger.verify import verify_output

        count: int | None = 0
        if replay is not None:
            if replay != "all" and not replay.isdigit():
                raise ManifestError.of("bad-arguments", f"--replay {replay} is no number", where="--replay")
            count = None if replay == "all" else int(replay)
        found = verify_output(output, replay=count, hidden=_hidden_states)
        show.either(found, json_=json_)

    guarded(work, json_=json_, debug=debug)


@app.command("methods")
def methods_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    plugin: PluginOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Try the method on random and on hostile inputs, as its author should.")
    ] = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the merge methods, or say all about one."""

    def work() -> None:
        from merger.errors import nearest
        from merger.methods import METHODS

        load_plugins(plugin)
        if check:
            _check_method(name)
        if name is None:
            show.methods(list(METHODS.values()), json_=json_)
            return
        if name not in METHODS:
            near = nearest(name, METHODS)
            raise ManifestError.of(
                "unknown-method", f"there is no method {name}", where="methods",
                fix=f"did you mean {near}?" if near else f"one of {', '.join(METHODS)}",
            )  # fmt: skip
        show.method(METHODS[name], json_=json_)

    guarded(work, json_=json_, debug=debug)


def _check_method(name: str | None) -> None:
    """Raises MergeFailedError(code `check-failed`) with what does not hold."""
    from merger.methods.plugin import check_method, spec_of

    try:
        check_method(spec_of(name))
        show.note(f"{name}: every property holds")
    except ValueError as error:
        raise ManifestError.of(
            "bad-arguments", str(error), where="--check", why="it tries a method's own block",
            fix="name a method that has one",
        ) from None  # fmt: skip
    except AssertionError as error:
        first, *rest = str(error).splitlines()
        raise MergeFailedError(
            [Problem("check-failed", first, f"method {name}"), *(Problem("check-failed", line) for line in rest)]
        ) from None


@app.command("report")
def report_command(
    output: Annotated[str, typer.Argument(metavar="OUTPUT")], json_: JsonOption = False, debug: DebugOption = False
) -> None:
    """Show what a finished merge says about itself."""

    def work() -> None:
        from merger.verify import read_report

        document = read_report(output)
        if json_:
            show.document(document)
        else:
            show.stored_report(document)

    guarded(work, json_=json_, debug=debug)


# --------------------------------------------------------------------------------- rendering

render_app = typer.Typer(no_args_is_help=True, help="Write files for Kubernetes, cron and systemd from a manifest.")
app.add_typer(render_app, name="render")

ValuesOption = Annotated[
    str | None, typer.Option("--values", metavar="FILE", help="A file whose cluster: and kubernetes: go over these.")
]
FolderOption = Annotated[
    str | None, typer.Option("-o", "--out", metavar="DIR", help="Folder for the files; default: standard output.")
]
PlanFileOption = Annotated[
    str | None,
    typer.Option("--plan", metavar="FILE", help="`raymerge plan --json`, where the sources are not seen from here."),
]
CheckOption = Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 where DIR is not what would be.")]


@render_app.command("kuberay")
def render_kuberay_command(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST")],
    as_: Annotated[str, typer.Option("--as", help="rayjob, raycluster, cronjob or raycronjob.")] = "rayjob",
    values: ValuesOption = None,
    out: FolderOption = None,
    plan: PlanFileOption = None,
    check: CheckOption = False,
    set_: SetOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a kustomize base for KubeRay: a RayJob, a RayCluster that jobs share, or a schedule and its cluster."""
    guarded(
        lambda: _render(manifest, as_, ("rayjob", "raycluster", "cronjob", "raycronjob"), values, out, plan, None,
                        check, set_, json_),
        json_=json_, debug=debug,
    )  # fmt: skip


@render_app.command("cron")
def render_cron_command(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST")],
    as_: Annotated[str, typer.Option("--as", help="cronjob, raycronjob, crontab or systemd.")] = "cronjob",
    address: Annotated[
        str | None, typer.Option("--address", metavar="URL", help="Submit to this cluster, rather than to one's own.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow plain http to other hosts, and clusters that ask for no token.")
    ] = False,
    values: ValuesOption = None,
    out: FolderOption = None,
    plan: PlanFileOption = None,
    check: CheckOption = False,
    set_: SetOption = None,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the schedule of a bulk: a CronJob, a RayCronJob, a crontab or a systemd timer."""
    guarded(
        lambda: _render(manifest, as_, ("cronjob", "raycronjob", "crontab", "systemd"), values, out, plan, address,
                        check, set_, json_, insecure=insecure),
        json_=json_, debug=debug,
    )  # fmt: skip


def _render(
    manifest: str, form: str, forms: tuple[str, ...], values: str | None, out: str | None, plan: str | None,
    address: str | None, check: bool, set_: list[str] | None, json_: bool, *, insecure: bool = False,
) -> None:  # fmt: skip
    import shlex

    from jobs import render
    from merger.methods.plugin import load_installed

    load_installed()
    if form not in forms or (check and out is None):
        raise ManifestError.of(
            "bad-arguments", "--check needs -o DIR" if form in forms else f"--as {form} is not known here",
            where="--check" if form in forms else "--as", fix=f"--as is one of {', '.join(forms)}",
        )  # fmt: skip
    words = ["cron" if "crontab" in forms else "kuberay", manifest, "--as", form]
    for option, given in (("--values", [values]), ("--plan", [plan]), ("--address", [address]), ("--set", set_ or ())):
        words += [word for value in given if value is not None for word in (option, value)]
    request = render.Request(
        manifest=manifest, values=values, overrides=set_ or (), plan=plan, address=address, insecure=insecure,
        command=shlex.join([*words, "--insecure"] if insecure else words),
    )  # fmt: skip
    if form in ("crontab", "systemd"):
        files = render.render_timer(request, cast("render.TimerForm", form))
    else:
        files = render.render_site(request, cast("Any", form))
    if check and out is not None:
        render.compare_files(files, out)
    elif out is not None:
        render.write_files(files, out)
    if json_:
        show.document({"files": files})
    elif out is None:
        show.rendered(files)
    else:
        show.note(f"{out} is as rendered: {', '.join(files)}" if check else f"wrote {', '.join(files)} to {out}")


# --------------------------------------------------------------------------------- jobs of a cluster

AddressOption = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="The job server, for example http://HOST:8265.")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Allow plain http to other hosts, and clusters that ask for no token.")
]


@app.command("submit")
def submit_command(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST")],
    out: OutOption = None,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its log and end as it ends.")] = False,
    ship_code: Annotated[
        bool, typer.Option("--ship-code", help="Send raymerge along; default: it is in the cluster's image.")
    ] = False,
    unplanned: Annotated[
        bool, typer.Option("--unplanned", help="Do not look at the sources from here: only the cluster sees them.")
    ] = False,
    insecure: InsecureOption = False,
    max_failures: Annotated[int | None, typer.Option("--max-failures", min=1, help="Of a bulk.")] = None,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    gpus_per_worker: GpusOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    run_dir: RunDirOption = None,
    set_: SetOption = None,
    plugin: PluginOption = None,
    strict: StrictOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a manifest as a job of a Ray cluster; the same work again meets the job that does it."""

    def work() -> None:
        from jobs import remote

        _memory(memory)
        load_plugins(plugin)
        options = remote.forwarded(
            workers=workers, device=device, gpus_per_worker=gpus_per_worker, memory=memory,
            device_memory=device_memory, run_dir=run_dir, max_failures=max_failures, strict=strict,
        )  # fmt: skip
        code = remote.submit(
            manifest, out, address, options, plugin or (), set_ or (), follow=follow, ship_code=ship_code,
            unplanned=unplanned, insecure=insecure, strict=strict, json_=json_,
        )  # fmt: skip
        if code:
            raise typer.Exit(code)

    guarded(work, json_=json_, debug=debug)


@app.command("status")
def status_command(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    address: AddressOption = None,
    run_dir: RunDirOption = None,
    insecure: InsecureOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say how far a run is: a submission id, or the output of a merge. The output's own files suffice."""
    from jobs import remote

    guarded(
        lambda: remote.status(run, address, run_dir, insecure=insecure, json_=json_), json_=json_, debug=debug
    )  # fmt: skip


@app.command("logs")
def logs_command(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    address: AddressOption = None,
    run_dir: RunDirOption = None,
    events: Annotated[
        bool, typer.Option("--events", help="What happened to workers and units, as its output keeps it.")
    ] = False,
    insecure: InsecureOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a run has to say: a submission id, or the output of a merge."""
    from jobs import remote

    def work() -> None:
        if json_ and not events:
            raise ManifestError.of(
                "bad-arguments", "a log is lines", where="--json", why="only events are data", fix="add --events"
            )
        if events:
            remote.events(run, address, run_dir, json_=json_)
        else:
            remote.logs(run, address, run_dir, insecure=insecure)

    guarded(work, json_=json_, debug=debug)


@app.command("stop")
def stop_command(
    run: Annotated[str, typer.Argument(metavar="RUN")],
    address: AddressOption = None,
    run_dir: RunDirOption = None,
    insecure: InsecureOption = False,
    json_: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a run to stop: a submission id, or the output of a merge. What is done is kept."""
    from jobs import remote

    guarded(lambda: remote.stop(run, address, run_dir, insecure=insecure, json_=json_), json_=json_, debug=debug)


# --------------------------------------------------------------------------------- compare and tune

app.command("compare")(evaluate.compare_command)
app.command("tune")(evaluate.tune_command)


def run(argv: Sequence[str] | None) -> int:
    """Run a command. Returns the exit code."""
    try:
        result = app(args=None if argv is None else list(argv), standalone_mode=False)
    except typer.Exit as error:
        return int(error.exit_code)
    except typer.Abort:
        return 130
    except typer.TyperException as error:  # what typer itself refuses: unknown options, missing arguments
        arguments = sys.argv[1:] if argv is None else argv
        command = " ".join(["raymerge", *(a for a in arguments[:1] if not a.startswith("-"))])
        problem = Problem(
            "bad-arguments", error.format_message() or "no command is named", command,
            "the command does not take these arguments", f"see `{command} --help`",
        )  # fmt: skip
        if "--json" in arguments:
            show.document({"exit_code": CANNOT_START, "problems": [problem.as_json()]})
        show.problems([problem])
        return CANNOT_START
    return int(result) if isinstance(result, int) else 0
