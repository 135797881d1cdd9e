"""From receipts to an output that others can load: `allocate` before a run, `finish` after it.

Files grow under `.raymerge/parts/` and appear under their names whole: weights and companions first, then index,
config, and raymerge.json last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from merger.errors import MergeFailedError, Problem, RefusedError, SourceChangedError, SourceError
from merger.journal import RESULT_FILE, Journal
from merger.planning.memory import EXTENT_BYTES
from merger.planning.nouns import MergePlan, Output, OutputFile
from merger.receipts import Extent, Receipt
from merger.report import (
    CARD_FILE,
    LOSS_WARNING,
    REPORT_FILE,
    MergeReport,
    card,
    content_digest,
    result_document,
)
from merger.storage.base import RangeRead, WritableStore
from merger.unit import scratch_name

LAST: Final = ("model.safetensors.index.json", "config.json", "adapter_config.json")
"""Committed after all else, in this order: what makes a folder loadable."""


def plan_document(plan: MergePlan) -> dict[str, object]:
    """What `.raymerge/plan.json` says: enough to recognise the run and to sweep it."""
    return {
        "digest": plan.digest,
        "files": sorted({file.name for output in plan.outputs for file in output.files} | {CARD_FILE, REPORT_FILE}),
        "manifest": plan.manifest,
    }


def allocate(plan: MergePlan, stores: Sequence[WritableStore], *, finished: Mapping[int, set[str]]) -> None:
    """Reserve every file of every output and write the headers. Files already under their final names are left.

    `finished` holds, for each output, the names a resumed run found complete.
    """
    for index, (output, store) in enumerate(zip(plan.outputs, stores, strict=True)):
        for file in output.files:
            if file.kind == "tensors" and file.name not in finished.get(index, set()):
                store.allocate(scratch_name(file.name), file.size)
                store.write_at(scratch_name(file.name), 0, memoryview(file.prefix))


def surviving(plan: MergePlan, stores: Sequence[WritableStore], receipts: Iterable[Receipt]) -> tuple[
    list[Receipt], dict[int, set[str]]
]:  # fmt: skip
    """Of earlier receipts, those whose bytes are really there, digested again; and the files that are already final.

    A crash between renames leaves some files under their final names: their bytes count as much.
    """
    final: dict[int, set[str]] = {}
    where: dict[tuple[int, str], str] = {}
    for index, (output, store) in enumerate(zip(plan.outputs, stores, strict=True)):
        names = set(store.list_files())
        for file in output.files:
            if file.kind != "tensors":
                continue
            if scratch_name(file.name) in names and store.stat(scratch_name(file.name)).size == file.size:
                where[index, file.name] = scratch_name(file.name)
            elif file.name in names and store.stat(file.name).size == file.size:
                where[index, file.name] = file.name
                final.setdefault(index, set()).add(file.name)
    kept: list[Receipt] = []
    buffer = bytearray()
    for receipt in receipts:
        places = [(e, where.get((e.output, e.file))) for e in receipt.extents]
        if all(place is not None and _holds(stores[e.output], place, e, buffer) for e, place in places):
            kept.append(receipt)
    while (torn := _torn(plan, stores, final, kept)) is not None:
        # A final file that is not whole is grown again from the start.
        index, name = torn
        final[index].discard(name)
        kept = [r for r in kept if not any(e.output == index and e.file == name for e in r.extents)]
    return kept, final


def _torn(
    plan: MergePlan, stores: Sequence[WritableStore], final: Mapping[int, set[str]], kept: Sequence[Receipt]
) -> tuple[int, str] | None:
    """A file under its final name whose bytes the kept receipts do not all vouch for."""
    covered: dict[tuple[int, str], int] = {}
    for e in (extent for receipt in kept for extent in receipt.extents):
        covered[e.output, e.file] = covered.get((e.output, e.file), 0) + e.end - e.start
    for index, names in final.items():
        for file in plan.outputs[index].files:
            if file.name not in names:
                continue
            header = bytearray(len(file.prefix))
            stores[index].read_into(file.name, [RangeRead(0, memoryview(header))])
            if header != file.prefix or len(header) + covered.get((index, file.name), 0) != file.size:
                return index, file.name
    return None


def _holds(store: WritableStore, name: str, extent: Extent, buffer: bytearray) -> bool:
    size = extent.end - extent.start
    if len(buffer) < size:
        buffer.extend(bytes(size - len(buffer)))
    view = memoryview(buffer)[:size]
    try:
        store.read_into(name, [RangeRead(extent.start, view)])
    except SourceError:
        return False
    finally:
        digest = hashlib.sha256(view).hexdigest()
        view.release()
    return digest == extent.sha256


def finish(
    plan: MergePlan,
    stores: Sequence[WritableStore],
    receipts: Mapping[int, Receipt],
    journal: Journal | None,
    *,
    seconds: float,
    resumed: int = 0,
    workers: str = "",
) -> tuple[MergeReport, ...]:
    """Publish the outputs of a run whose units are all done. Returns one report an output.

    Raises MergeFailedError(code `incomplete`) when the receipts do not cover a file, before anything is published.
    """
    reports = []
    written = [_extents_of(plan, index, receipts) for index in range(len(plan.outputs))]

    def publish(store: WritableStore, name: str) -> None:
        if journal is not None:
            journal.lease.check()
        store.commit(scratch_name(name), name)

    for index, (output, store) in enumerate(zip(plan.outputs, stores, strict=True)):
        if journal is not None:
            journal.lease.check()
        extents = sorted(written[index] + _write_small(plan, output, store))
        _check_coverage(output, extents)
        digest = content_digest(extents)
        report = _report(plan, index, receipts, digest, seconds, resumed)
        document = result_document(plan, index, extents, digest)
        store.put(scratch_name(CARD_FILE), card(plan, index, digest).encode())
        store.put(scratch_name(REPORT_FILE), _report_document(plan, report, receipts, workers))
        store.put(scratch_name(RESULT_FILE), (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
        names = set(store.list_files())
        ordered = sorted(output.files, key=lambda f: (LAST.index(f.name) if f.name in LAST else -1, f.name))
        for name in (CARD_FILE, REPORT_FILE, *(file.name for file in ordered), RESULT_FILE):
            if scratch_name(name) in names:  # else an earlier run, cut short here, published it
                publish(store, name)
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


def _write_small(plan: MergePlan, output: Output, store: WritableStore) -> list[tuple[str, int, int, str]]:
    """Literal files and companions, into scratch; their extents."""
    extents: list[tuple[str, int, int, str]] = []
    for file in output.files:
        if file.kind == "tensors":
            continue
        name = scratch_name(file.name)
        store.allocate(name, file.size)
        for at in range(0, max(1, file.size), EXTENT_BYTES):
            stop = min(file.size, at + EXTENT_BYTES)
            data = _small_bytes(plan, file, at, stop)
            if data:
                store.write_at(name, at, memoryview(data))
            extents.append((file.name, at, stop, hashlib.sha256(data).hexdigest()))
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
    plan: MergePlan, output: int, receipts: Mapping[int, Receipt], digest: str, seconds: float, resumed: int
) -> MergeReport:
    energies = [
        r.notes for r in receipts.values() if r.notes and any(e.output == output for e in r.extents)
    ]  # fmt: skip
    total = sum(n["energy"] for n in energies)
    lost = sum(n["energy"] * n["lost"] for n in energies) / total if total > 0 else (0.0 if energies else None)
    warnings = list(plan.warnings)
    rank = int(max((n["rank"] for n in energies), default=0)) or None
    rank_95 = int(max((n["rank_95"] for n in energies), default=0)) or None
    if lost is not None and lost > LOSS_WARNING:
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
    made = plan.outputs[output]
    return MergeReport(
        made.path, made.kind, plan.digest, digest, seconds=seconds,
        bytes_read=sum(r.read_bytes for r in receipts.values()),
        bytes_written=sum(file.size for file in made.files), units=len(receipts), units_resumed=resumed,
        warnings=tuple(warnings), deviations=plan.deviations, energy_lost=lost, rank=rank, rank_95=rank_95,
        files=tuple(sorted(file.name for file in made.files)),
    )  # fmt: skip


def _report_document(plan: MergePlan, report: MergeReport, receipts: Mapping[int, Receipt], workers: str) -> bytes:
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
        "tensors": tensors,
        "slowest_units": [
            {"tensor": plan.tasks[units[r.unit].task].name, "rows": [units[r.unit].first, units[r.unit].last],
             "seconds": round(r.seconds, 4)}
            for r in slowest
        ],
    }  # fmt: skip
    return (json.dumps(document, indent=1) + "\n").encode()
