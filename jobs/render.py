"""From a manifest to rendered files: load, check the site, plan, size, render, write or compare."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast
from urllib.parse import urlsplit

import yaml

from cluster.render.base import MARK, Form, render_base
from cluster.render.rendering import Rendering
from cluster.render.sites import CONFIG_BYTES, check_schedule, check_site, check_sizing, name_of
from cluster.render.sizing import Demand, demand_of, read_demand, size_cluster
from cluster.render.timers import Timer, calendar_of, crontab, systemd_service, systemd_timer
from merger.errors import ManifestError, MergeFailedError, PlanError, Problem, RefusedError
from merger.manifest import BulkManifest, Manifest, load_documents
from merger.manifest.placement import Cluster
from merger.manifest.schedule import parse_cron

if TYPE_CHECKING:
    from merger.bulk import Bulk

TimerForm = Literal["crontab", "systemd"]
_SECRET_VARIABLES: Final = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asks for."""

    manifest: str
    values: str | None = None
    overrides: Sequence[str] = ()
    plan: str | None = None
    """A file with `raymerge plan --json`'s document, where the sources cannot be seen from here."""
    address: str | None = None
    insecure: bool = False
    """Whether the address may be plain http, or ask for no token."""
    command: str = ""
    """The command's own text, for the files' first line."""


def render_site(request: Request, form: Form) -> dict[str, str]:
    """The files of a kustomize base. Raises RefusedError with everything that is wrong; nothing is written here."""
    document = _load(request)
    bulk = _merges_of(request, document)
    site, cluster = document.kubernetes, document.cluster
    name = site.name or name_of(Path(request.manifest).stem)
    manifests = [("", cast("Manifest", document))]
    if bulk is not None:
        manifests = [(f"{merge.label}: ", merge.manifest) for merge in bulk.merges]
    problems = check_site(name, site, form, manifests=manifests, run_dir=cluster.run_dir)
    problems += _check_address(request)
    if request.address is not None and form != "cronjob":
        problems.append(Problem(
            "bad-arguments", f"a {form} takes no address", "--address", "it has a cluster of its own",
            "leave it out, or render --as cronjob",
        ))  # fmt: skip
    if form in ("cronjob", "raycronjob"):
        problems += _check_scheduled(bulk)
    demand = _demand(request, document, bulk, problems)
    if demand is not None:
        sizing = size_cluster(demand, cluster, site)
        problems += check_sizing(site, demand, sizing)
    if problems or demand is None:
        raise PlanError(list(dict.fromkeys(problems)))
    other = None
    if form in ("raycluster", "cronjob") and (demand.device == "cuda" or site.gpu_workers is not None):
        other = size_cluster(replace(demand, device="cpu" if demand.device == "cuda" else "cuda"), cluster, site)
    filled = Cluster(
        workers=sizing.workers, memory=sizing.memory, device=demand.device, run_dir=cluster.run_dir,
        gpus_per_worker=sizing.gpus_per_worker if demand.device == "cuda" else None,
    )  # fmt: skip
    rendering = Rendering(
        name=name, site=site, sizing=sizing, other_sizing=other,
        schedule=None if bulk is None else bulk.manifest.schedule,
        ray_version=site.ray_version or importlib.metadata.version("ray"), manifest_text=_text_of(document, filled),
    )  # fmt: skip
    files = render_base(rendering, form, command=request.command, address=request.address, insecure=request.insecure)
    _refuse_secrets(files)
    return files


def render_timer(request: Request, form: TimerForm, *, executable: str | None = None) -> dict[str, str]:
    """A crontab, or a systemd service and its timer, for this machine."""
    document = _load(request)
    bulk = _merges_of(request, document)
    problems = _check_address(request) + _check_scheduled(bulk)
    schedule = None if bulk is None else bulk.manifest.schedule
    if form == "systemd" and schedule is not None:
        try:
            calendar_of(parse_cron(schedule.cron))
        except ValueError as error:
            problems.append(Problem("bad-value", f"systemd has no such schedule: {error}", "schedule.cron",
                                    fix="write two bulks, one for each"))  # fmt: skip
    _demand(request, document, bulk, problems)
    if problems or schedule is None:
        raise PlanError(list(dict.fromkeys(problems)))
    name = document.kubernetes.name or name_of(Path(request.manifest).stem) or "merges"
    raymerge = executable or _executable()
    path = request.manifest if "://" in request.manifest else os.path.abspath(request.manifest)
    command: tuple[str, ...] = (raymerge, "bulk", path)
    if request.address is not None:
        command = (raymerge, "submit", path, "--address", request.address, "--follow")
        command += ("--insecure",) if request.insecure else ()
    for override in request.overrides:
        command += ("--set", override)
    timer = Timer(name, schedule, command, os.getcwd())
    note = f"# {MARK} {request.command}`.\n"
    if form == "crontab":
        files = {"crontab": note + crontab(timer)}
    else:
        files = {f"{name}.service": note + systemd_service(timer), f"{name}.timer": note + systemd_timer(timer)}
    _refuse_secrets(files)
    return files


# ---- what is loaded and planned -------------------------------------------------------------------------------------


def _load(request: Request) -> Manifest | BulkManifest:
    from merger.bulk import manifest_text

    text = manifest_text(request.manifest)
    documents = load_documents(text, name=request.manifest, overrides=request.overrides, site=request.values)
    if len(documents) != 1:
        raise ManifestError.of("conflict", f"it holds {len(documents)} manifests", where=request.manifest,
                               why="a job has one", fix="split the file, or write a bulk")  # fmt: skip
    return documents[0]


