"""What `submit`, `status`, `logs` and `stop` do: a run named by its submission id, or by its output."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from cluster.jobs_api import JobServer
from cluster.submit import JobSpec, Submission, digest_of, recall
from cluster.submit import follow as follow_job
from cluster.submit import submit as submit_job
from jobs import show
from merger.bulk import BulkPlan, is_bulk_manifest, load_bulk, plan_bulk
from merger.errors import InfrastructureError, ManifestError, PlanError, RaymergeError, SourceError
from merger.manifest import parse_reference
from merger.planning.nouns import MergePlan
from merger.run_files import ask_to_stop, read_events, read_log, read_status
from merger.tensors import format_size

_ID: Final = re.compile(r"raymerge-[0-9a-f]{12}-a\d+")


def forwarded(**options: Any) -> list[str]:
    """Options of this command as options of the job's, where they say something."""
    found: list[str] = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(option)
        elif value not in (None, False) and (name, value) != ("device", "auto"):
            found += [option, f"{value}"]
    return found


# ---- submit ---------------------------------------------------------------------------------------------------------


def submit(
    manifest: str, out: str | None, address: str | None, options: Sequence[str], plugins: Sequence[str],
    overrides: Sequence[str], *, follow: bool, ship_code: bool, unplanned: bool, insecure: bool, strict: bool,
    json_: bool,
) -> int:  # fmt: skip
    """Submit a manifest, unless all of it is done. Returns the exit code."""
    server = JobServer(address, insecure=insecure)
    bulk = is_bulk_manifest(manifest)
    if bulk and out is not None:
        raise ManifestError.of(
            "bad-arguments", "a bulk takes no OUT", where=out, why="its merges have outputs of their own",
            fix="write defaults: {output: {path: …/{name}}}",
        )  # fmt: skip
    document, plans = _bulk_work(manifest, overrides, strict) if bulk else _merge_work(manifest, out, overrides, strict)
    outputs = _outputs(document)
    if unplanned:
        digest, conclusive = digest_of([document, list(options)]), False
    else:
        found = plans()
        if found and _all_done(found):
            _say_submitted(None, "done", outputs, json_=json_)
            return 0
        digest = digest_of([[plan.digest, plan.outputs[0].path] for plan in found])
        conclusive = any(parse_reference(path, bare="local").kind == "local" for path in outputs)
    spec = JobSpec(
        digest=digest, manifest=document, options=options, outputs=outputs, plugins=plugins, conclusive=conclusive,
        code="working_dir" if ship_code else "image",
    )  # fmt: skip
    name, what = submit_job(server, spec)
    if not follow:
        _say_submitted(name, what, outputs, json_=json_)
        return 0
    show.note(f"{name}  {what}")
    job, code = follow_job(server, name, show.passed_on)
    show.note(f"{name} {job.state.lower()}" + (f": {job.message}" if job.message and code else ""))
    if json_:
        show.document({"submission_id": name, "state": job.state, "exit_code": code, "outputs": outputs})
    return code


def _merge_work(
    manifest: str, out: str | None, overrides: Sequence[str], strict: bool
) -> tuple[dict[str, Any], Callable[[], list[MergePlan]]]:
    """A single merge with every place in it written out, and what plans it."""
    from merger import api

    loaded = api.as_manifest(manifest, overrides=overrides, strict=strict)
    path = str(api.output_reference(loaded, out))
    document = loaded.resolved()
    document["output"] = {**document.get("output", {}), "path": path}

    def plans() -> list[MergePlan]:
        planned = api.plan(loaded, path)
        if planned.problems:
            raise PlanError(planned.problems)
        return [planned]

    return document, plans


def _bulk_work(
    manifest: str, overrides: Sequence[str], strict: bool
) -> tuple[dict[str, Any], Callable[[], list[MergePlan]]]:
    """A bulk written out as its merges, and what plans them."""
    bulk = load_bulk(manifest, overrides=overrides, strict=strict)
    document: dict[str, Any] = {
        "merges": [{"name": m.label, "share": m.share, **m.manifest.resolved()} for m in bulk.merges],
        "on_failure": bulk.manifest.on_failure,
        "cluster": bulk.manifest.cluster.model_dump(mode="json"),
    }
    if bulk.manifest.max_active_merges is not None:
        document["max_active_merges"] = bulk.manifest.max_active_merges

    def plans() -> list[MergePlan]:
        planned: BulkPlan = plan_bulk(bulk)
        if planned.problems and (bulk.manifest.on_failure == "stop" or not planned.sweeps):
            raise PlanError(planned.problems)
        for problem in planned.problems:
            show.warn(show.in_four_parts(problem))
        return list(planned.plans())

    return document, plans


def _outputs(document: dict[str, Any]) -> list[str]:
    return [str(merge["output"]["path"]) for merge in document.get("merges", [document])]


def _all_done(plans: Sequence[MergePlan]) -> bool:
    """Whether every output, as far as it can be seen from here, holds this very merge."""
    from merger.session import Session

    try:
        sessions = [Session.open(plan) for plan in plans]
    except (RaymergeError, OSError):
        return False
    if any(session.done is None for session in sessions):
        return False
    for session in sessions:
        session.conclude_done()
    return True


