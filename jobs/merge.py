"""The entry point of a job: `python -m jobs.merge MANIFEST [OUT] [OPTION…]`, one merge or a bulk.

It serves `raymerge submit`, `ray job submit -- python -m jobs.merge MANIFEST` and a RayJob alike. A driver that is
started again goes on where the last one ended.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from jobs.guard import HOME, check_names


def main(argv: Sequence[str] | None = None) -> int:
    """Run a manifest as a job. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        check_names()
    except Exception as error:  # noqa: BLE001 - RefusedError, which may not be imported before the guard has looked
        print(error, file=sys.stderr)
        return 2
    from cluster.submit import check_shipment
    from jobs import show
    from jobs.commands import run
    from jobs.exits import CANNOT_START
    from merger.bulk import is_bulk_manifest
    from merger.errors import RaymergeError

    problems = check_shipment(os.environ, HOME)
    if problems:
        show.problems([show.in_four_parts(problem) for problem in problems])
        return CANNOT_START
    command = "merge"
    if arguments and not arguments[0].startswith("-"):
        try:
            command = "bulk" if is_bulk_manifest(arguments[0]) else "merge"
        except RaymergeError:  # what cannot be read now is said by the command
            command = "merge"
    return run([command, *arguments])


if __name__ == "__main__":
    sys.exit(main())
