"""What a finished merge says about itself: raymerge.json (what it is), raymerge-report.json (how it went), the card."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from merger.errors import Problem, escape
from merger.formats.token_tensors import EMBEDDINGS
from merger.methods.compose import method_label
from merger.planning.devices import uses_gpu
from merger.planning.nouns import FormulaTerm, MergePlan, Source
from merger.planning.settle import ranks_by_name
from merger.tensors import format_size
from merger.unit import needs_torch

REPORT_FILE: Final = "raymerge-report.json"
CARD_FILE: Final = "README.md"
REPORTS: Final = (CARD_FILE, REPORT_FILE)
"""Files of an output that its content digest leaves out."""
VERSIONED: Final = ("raymerge", "torch", "numpy", "numba", "safetensors", "peft", "ray")
LOSS_WARNING: Final = 0.10
"""Share of energy lost by a cut to a rank above which the end of a merge warns."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """The outcome of a merge, for people and for scripts."""

    path: str
    kind: str
    plan_digest: str
    content_digest: str
    already_done: bool = False
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    units: int = 0
    units_resumed: int = 0
    warnings: tuple[Problem, ...] = ()
    deviations: tuple[str, ...] = ()
    energy_lost: float | None = None
    """Share of ‖ΔW‖² over all modules that the chosen rank does not hold; None where nothing was cut."""
    rank: int | None = None
    rank_95: int | None = None
    """The largest rank any module needs to keep 95 %."""
    files: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path, "kind": self.kind, "plan_digest": self.plan_digest,
            "content_digest": self.content_digest, "already_done": self.already_done, "seconds": self.seconds,
            "bytes_read": self.bytes_read, "bytes_written": self.bytes_written, "units": self.units,
            "units_resumed": self.units_resumed, "warnings": [w.as_json() for w in self.warnings],
            "deviations": list(self.deviations), "energy_lost": self.energy_lost, "rank": self.rank,
            "rank_95": self.rank_95, "files": list(self.files),
        }  # fmt: skip


def content_digest(extents: Iterable[tuple[str, int, int, str]]) -> str:
    """SHA-256 over the sorted (file, start, end, sha256) of all files but the card and the reports."""
    digest = hashlib.sha256()
    for file, start, end, sha256 in sorted(extents):
        digest.update(f"{file}\0{start}\0{end}\0{sha256}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions that were at work."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found_here = importlib.metadata.distribution(name)
            text = found_here.read_text("METADATA") or found_here.read_text("PKG-INFO") or ""
        except importlib.metadata.PackageNotFoundError:
            text = ""
        # Its own line among the first few: parsing all of it, descriptions too, takes a hundred times as long.
        version = re.search(r"^Version: *(\S+)", text, re.MULTILINE)
        found[name] = version[1] if version else "absent"
    return found


def numeric_fingerprint(plan: MergePlan, device: str | None = None) -> dict[str, str]:
    """What, beside the plan, decides bits: of all its work, or of what is done on a `device` of one kind.

    Elementwise arithmetic is IEEE and the same on every CPU; products and spectral steps follow torch's build, its BLAS
    and the CPU's capability, so these are named where the plan has such steps.
    """
    if not needs_torch(plan):
        return {"arithmetic": "elementwise", "device": plan.device}
    on_gpu = uses_gpu(plan) and device in (None, "cuda")
    import torch

    config = torch.__config__.show()
    blas = next((part for part in config.split(",") if "BLAS_INFO=" in part), "").rpartition("=")[2]
    fingerprint = {
        "arithmetic": "products",
        "torch": str(torch.__version__),
        "blas": blas.strip() or "unknown",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "device": "cuda" if on_gpu else "cpu",
    }
    if any(
        isinstance(t, FormulaTerm) and t.kind == "peft" for task in plan.tasks for e in task.entries for t in e.terms
    ):
        fingerprint["peft"] = versions()["peft"]  # its code computed layers of this merge
    if on_gpu:
        seen = torch.cuda.is_available()  # a driver on the head of a cluster has none
        fingerprint["cuda"] = str(torch.version.cuda)
        fingerprint["gpu"] = torch.cuda.get_device_name() if seen else "of the workers"
    return fingerprint


def result_document(
    plan: MergePlan, output: int, extents: Sequence[tuple[str, int, int, str]], digest: str,
    fingerprint: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """raymerge.json: what this output is. No times in it, so that the same merge writes the same file. `fingerprint` is
    that of the workers, where they have what this process has not: GPUs."""
    made = plan.outputs[output]
    return {
        "version": 1,
        "raymerge": versions()["raymerge"],
        "kind": made.kind,
        "manifest": plan.manifest,
        "sources": [
            {"label": s.label, "reference": s.catalog.reference, "kind": s.catalog.kind, "licence": s.catalog.licence,
             "pins": s.catalog.pins}
            for s in every_source(plan)
        ],
        "plan_digest": plan.identity,
        "content_digest": digest,
        **({"ranks": ranks_by_name(plan, output)} if plan.settled_from else {}),
        "numeric_fingerprint": dict(fingerprint or numeric_fingerprint(plan)),
        "versions": versions(),
        "plugins": [plugin.as_json() for plugin in plan.plugins],
        "deviations": list(plan.deviations),
        "warnings": [w.as_json() for w in plan.warnings],
        "code": sorted({name for s in plan.sources for name in s.catalog.code}),
        "files": [{"name": f.name, "size": f.size} for f in sorted(made.files, key=lambda f: f.name)],
        "reports": list(REPORTS),
        "extents": [list(extent) for extent in sorted(extents)],
    }  # fmt: skip


def every_source(plan: MergePlan) -> list[Source]:
    """The sources of a plan, and those of what other documents made for it; each once."""
    found = [*plan.sources, *(source for _, made in plan.before for source in made.sources)]
    return list({source.catalog.reference: source for source in reversed(found)}.values())[::-1]


def card(plan: MergePlan, output: int, digest: str) -> str:
    """README.md of the output: what was merged from what, with revisions and licences."""
    made = plan.outputs[output]
    named = {s.catalog.base_name for s in plan.sources if s.catalog.kind == "adapter"} - {None}
    base = plan.manifest.get("base_model") or (named.pop() if len(named) == 1 else None)
    lines = ["---", "tags:", "- merge", "- raymerge"]
    if made.kind == "adapter":
        with_config = any(file.name == "adapter_config.json" for file in made.files)
        lines += ["library_name: peft" if with_config else "library_name: diffusers"]
    if isinstance(base, str) and not base.startswith(("/", ".", "memory:")):
        lines += [f"base_model: {json.dumps(_repository(base))}"]
    lines += ["---", "", f"# Merged {made.kind}", ""]
    lines += [
        f"Made by raymerge {versions()['raymerge']} with `{method_label(plan.manifest)}`.", "",
        "| source | kind | licence |", "|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| `{escape(s.catalog.reference)}` | {s.catalog.kind} | {escape(s.catalog.licence) or 'not stated'} |"
        for s in every_source(plan)
    ]
    if plan.deviations:
        lines += ["", "Where this differs from other tools, on purpose:", ""]
        lines += [f"- {escape(d)}" for d in plan.deviations]
    rows = _embedding_rows(plan, output)
    if rows is not None:
        lines += _loading(base, rows)
    lines += ["", "```yaml", _yaml(plan.manifest), "```", "", f"Content digest: `{digest}`", ""]
    return "\n".join(lines)


def _embedding_rows(plan: MergePlan, output: int) -> int | None:
    """Rows of the embeddings that a merged adapter holds whole; None where it holds none."""
    if plan.outputs[output].kind != "adapter":
        return None
    places = (place for task in plan.tasks for result in task.results for place in result.places)
    held = (p.rows for p in places if p.output == output and p.tensor.endswith(EMBEDDINGS))
    return next(held, None)


def _loading(base: object, rows: int) -> list[str]:
    """How an adapter is loaded whose embeddings are not of the base's size."""
    name = json.dumps(_repository(base) if isinstance(base, str) else "BASE")
    return [
        "", f"It holds embeddings of {rows} rows: resize the base before it is loaded, and use its tokenizer.",
        "", "```python", f"model = AutoModelForCausalLM.from_pretrained({name})",
        f"model.resize_token_embeddings({rows})", "model = PeftModel.from_pretrained(model, THIS)",
        "tokenizer = AutoTokenizer.from_pretrained(THIS)", "```",
    ]  # fmt: skip


def _repository(base: str) -> str:
    """`org/name` of a repository's reference; anything else as it is."""
    return base.removeprefix("hf://").partition("@")[0] if base.startswith("hf://") else base


def _yaml(document: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True)).rstrip()


def summary_lines(report: MergeReport) -> list[str]:
    """The end of a merge in a few lines for people."""
    if report.already_done:
        return [f"already done: {report.path}", f"content digest {report.content_digest}"]
    lines = [
        f"merged {report.kind}: {report.path}",
        f"  read {format_size(report.bytes_read)}, wrote {format_size(report.bytes_written)}, "
        f"{report.units} units in {report.seconds:.1f} s"
        + (f" ({report.units_resumed} kept from an earlier run)" if report.units_resumed else ""),
        f"  content digest {report.content_digest}",
    ]
    if report.energy_lost is not None:
        lines.append(
            f"  rank {report.rank} loses {report.energy_lost:.1%} of the energy; rank {report.rank_95} keeps 95 %"
        )
    return lines