def _say_submitted(name: str | None, what: str, outputs: Sequence[str], *, json_: bool) -> None:
    if json_:
        show.document({"submission_id": name, "state": what, "outputs": list(outputs)})
    elif name is None:
        show.lines([f"already done: {', '.join(outputs[:3])}" + (", …" if len(outputs) > 3 else "")])
    else:
        show.lines([f"{name}  {what}"])


# ---- status, logs, stop ---------------------------------------------------------------------------------------------


def _submission(run: str, address: str | None) -> Submission | None:
    """What is known of a submission id; None for an output."""
    if not _ID.fullmatch(run):
        return None
    known = recall(run)
    if address is None and known is None:
        raise ManifestError.of(
            "bad-arguments", f"{run} was not submitted from this machine", where="--address",
            why="where its job server is stands nowhere else", fix="give --address, or the output of the merge",
        )  # fmt: skip
    return Submission(run, address or (known.address if known else ""), known.outputs if known else ())


def status(run: str, address: str | None, run_dir: str | None, *, insecure: bool, json_: bool) -> None:
    """What the cluster says, where it is asked and answers, and what the outputs say."""
    submission = _submission(run, address)
    document: dict[str, Any] = {"run": run}
    outputs: Sequence[str] = (run,)
    if submission is not None:
        outputs = submission.outputs
        document["job"] = _ask(submission, insecure=insecure)
    states = []
    for output in outputs:
        try:
            states.append(read_status(output, run_dir=run_dir))
        except SourceError as error:
            states.append({"output": output, "state": "not seen from here", "problems": [error.problems[0].as_json()]})
    document["outputs"] = states
    if submission is None and states[0]["state"] in ("absent", "foreign"):
        raise SourceError.of(
            "no-merge", f"there is no merge at {run} (it is {states[0]['state']})", where=run, fix="check the path"
        )  # fmt: skip
    if json_:
        show.document(document)
        return
    if "job" in document:
        show.lines([f"{run}  {document['job']['state']}" + (f"  {m}" if (m := document["job"]["message"]) else "")])
    show.lines(_status_line(state) for state in states)


_TOLD: Final = ("worker-lost", "unit-again", "node-draining")
"""Events whose number a line of a status names."""


def _status_line(state: dict[str, Any]) -> str:
    line = f"{state['state']:<12}  {state['output']}"
    if state.get("units"):
        line += (
            f"  {state['units_done']}/{state['units']} units, read {format_size(state['bytes_read'])}, "
            f"wrote {format_size(state['bytes_written'])}"
        )
    if state.get("making"):
        line += f", making {state['making']} first"
    if state.get("together"):
        line += f", together with {state['together'] - 1} more"
    told = {kind: n for kind, n in (state.get("events") or {}).items() if kind in _TOLD}
    line += "".join(f", {n} {kind}" for kind, n in told.items())
    for problem in state.get("problems") or ():
        line += f"  {problem['code']}: {problem['what']}"
    return line


def _ask(submission: Submission, *, insecure: bool) -> dict[str, str]:
    """What the job server says; that it says nothing is no error where the outputs say enough."""
    try:
        job = JobServer(submission.address, insecure=insecure).job(submission.submission_id)
    except InfrastructureError as error:
        return {"state": "UNREACHED", "message": error.problems[0].why}
    if job is None:
        return {"state": "UNKNOWN", "message": "the cluster knows no such job: its head was started anew"}
    return {"state": job.state, "message": job.message}


def events(run: str, address: str | None, run_dir: str | None, *, json_: bool) -> None:
    """What happened in unfinished runs, from their own files; no cluster is asked."""
    submission = _submission(run, address)
    outputs = (run,) if submission is None else submission.outputs
    found = [{"output": output, **event} for output in outputs for event in read_events(output, run_dir=run_dir)]
    if json_:
        show.document(found)
    else:
        show.lines(f"{event.get('time', '')} {event['event']}  {event.get('text', '')}" for event in found)


def logs(run: str, address: str | None, run_dir: str | None, *, insecure: bool) -> None:
    submission = _submission(run, address)
    if submission is None:
        show.printed(read_log(run, run_dir=run_dir))
        return
    try:
        show.printed(JobServer(submission.address, insecure=insecure).logs(run))
    except (InfrastructureError, PlanError):
        if not submission.outputs:
            raise
        show.note("the cluster does not answer; this is what the outputs keep")
        for output in submission.outputs:
            try:
                text = read_log(output, run_dir=run_dir)
            except SourceError:
                continue
            show.lines([f"== {output}"])
            show.printed(text)


def stop(run: str, address: str | None, run_dir: str | None, *, insecure: bool, json_: bool) -> None:
    """Through the job server for a submission, through the output's own files for an output."""
    submission = _submission(run, address)
    asked: bool
    if submission is None:
        asked = ask_to_stop(run, run_dir=run_dir)
    else:
        try:
            asked = JobServer(submission.address, insecure=insecure).stop(run)
        except InfrastructureError:
            asked = sum(ask_to_stop(output, run_dir=run_dir) for output in submission.outputs) > 0
    if json_:
        show.document({"run": run, "asked": asked})
    else:
        show.lines([f"asked {run} to stop; what is done is kept" if asked else f"nothing is at work on {run}"])
