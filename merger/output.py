"""From receipts to an output that others can load: `begin` and `surviving` before a run, `finish` after it.

Files grow unseen in their sinks and appear under their names whole: weights and companions first, then index, config,
and raymerge.json last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from merger.errors import MergeFailedError, Problem, RefusedError, SourceChangedError
from merger.journal import RESULT_FILE, Journal
from merger.outliers import as_json, outliers, sizes_of
from merger.planning.memory import EXTENT_BYTES
from merger.planning.nouns import MergePlan, Output, OutputFile
from merger.planning.parts import file_layouts, is_large
from merger.receipts import Receipt
from merger.report import (
    CARD_FILE,
    LOSS_WARNING,
    REPORT_FILE,
    REPORTS,
    MergeReport,
    card,
    content_digest,
    result_document,
)
from merger.storage.base import RangeRead, Sink

KEPT_WARNING: Final = 0.1
"""Share of the mean delta, in the median tensor, below which the end of a merge by model_stock warns."""
LAST: Final = ("model.safetensors.index.json", "config.json", "adapter_config.json")
"""Committed after all else, in this order: what makes a folder loadable."""


def plan_document(plan: MergePlan) -> dict[str, object]:
    """What `.raymerge/plan.json` says: enough to recognise the run and to sweep it."""
    return {
        "digest": plan.digest,
        "files": sorted({file.name for output in plan.outputs for file in output.files} | {CARD_FILE, REPORT_FILE}),
        "manifest": plan.manifest,
    }


def begin(plan: MergePlan, sinks: Sequence[Sink]) -> None:
    """Make every output ready to take bytes, and keep what an earlier run of this plan left."""
    for index, sink in enumerate(sinks):
        sink.begin(file_layouts(plan, index))


def surviving(plan: MergePlan, sinks: Sequence[Sink], receipts: Iterable[Receipt]) -> list[Receipt]:
    """Of earlier receipts, those whose bytes are really there.

    A crash between publications leaves some files under their final names: their bytes count as much. One that the
    receipts do not vouch for wholly is grown again from the start.
    """
    kept = [r for r in receipts if all(sinks[e.output].holds(e.file, e.start, e.end, e.sha256) for e in r.extents)]
    while (torn := _torn(plan, sinks, kept)) is not None:
        index, name = torn
        sinks[index].reopen(name)
        kept = [r for r in kept if not any(e.output == index and e.file == name for e in r.extents)]
    return kept


def _torn(plan: MergePlan, sinks: Sequence[Sink], kept: Sequence[Receipt]) -> tuple[int, str] | None:
    """A file under its final name whose bytes the kept receipts do not all vouch for."""
    covered: dict[tuple[int, str], int] = {}
    for e in (extent for receipt in kept for extent in receipt.extents):
        covered[e.output, e.file] = covered.get((e.output, e.file), 0) + e.end - e.start
    for index, sink in enumerate(sinks):
        published = sink.published()
        for file in plan.outputs[index].files:
            if file.kind != "tensors" or file.name not in published:
                continue
            if len(file.prefix) + covered.get((index, file.name), 0) != file.size:
                return index, file.name
    return None


def to_seal(plan: MergePlan, sinks: Sequence[Sink]) -> set[tuple[int, str]]:
    """The tensor files that some worker has to seal when all their bytes are written."""
    return {
        (index, file.name)
        for index, (output, sink) in enumerate(zip(plan.outputs, sinks, strict=True))
        if sink.seals
        for file in output.files
        if file.kind == "tensors" and file.name not in sink.published()
    }


def finish(
    plan: MergePlan,
    sinks: Sequence[Sink],
    receipts: Mapping[int, Receipt],
    journal: Journal | None,
    *,
    seconds: float,
    resumed: int = 0,
    workers: str = "",
    message: str = "",
    log: Sequence[str] = (),
    events: Mapping[str, int] | None = None,
    fingerprint: Mapping[str, str] | None = None,
    read_before: int = 0,
) -> tuple[MergeReport, ...]:
    """Publish the outputs of a run whose units are all done and whose files are sealed. Returns one report an output.

    `message` is what a place with a history says of it, `log` and the numbers of `events` go into the reports,
    `read_before` is the bytes that finding ranks read.

    Raises MergeFailedError(code `incomplete`) when the receipts do not cover a file, before anything is published;
    OutputExistsError where another run won.
    """
    reports = []
    written = [_extents_of(plan, index, receipts) for index in range(len(plan.outputs))]
    for index, (output, sink) in enumerate(zip(plan.outputs, sinks, strict=True)):
        if journal is not None:
            journal.lease.check()
        extents = sorted(written[index] + _write_small(plan, output, sink))
        _check_coverage(output, extents)
        digest = content_digest(extents)
        report = _report(plan, index, receipts, digest, seconds, resumed, read_before)
        document = result_document(plan, index, extents, digest, fingerprint)
        sink.stage(CARD_FILE, card(plan, index, digest).encode())
        sink.stage(REPORT_FILE, _report_document(plan, index, report, receipts, workers, log, events or {}))
        sink.stage(RESULT_FILE, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
        if journal is not None and index == 0:
            journal.supplant(sink)
        ordered = sorted(output.files, key=lambda f: (LAST.index(f.name) if f.name in LAST else -1, f.name))
        for name in (CARD_FILE, REPORT_FILE, *(file.name for file in ordered), RESULT_FILE):
            if journal is not None:
                journal.lease.check()
            sink.publish(name, exclusive=name not in REPORTS)
        sink.conclude(message)
        reports.append(report)
    if journal is not None:
        journal.remove()
    return tuple(reports)


def _extents_of(plan: MergePlan, output: int, receipts: Mapping[int, Receipt]) -> list[tuple[str, int, int, str]]:
    extents = [
        (e.file, e.start, e.end, e.sha256) for r in receipts.values() for e in r.extents if e.output == output
    ]  # fmt: skip
    extents += [
        (file.name, 0, len(file.prefix), hashlib.sha256(file.prefix).hexdigest())
        for file in plan.outputs[output].files
        if file.kind == "tensors"
    ]
    return extents


def _write_small(plan: MergePlan, output: Output, sink: Sink) -> list[tuple[str, int, int, str]]:
    """Literal files and companions: staged whole, or written like tensors where they are large. Returns extents."""
    extents: list[tuple[str, int, int, str]] = []
    for file in output.files:
        if file.kind == "tensors":
            continue
        writer = sink.writer() if is_large(file) else None
        written = file.name in sink.published()
        for at in range(0, max(1, file.size), EXTENT_BYTES):
            stop = min(file.size, at + EXTENT_BYTES)
            data = _small_bytes(plan, file, at, stop)
            if writer is None:
                sink.stage(file.name, data)
            elif not written:
                writer.write(file.name, at, memoryview(data))
            extents.append((file.name, at, stop, hashlib.sha256(data).hexdigest()))
        if writer is not None and not written:
            writer.flush()
            if sink.seals:
                sink.sealed(file.name, sink.seal(file.name))
    return extents


def _small_bytes(plan: MergePlan, file: OutputFile, start: int, stop: int) -> bytes:
    if file.kind == "literal":
        return file.prefix[start:stop]
    buffer = bytearray(stop - start)
    catalog = plan.sources[file.source].catalog
    if buffer:
        reads = [RangeRead(start, memoryview(buffer))]
        try:
            catalog.store.read_into(file.source_name, reads, pin=catalog.pins[file.source_name])
        except RefusedError as error:
            raise SourceChangedError(error.problems) from error  # it could be read when the merge was planned
    return bytes(buffer)


def _check_coverage(output: Output, extents: Sequence[tuple[str, int, int, str]]) -> None:
    """Every byte of every file has exactly one extent."""
    by_file: dict[str, list[tuple[int, int]]] = {}
    for name, start, end, _ in extents:
        by_file.setdefault(name, []).append((start, end))
    for file in output.files:
        at = 0
        for start, end in sorted(by_file.pop(file.name, [])):
            if start != at:
                break
            at = end
        if at != file.size:
            raise MergeFailedError.of(
                "incomplete", f"bytes {at} to {file.size} of {file.name} were not written, or written twice",
                where=output.path, why="the receipts do not cover the file", fix="report this with the plan's JSON",
            )  # fmt: skip
    if by_file:
        raise MergeFailedError.of(
            "incomplete", f"receipts name files that the plan does not: {sorted(by_file)}", where=output.path
        )


def _report(
    plan: MergePlan,
    output: int,
    receipts: Mapping[int, Receipt],
    digest: str,
    seconds: float,
    resumed: int,
    read_before: int,
) -> MergeReport:
    energies = [
        r.notes for r in receipts.values() if "energy" in r.notes and any(e.output == output for e in r.extents)
    ]  # fmt: skip
    total = sum(n["energy"] for n in energies)
    lost = sum(n["energy"] * n["lost"] for n in energies) / total if total > 0 else (0.0 if energies else None)
    warnings = list(plan.warnings)
    rank = int(max((n["rank"] for n in energies), default=0)) or None
    rank_95 = int(max((n["rank_95"] for n in energies), default=0)) or None
    if lost is not None and lost > LOSS_WARNING and not plan.settled_from:
        worst = max(n["lost"] for n in energies)
        warnings.append(
            Problem(
                "energy-lost",
                f"rank {rank} keeps {1 - lost:.0%} of the merged delta's energy (worst module {1 - worst:.0%})",
                plan.outputs[output].path,
                "the merged delta has a higher rank than the output may hold",
                f"ask for a higher rank with output.store: {{svd: {{rank: {rank_95}}}}}, or fold into the model",
            )
        )
    warnings += _weighed_equally(plan, receipts)
    warnings += _near_the_base(plan, output, receipts)
    warnings += _left_out(plan, output, receipts, total)
    warnings += _beyond_factor(plan, output, receipts)
    warnings += outliers(sizes_of(plan, output, receipts.values()))
    made = plan.outputs[output]
    return MergeReport(
        made.path, made.kind, plan.identity, digest, seconds=seconds,
        bytes_read=read_before + sum(r.read_bytes for r in receipts.values()),
        bytes_written=sum(file.size for file in made.files), units=len(receipts), units_resumed=resumed,
        warnings=tuple(warnings), deviations=plan.deviations, energy_lost=lost, rank=rank, rank_95=rank_95,
        files=tuple(sorted(file.name for file in made.files)),
    )  # fmt: skip


def _weighed_equally(plan: MergePlan, receipts: Mapping[int, Receipt]) -> list[Problem]:
    names = {
        plan.tasks[plan.units[r.unit].task].name for r in receipts.values() if r.notes.get("weighed_equally")
    }  # fmt: skip
    if not names:
        return []
    shown = sorted(names)[:5]
    return [
        Problem(
            "weighed-equally", f"in {len(names)} tensor(s) sce gave all sources the same weight",
            ", ".join(shown) + (", …" if len(names) > len(shown) else ""),
            "their mean squares sum to less than 1e-6, below which mergekit tells no difference, and so here",
            "nothing, if that is what you expect of mergekit's sce",
        )
    ]  # fmt: skip


def _near_the_base(plan: MergePlan, output: int, receipts: Mapping[int, Receipt]) -> list[Problem]:
    """model_stock of sources that have little in common keeps little of any."""
    kept = sorted(
        (r.notes["mean_kept"], plan.tasks[plan.units[r.unit].task].name) for r in receipts.values()
        if "mean_kept" in r.notes and any(e.output == output for e in r.extents)
    )  # fmt: skip
    if not kept or kept[len(kept) // 2][0] >= KEPT_WARNING:
        return []
    return [
        Problem(
            "near-base",
            f"model_stock kept {kept[len(kept) // 2][0]:.1%} of the mean delta in the median of {len(kept)} tensors",
            f"least in {kept[0][1]}: {kept[0][0]:.1%}",
            "the sources' deltas are nearly at right angles, and then it goes back to the base; it is for several "
            "fine-tunings of one task",
            "use task_arithmetic, ties or tsv_m for sources of different tasks",
        )
    ]  # fmt: skip


def _left_out(plan: MergePlan, output: int, receipts: Mapping[int, Receipt], energy: float) -> list[Problem]:
    """What an adapter of models does not hold. `energy` is ‖Δ‖² of what it has pairs for."""
    norms: dict[str, float] = {}
    for receipt in receipts.values():
        task = plan.tasks[plan.units[receipt.unit].task]
        if receipt.notes.get("left_out") and task.results[0].places[0].output == output:
            norms[task.name] = norms.get(task.name, 0.0) + receipt.notes["left_out"]
    if not norms:
        return []
    largest = sorted(norms, key=lambda name: -norms[name])
    shown = ", ".join(f"{name} (‖Δ‖ = {norms[name] ** 0.5:.3g})" for name in largest[:5])
    return [
        Problem(
            "left-out",
            f"{len(norms)} changed tensor(s) are not in the adapter: ‖Δ‖ = {sum(norms.values()) ** 0.5:.3g}, "
            f"beside {energy**0.5:.3g} of the matrices that it has pairs for",
            shown + (", …" if len(norms) > 5 else ""), "modules_to_save: drop leaves out what is no matrix of a layer",
            "write modules_to_save: all to write them whole",
        )
    ]  # fmt: skip


def _beyond_factor(plan: MergePlan, output: int, receipts: Mapping[int, Receipt]) -> list[Problem]:
    """Tensors that are larger than the factor allows which they share with their partners."""
    found = {
        plan.tasks[plan.units[r.unit].task].name: r.notes["beyond_factor"] for r in receipts.values()
        if "beyond_factor" in r.notes and any(e.output == output for e in r.extents)
    }  # fmt: skip
    if not found:
        return []
    largest = sorted(found, key=lambda name: -found[name])
    shown = ", ".join(f"{name} ({found[name]:.2f} times)" for name in largest[:5])
    return [
        Problem(
            "beyond-factor", f"{len(found)} tensor(s) have a factor of their own, other than that of their partners",
            shown + (", …" if len(found) > 5 else ""),
            "the merged weights are beyond what codes reach with the base's factor, and engines that run q, k and v, "
            "or gate and up, as one product use one factor for all",
            "write output.quantization: mixed for such an engine; transformers reads each with its own",
        )
    ]  # fmt: skip


def _report_document(
    plan: MergePlan, output: int, report: MergeReport, receipts: Mapping[int, Receipt], workers: str,
    log: Sequence[str], events: Mapping[str, int],
) -> bytes:  # fmt: skip
    units = plan.units
    tensors = {
        plan.tasks[units[index].task].name: receipt.notes
        for index, receipt in sorted(receipts.items())
        if receipt.notes
    }
    slowest = sorted(receipts.values(), key=lambda r: -r.seconds)[:20]
    document = {
        **report.as_json(),
        "workers": workers,
        "log": list(log),
        "events": dict(sorted(events.items())),
        "tensors": tensors,
        "sources": as_json(sizes_of(plan, output, receipts.values())),
        "slowest_units": [
            {"tensor": plan.tasks[units[r.unit].task].name, "rows": [units[r.unit].first, units[r.unit].last],
             "seconds": round(r.seconds, 4)}
            for r in slowest
        ],
    }  # fmt: skip
    return (json.dumps(document, indent=1) + "\n").encode()