def _merges_of(request: Request, document: Manifest | BulkManifest) -> Bulk | None:
    """The merges of a bulk."""
    if isinstance(document, Manifest):
        return None
    from merger.bulk import load_bulk

    return load_bulk(request.manifest, overrides=request.overrides)


def _check_address(request: Request) -> list[Problem]:
    """What `raymerge submit` would refuse at every tick."""
    if request.address is None:
        return []
    from cluster.jobs_api import is_loopback

    parts = urlsplit(request.address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        return [Problem("bad-arguments", "this is no address of a job server", "--address", "it is asked over http",
                        "write https://HOST:8265")]  # fmt: skip
    if parts.scheme == "http" and not is_loopback(parts.hostname) and not request.insecure:
        return [Problem("insecure", "the job server is asked over plain http", "--address", "the token, and what is "
                        "submitted, could be read and changed on the way", "use https, or --insecure")]  # fmt: skip
    return []


def _check_scheduled(bulk: Bulk | None) -> list[Problem]:
    merges = () if bulk is None else bulk.merges
    found = check_schedule([(f"{merge.label}: ", merge.manifest) for merge in merges])
    if bulk is None or bulk.manifest.schedule is None:
        found.append(Problem(
            "missing-key", "schedule is missing", "schedule", "it says when a bulk runs",
            'write merges: [{manifest: FILE}] and schedule: {cron: "0 3 * * *", timezone: UTC}',
        ))  # fmt: skip
    return found


def _demand(
    request: Request, document: Manifest | BulkManifest, bulk: Bulk | None, problems: list[Problem]
) -> Demand | None:
    """What the plans ask for, or None and why not among the problems."""
    device = document.cluster.device or "cpu"
    if request.plan is not None:
        return read_demand(_read_json(request.plan), where=request.plan, device=device)
    try:
        if bulk is not None:
            from merger.bulk import plan_bulk

            planned = plan_bulk(bulk, device=device)
            problems += planned.problems
            return None if planned.problems else demand_of(list(planned.plans()))
        assert isinstance(document, Manifest)
        from merger import api

        plan = api.plan(document, device=device)
        problems += plan.problems
        return None if plan.problems else demand_of([plan])
    except RefusedError as error:
        problems += error.problems
        return None


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError.of("bad-value", f"the plan cannot be read: {error}", where=path,
                               fix="make it with `raymerge plan MANIFEST --json`") from None  # fmt: skip


def _text_of(document: Manifest | BulkManifest, cluster: Cluster) -> str:
    """The manifest as the job reads it: canonical, placed as it was sized, without the site."""
    plain = document.model_dump(mode="json")
    plain.pop("kubernetes", None)
    plain["cluster"] = cluster.model_dump(mode="json")
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)
    if len(text.encode()) > CONFIG_BYTES:
        raise PlanError.of("too-large", "the manifest does not fit a ConfigMap", where="the manifest",
                           why="Kubernetes holds 1 MiB", fix="split the bulk")  # fmt: skip
    return text


def _refuse_secrets(files: Mapping[str, str]) -> None:
    """Nothing that this process knows as a secret is written."""
    known = [(name, os.environ[name]) for name in _SECRET_VARIABLES if len(os.environ.get(name, "")) >= 8]
    for name, value in known:
        for file, text in files.items():
            if value in text:
                raise PlanError.of("secret-in-clear", f"the value of {name} would be written", where=file,
                                   fix="name the secret under kubernetes.secrets")  # fmt: skip


def _executable() -> str:
    """Where the command itself lies: cron and systemd look in few places."""
    own = os.path.abspath(sys.argv[0])
    return own if os.path.basename(own) == "raymerge" else shutil.which("raymerge") or "raymerge"


# ---- what is written ------------------------------------------------------------------------------------------------


def write_files(files: Mapping[str, str], folder: str) -> None:
    """Write the files into a folder, and remove what an earlier rendering left there.

    Raises ManifestError(code `not-ours`) where a file of the same name was not rendered.
    """
    os.makedirs(folder, exist_ok=True)
    foreign = [name for name in files if (text := _read(folder, name)) is not None and MARK not in text[:200]]
    if foreign:
        raise ManifestError.of("not-ours", f"{', '.join(foreign)} in it was not rendered", where=folder,
                               why="files of somebody's own are never overwritten",
                               fix="choose another folder")  # fmt: skip
    for name in _stale(files, folder):
        os.remove(os.path.join(folder, name))
    for name, text in files.items():
        Path(folder, name).write_text(text, encoding="utf-8")


def compare_files(files: Mapping[str, str], folder: str) -> None:
    """Raises MergeFailedError(code `drift`) where the folder is not what would be rendered."""
    differing = [name for name in files if _read(folder, name) != files[name]]
    differing += _stale(files, folder)
    if differing:
        raise MergeFailedError([
            Problem("drift", f"{name} is not what would be rendered", os.path.join(folder, name),
                    "the manifest, the values, the sources or raymerge changed since", "render it again")
            for name in sorted(differing)
        ])  # fmt: skip


def _stale(files: Mapping[str, str], folder: str) -> list[str]:
    return [name for name in _names(folder) if name not in files and MARK in (_read(folder, name) or "")[:200]]


def _names(folder: str) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError):
        yield from sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))


def _read(folder: str, name: str) -> str | None:
    try:
        return Path(folder, name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        return ""
