"""What people see: progress, warnings and results on standard error, documents on standard output."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol

from jobs.logs import structured
from merger.errors import Problem, escape
from merger.methods.declare import REQUIRED, MethodSpec
from merger.tensors import format_size

if TYPE_CHECKING:
    from merger.bulk_report import BulkListener, BulkProgress, BulkReport
    from merger.planning.nouns import MergePlan
    from merger.report import MergeReport
    from merger.run import Progress, ProgressListener

LINE_SECONDS = 5.0
"""Between two lines of progress where there is no terminal."""


_log = logging.getLogger("raymerge.command")


def note(text: str, **facts: Any) -> None:
    """A line for people, on standard error; where that holds a structured log, a record of it with its facts."""
    if structured():
        _log.info("%s", text, extra={"raymerge": facts})
    else:
        print(text, file=sys.stderr, flush=True)


def warn(problem: Problem) -> None:
    if structured():
        _log.warning("%s", problem.what, extra={"raymerge": _facts(problem)})
    else:
        note(f"warning {problem}")


def problems(found: Sequence[Problem], *, notes: Iterable[str] = ()) -> None:
    if structured():
        for problem in found:
            _log.error("%s", problem.what, extra={"raymerge": {**_facts(problem), "notes": "; ".join(notes) or None}})
        return
    for problem in found:
        note(f"error {problem}")
    for line in notes:
        note(f"  ({escape(line)})")


def _facts(problem: Problem) -> dict[str, str]:
    return {key: value for key, value in problem.as_json().items() if key != "what"}


_WHY: Mapping[str, str] = {
    "bad-arguments": "the command does not take these arguments",
    "bad-value": "a value that cannot be meant is never replaced by a default",
    "bad-yaml": "nothing can be read from it",
    "disk": "the whole output is reserved before the merge starts",
    "missing-key": "nothing is assumed that decides the result",
    "no-merge": "only a finished merge can be looked at",
    "no-output": "nothing is written to a place that nobody chose",
    "no-such-source": "the folder is missing or empty",
    "not-yet": "this version does not do it, and nothing is left out in silence",
    "output-exists": "nothing that is there is ever overwritten",
    "internal": "this is a fault of raymerge",
    "number-of-sources": "the method is defined for that many",
    "out-of-memory": "the machine had less than the plan reckoned with",
    "stopped": "a signal asked for it",
    "unreadable": "the system refused to read it",
    "path-escapes": "names inside a source are relative and never climb",
    "truncated": "the file was cut off",
    "unknown-dtype": "its bytes cannot be read without knowing what they are",
    "unknown-key": "a key that nothing reads would change nothing, in silence",
    "unknown-method": "it is not in the table of methods",
    "unknown-parameter": "a parameter that nothing reads would change nothing, in silence",
}
_DAMAGED = "the file is damaged, or is not what its name says"
_REFUSED = "what may be wrong is refused, never repaired in silence"


def in_four_parts(problem: Problem) -> Problem:
    """The problem with what its code alone says where it leaves out a part."""
    file = problem.where.endswith((".safetensors", ".bin", ".json"))
    return replace(
        problem,
        where=problem.where or "the command line",
        why=problem.why or _WHY.get(problem.code) or (_DAMAGED if file else _REFUSED),
        fix=problem.fix or ("fetch the file again" if file else "see `raymerge COMMAND --help` and the README"),
    )


def lines(text: Iterable[str]) -> None:
    for line in text:
        print("\n".join(map(escape, line.split("\n"))))


def passed_on(text: str) -> None:
    """What another process prints, while it does; on standard error, where logs go."""
    if structured():
        for line in text.splitlines():
            note(line)
        return
    print("\n".join(map(escape, text.split("\n"))), end="", file=sys.stderr, flush=True)


def printed(text: str) -> None:
    """What another process printed: the result of a command that asks for it."""
    print("\n".join(map(escape, text.split("\n"))), end="")


class Shown(Protocol):
    """What is for people and for scripts alike."""

    def lines(self) -> Iterable[str]: ...

    def as_json(self) -> Any: ...


def either(found: Shown, *, json_: bool) -> None:
    """One document, or lines for people."""
    if json_:
        document(found.as_json())
    else:
        lines(found.lines())


def document(data: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(data, indent=1))


def rendered(files: Mapping[str, str]) -> None:
    """Rendered files as one stream; a kustomization is no object of a cluster."""
    parts = [text for name, text in files.items() if name != "kustomization.yaml"]
    separator = "---\n" if any(name.endswith(".yaml") for name in files) else "\n"
    print(separator.join(parts), end="")


def report(made: MergeReport, *, json_: bool, warned: Sequence[Problem]) -> None:
    """The end of a merge."""
    from merger.report import summary_lines

    for problem in made.warnings:
        if problem not in warned:
            warn(problem)
    if json_:
        document(made.as_json())
    else:
        lines(summary_lines(made))


@contextlib.contextmanager
def progress(plan: MergePlan, *, quiet: bool) -> Iterator[ProgressListener | None]:
    """A bar on a terminal, plain lines elsewhere, both on standard error."""
    del plan
    if structured() or not sys.stderr.isatty():
        yield None if quiet and not structured() else _plain_listener()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("merging", total=None, rate="")

        def listen(at: Progress) -> None:
            rate = f"{format_size(int(at.bytes_written / max(at.seconds, 1e-3)))}/s"
            bar.update(
                task, completed=at.units_done, total=at.units, rate=rate, description=f"stage {at.stage}/{at.stages}"
            )

        yield listen


def _plain_listener() -> ProgressListener:
    last = time.monotonic()

    def listen(at: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            note(
                f"stage {at.stage}/{at.stages}: {at.units_done}/{at.units} units, read {format_size(at.bytes_read)}, "
                f"wrote {format_size(at.bytes_written)}, {at.seconds:.0f} s",
                **asdict(at),
            )

    return listen


@contextlib.contextmanager
def bulk_progress(*, quiet: bool) -> Iterator[BulkListener | None]:
    """How far a bulk is: a line now and then, on standard error; on a terminal, in place."""
    in_place = sys.stderr.isatty() and not structured()
    if quiet and not in_place and not structured():
        yield None
        return
    last = time.monotonic()

    def listen(at: BulkProgress) -> None:
        nonlocal last
        if time.monotonic() - last < (0.5 if in_place else LINE_SECONDS):
            return
        last = time.monotonic()
        text = (
            f"{at.merges_ended}/{at.merges} merges, {at.failures} failed, {at.under_way} under way, "
            f"read {format_size(at.bytes_read)}, wrote {format_size(at.bytes_written)}, {at.seconds:.0f} s"
        )
        if in_place:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        else:
            note(text, **asdict(at))

    yield listen
    if in_place:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def bulk_report(made: BulkReport, *, json_: bool, code: int) -> None:
    """The end of a bulk: one table, or one document; what failed stands on standard error."""
    for merge in made.merges:
        if merge.state == "failed":
            problems([in_four_parts(replace(p, where=f"{merge.label}: {p.where}")) for p in merge.problems])
    if json_:
        document({"exit_code": code, **made.as_json()})
    else:
        lines(made.lines())


def description(data: Mapping[str, Any]) -> None:
    """What `inspect` found."""
    lines(_description(data))


def _description(data: Mapping[str, Any]) -> Iterator[str]:
    yield f"{data['kind']}  {data['reference']}"
    for key in (
        "base",
        "licence",
        "tied",
        "dtypes",
        "tensors",
        "parameters",
        "bytes",
        "modules",
        "spelling",
        "kinds",
        "ranks",
        "scalings",
    ):
        if data.get(key) not in (None, "", {}, []):
            yield f"  {key:<10} {data[key]}"
    if data.get("quantization"):
        found = data["quantization"]
        yield f"  quantised  {found['kind']} ({found['method']}), {found['tensors']} tensors"
    for problem in data.get("problems", ()):
        yield f"  refused    {problem['what']}" + (f" ({problem['why']})" if problem["why"] else "")
    if "vllm" in data:
        yield from _serving(data["vllm"])


def _serving(data: Mapping[str, Any]) -> Iterator[str]:
    yield f"  vLLM {data['version']}: " + _VERDICTS[data["verdict"]]
    if data["verdict"] != "model":
        yield "    --max-lora-rank " + str(data["max_lora_rank"] or "none is large enough")
        yield f"    held against {data['base'] or 'no base: name it with --base to have names and sizes compared'}"
    for found in data["findings"]:
        yield f"    {found['effect']:<8} {found['what']}" + (f": {found['why']}" if found["why"] else "")
        named = ", ".join(found["names"][:3]) + (f" and {len(found['names']) - 3} more" if found["names"][3:] else "")
        if named:
            yield f"             {named}"
        if found["fix"]:
            yield f"             {found['fix']}" + (f": {shlex.join(found['command'])}" if found["command"] else "")


_VERDICTS: Mapping[str, str] = {
    "served": "served",
    "served after a change": "served after a change",
    "refused": "not served as an adapter",
    "model": "a full model, which no rule of adapters is about",
}


def methods(specs: Sequence[MethodSpec], *, json_: bool) -> None:
    """The table of methods."""
    if json_:
        document([{"name": s.name, "summary": s.summary, "spaces": list(s.spaces), "paper": s.paper} for s in specs])
        return
    for spec in specs:
        print(f"{spec.name:<16} {spec.summary}")


def method(spec: MethodSpec, *, json_: bool) -> None:
    """All about one method."""
    from merger.methods.facts import cost_text, num_rounds, rounds_text
    from merger.methods.plugin import plugins_of
    from merger.methods.wrappers import wrappers_for

    parameters: list[dict[str, Any]] = [
        {
            "name": p.name, "scope": p.scope, "kind": p.kind,
            "bounds": p.bounds() if p.kind in ("float", "int") else "",
            "choices": list(p.choices), "default": None if p.default is REQUIRED else p.default,
            "adapter_default": p.adapter_default, "doc": p.doc,
        }
        for p in (*spec.parameters, *wrappers_for(spec))
    ]  # fmt: skip
    if json_:
        document(
            {"name": spec.name, "summary": spec.summary, "spaces": list(spec.spaces), "rounds": list(num_rounds(spec)),
             "cost": cost_text(spec), "statistics": spec.statistics, "base": spec.base, "sources": spec.max_sources,
             "paper": spec.paper, "bibtex": spec.bibtex, "parameters": parameters,
             "plugins": [plugin.as_json() for plugin in plugins_of([spec.name])]}
        )  # fmt: skip
        return
    print(f"{spec.name}: {spec.summary}")
    facts = {
        "spaces": ", ".join(spec.spaces), "rounds": f"{rounds_text(spec)} of statistics", "cost": cost_text(spec),
        "needs": _STATISTICS[spec.statistics], "base": _BASES[spec.base],
        "sources": "" if spec.max_sources is None else str(spec.max_sources),
        "paper": spec.paper,
        "plugin": "".join(f"{p.name}, SHA-256 {p.sha256}" for p in plugins_of([spec.name])),
    }  # fmt: skip
    lines(f"  {key:<8} {value}" for key, value in facts.items() if value)
    print()
    for p in parameters:
        default = "required" if p["default"] is None and p["adapter_default"] is None else f"default {p['default']}"
        if p["adapter_default"] is not None:
            default = (
                f"{default}; {p['adapter_default']} for adapters"
                if p["default"]
                else "required for models, 1 for adapters"
            )
        allowed = ", ".join(p["choices"]) if p["choices"] else p["bounds"] or "true or false"
        text = default.replace("True", "true").replace("False", "false")
        print(f"  {p['name']:<10} one a {_SCOPES[p['scope']]}; {text}; {allowed}\n             {p['doc']}")
    if spec.bibtex:
        print(f"\n{spec.bibtex}")


def stored_report(data: Mapping[str, Any]) -> None:
    """What a finished output says about itself."""
    lines(_stored_report(data))


def _stored_report(data: Mapping[str, Any]) -> Iterator[str]:
    yield f"{data['kind']}  plan {data['plan_digest'][:12]}  content {data['content_digest'][:12]}"
    yield f"  raymerge {data['raymerge']}, {data['versions']}"
    for source in data["sources"]:
        yield f"  source  {source['kind']:<8} {source['reference']}"
    run = data.get("report", {})
    if run:
        yield (
            f"  read {format_size(run['bytes_read'])}, wrote {format_size(run['bytes_written'])}, "
            f"{run['units']} units in {run['seconds']:.1f} s"
        )
        if run.get("events"):
            yield f"  events  {', '.join(f'{kind} {count}' for kind, count in run['events'].items())}"
    for line in data["deviations"]:
        yield f"  differs {line}"


_SCOPES: Mapping[str, str] = {"source": "source", "global": "merge"}
_STATISTICS = {
    "none": "",
    "diagonal": "statistics of each source: a tensor of the shape of each of its tensors",
    "gram": "statistics of each source: a matrix (inputs, inputs) for each of its linear layers",
}
_BASES: Mapping[str, str] = {"required": "needed", "optional": "may be given", "member": "one of the sources"}


def methods_markdown(specs: Iterable[MethodSpec]) -> str:
    """The README's table of methods."""
    from merger.methods.facts import cost_text, rounds_text

    rows = ["| method | what it does | space | rounds | cost | parameters (default) | paper |", "|---" * 7 + "|"]
    for spec in specs:
        parameters = []
        for p in spec.parameters:
            if p.name == "int8_mask":
                continue
            default = "required" if p.default is REQUIRED else str(p.default).lower()
            if p.adapter_default is not None and p.default is REQUIRED:
                default = f"required; {p.adapter_default:g} for adapters"
            parameters.append(f"{p.name} ({default})")
        rows.append(
            f"| `{spec.name}` | {spec.summary} | {', '.join(spec.spaces)} | {rounds_text(spec)} | {cost_text(spec)} | "
            f"{', '.join(parameters)} | {spec.paper} |"
        )
    return "\n".join(rows)
