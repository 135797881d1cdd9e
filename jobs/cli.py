"""The console command: look whether our names are ours, then run what was asked for."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence

from jobs.guard import check_names


def main(argv: Sequence[str] | None = None) -> int:
    """Run `raymerge argv…` (sys.argv where None). Returns the exit code."""
    gc.set_threshold(50_000)  # planning makes many small values that live on: looking for garbage among them is in vain
    try:
        check_names()
    except Exception as error:  # noqa: BLE001 - RefusedError, which may not be imported before the guard has looked
        print(error, file=sys.stderr)
        return 2
    from jobs.commands import run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
