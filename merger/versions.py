"""An output that keeps its versions: PATH/<fingerprint>/ each, and PATH/latest.json, which names the last one."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from merger.destination import Destination, open_destination
from merger.errors import InfrastructureError, SourceError
from merger.journal import RESULT_FILE, STATE_FOLDER
from merger.manifest import parse_reference
from merger.planning.nouns import MergePlan
from merger.report import MergeReport
from merger.storage.base import WritableStore, read_whole

POINTER_FILE: Final = "latest.json"
_TRIES: Final = 20


def fingerprint(planned: MergePlan) -> str:
    """The name of a merge among the versions of an output: the start of its plan's digest."""
    return planned.digest[:12]


def latest_of(output: str) -> str:
    """The version that PATH/latest.json names, for those who look at PATH; PATH itself where there is no such file, or
    a merge lies there."""
    reference = parse_reference(output, bare="local")
    if reference.kind == "hub":
        return output
    place = open_destination(output)
    names = place.content.list_files()
    if RESULT_FILE in names or POINTER_FILE not in names or any(n.startswith(f"{STATE_FOLDER}/") for n in names):
        return output
    _, known = _read_pointer(place.state)
    found = known.get("fingerprint") if isinstance(known, dict) else None
    if not isinstance(found, str) or re.fullmatch(r"[0-9a-f]{12}", found) is None:
        return output
    return str(reference.child(found))


def point_to_latest(place: Destination, planned: MergePlan, report: MergeReport) -> None:
    """Let PATH/latest.json name this merge, by compare-and-set: of several that finish at once each is written, one
    after another, and the one that was written last is named.

    Raises InfrastructureError(code `pointer-contended`) when others kept writing it.
    """
    document = {
        "fingerprint": fingerprint(planned),
        "path": report.path,
        "plan_digest": report.plan_digest,
        "content_digest": report.content_digest,
    }
    for _ in range(_TRIES):
        pin, known = _read_pointer(place.state)
        if known == document:
            return
        try:
            data = (json.dumps(document, indent=1) + "\n").encode()
            if pin is None:
                place.state.put(POINTER_FILE, data, exclusive=True)
            else:
                place.state.put(POINTER_FILE, data, replacing=pin)
        except FileExistsError:
            continue
        return
    raise InfrastructureError.of(
        "pointer-contended", f"{POINTER_FILE} changed again and again while it was being written", where=place.uri,
        why="other merges finish at the same place", fix="run the same command again: the merge itself is done",
    )  # fmt: skip


def _read_pointer(store: WritableStore) -> tuple[str | None, Any]:
    """(pin, document) of latest.json; (None, None) where there is none."""
    try:
        pin = store.stat(POINTER_FILE).pin
        return pin, json.loads(read_whole(store, POINTER_FILE, limit=1 << 16))
    except SourceError:
        return None, None
    except ValueError:
        return pin, None
