"""The name guard: jobs, cluster and merger are ours, all three, or nothing starts.

The names are generic. PyPI has a `cluster` and a `merger`; pip mixes such a package and ours into one folder without a
word, and next to an editable install `import cluster` finds theirs. So the command, and each worker at its start, ask
two questions: are the three imported from one folder, this one, and does any other distribution own one of them?

Standard library only, and merger only once it is known to be ours: a foreign package is never imported here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

DISTRIBUTION: Final = "raymerge"
NAMES: Final = ("jobs", "cluster", "merger")
HOME: Final = Path(__file__).resolve().parents[1]
"""The folder that holds the three packages."""

_WHY: Final = "one of raymerge's three import names would run another project's code"
_FIX: Final = "install raymerge into an environment of its own"
_OWNED: Final = re.compile(rf'^"?(?:\./)?({"|".join(NAMES)})(?:/|\.py\b|\.[\w.-]+\.so\b)', re.MULTILINE)
_LISTED: Final = re.compile(rf"^({'|'.join(NAMES)})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _Intruder:
    name: str
    """The import name."""
    what: str
    where: str
    fix: str = _FIX


def check_names() -> None:
    """Raise RefusedError (`foreign-package`) naming the owner when one of the three names is not ours alone."""
    found = [*_foreign_owners(), *_foreign_places()]
    if found:
        _refuse(found)


def _foreign_owners() -> Iterator[_Intruder]:
    """Distributions on the path, other than ours, that installed something under one of the names.

    `importlib.metadata.packages_distributions` answers the same, but makes an object of every line of every RECORD
    and, from Python 3.12, looks each of the files up on disk, at every start. Here the texts are searched as they are.
    """
    for distribution in importlib.metadata.distributions():
        owned = {
            name
            for file, pattern in (("RECORD", _OWNED), ("top_level.txt", _LISTED))
            # Most texts have none of the three words, which is seen faster than that no line begins with one.
            if (text := distribution.read_text(file)) and any(name in text for name in NAMES)
            for name in pattern.findall(text)
        }
        if owned and _normalised(distribution.metadata["Name"]) != DISTRIBUTION:
            title = f"{distribution.metadata['Name']} {distribution.version}"
            place = str(distribution.locate_file(""))
            for name in sorted(owned):
                fix = f"pip uninstall {distribution.metadata['Name']}, then reinstall raymerge; or {_FIX}"
                yield _Intruder(name, f"the package {name} is owned by {title}", place, fix)


def _foreign_places() -> Iterator[_Intruder]:
    """Names that are imported from elsewhere than this file's folder, or not found at all."""
    for name in NAMES:
        folder = _folder_of(name)
        if folder is None:
            yield _Intruder(name, f"the package {name} is missing", str(HOME), "reinstall raymerge")
        elif folder != HOME / name:
            yield _Intruder(name, f"{name} is imported from {folder}, not from {HOME / name}", str(folder))


def _folder_of(name: str) -> Path | None:
    """Where `import name` leads, without importing it. A module in a single file is that file."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # it stands in sys.modules without a spec: someone put it there by hand
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin or name).resolve()


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _refuse(found: list[_Intruder]) -> NoReturn:
    if all(intruder.name != "merger" for intruder in found):
        from merger.errors import Problem, RefusedError

        raise RefusedError(
            [Problem("foreign-package", i.what, where=i.where, why=_WHY, fix=i.fix) for i in found],
        )
    # merger itself is in doubt, and the error tree lives there: say it without.
    for i in found:
        text = f"foreign-package: {i.what}\n  where  {i.where}\n  why    {_WHY}\n  fix    {i.fix}"
        print(text, file=sys.stderr)
    raise SystemExit(2)
