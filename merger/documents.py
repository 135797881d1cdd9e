"""The plans of a manifest of several documents: each against what the ones before it will make. Pure but for headers.

plan_documents    the plan of the result, with those of the documents that it reads in `MergePlan.before`
needed            which of them have to be made, in order
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from merger.catalog import Catalog
from merger.errors import Problem
from merger.inputs import Shelf, read_inputs
from merger.made import made_catalog, unmade
from merger.manifest import Manifest, documents_named
from merger.planning.build import plan_merge, write_bytes
from merger.planning.nouns import MergePlan


def plan_documents(
    manifest: Manifest, path: str, device: Literal["cpu", "cuda"], shelf: Shelf | None = None
) -> MergePlan:
    """The plan of a manifest, with those of the documents it reads before it: each is planned against the planned
    outputs of the others."""
    before: list[tuple[str, MergePlan]] = []
    made: dict[str, Catalog] = {}
    problems: list[Problem] = []
    for name, document in manifest.documents.items():
        if any(f"merge://{needed}" not in made for needed in documents_named(document.resolved())):
            continue  # what it reads is refused already
        place = "" if document.output.path is None else str(document.output.path)
        planned = plan_merge(document, read_inputs(document, shelf, made=made), path=place, device=device)
        problems += [replace(p, where=f"documents.{name}: {p.where}") for p in planned.problems]
        if not planned.problems:
            before.append((name, planned))
            made[f"merge://{name}"] = made_catalog(name, planned)
    own = manifest.model_copy(update={"documents": {}})
    if problems and any(f"merge://{needed}" not in made for needed in documents_named(own.resolved())):
        return MergePlan(sources=(), outputs=(), tasks=(), device=device, problems=tuple(problems))
    found = plan_merge(own, read_inputs(own, shelf, made=made), path=path, device=device)
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


def path_problems(plan: MergePlan) -> list[Problem]:
    """Outputs of one file that would lie in one place."""
    seen: dict[str, str] = {}
    found = []
    for name, made in [*plan.before, ("the result", plan)]:
        path = made.outputs[0].path if made.outputs else ""
        if path and seen.setdefault(path, name) != name:
            found.append(
                Problem("conflict", f"{seen[path]} and {name} are written to the same place", path, "",
                        "give each an output.path of its own")
            )  # fmt: skip
    return found


def needed(plan: MergePlan, *, result: bool) -> list[tuple[str, MergePlan]]:
    """What has to be made, in order: what is kept, and what the result (where it is still to be made) reads."""
    wanted = unmade(plan) if result else set()
    chosen = []
    for name, made in reversed(plan.before):
        if name in wanted or is_kept(made):
            wanted |= unmade(made)
            chosen.append((name, made))
    return chosen[::-1]


def documents_read(plan: MergePlan) -> set[str]:
    """The documents that the result reads, and those that these read."""
    found = unmade(plan)
    for name, made in reversed(plan.before):
        if name in found:
            found |= unmade(made)
    return found


def is_kept(plan: MergePlan) -> bool:
    """Whether what a document makes stays: where it has a place of its own."""
    return bool(plan.outputs[0].path)


def bytes_beside(plan: MergePlan) -> int:
    """Bytes of all intermediates that are not kept."""
    return sum(write_bytes(made) for _, made in needed(plan, result=True) if not is_kept(made))


def plans_of(plan: MergePlan) -> Mapping[str, MergePlan]:
    """Every plan of a file by the name of its document; the result's is empty."""
    return {**dict(plan.before), "": plan}
