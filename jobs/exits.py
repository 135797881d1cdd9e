"""Where every error ends, and only here: as an exit code, and in four parts for people or as one document.

0 done · 1 the merge failed · 2 it cannot start · 3 the output is something else · 75 worth a retry · 130/143 stopped
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import NoReturn

import typer

from jobs import logs, show
from merger.errors import InfrastructureError, OutputExistsError, Problem, RaymergeError, RefusedError, StoppedError

FAILED, CANNOT_START, OUTPUT_EXISTS, RETRY = 1, 2, 3, 75


def exit_code(error: BaseException) -> int:
    """The contract's exit code for an error."""
    if isinstance(error, RefusedError):
        return CANNOT_START
    if isinstance(error, OutputExistsError):
        return OUTPUT_EXISTS
    if isinstance(error, InfrastructureError | MemoryError):
        return RETRY
    if isinstance(error, StoppedError):
        return 128 + error.signal_number
    if isinstance(error, KeyboardInterrupt):
        return 130
    return FAILED


def guarded(work: Callable[[], None], *, json_: bool, debug: bool, log_format: str | None = None) -> None:
    try:
        logs.configure(log_format)
        work()
    except typer.Exit:
        raise
    except BaseException as error:  # noqa: BLE001 - the one place where every error ends
        _end(error, json_=json_, debug=debug)


def _end(error: BaseException, *, json_: bool, debug: bool) -> NoReturn:
    code = exit_code(error)
    if isinstance(error, SystemExit):
        raise error
    if debug:
        traceback.print_exception(error)
    if isinstance(error, RaymergeError):
        problems = error.problems
    elif isinstance(error, KeyboardInterrupt):
        problems = (Problem("stopped", "stopped before the merge had started"),)
    elif isinstance(error, MemoryError):
        problems = (Problem("out-of-memory", "memory ran out", fix="use a smaller --memory or fewer --workers"),)
    else:
        problems = (
            Problem("internal", f"{type(error).__name__}: {error}", fix="run again with --debug and report this"),
        )
    problems = tuple(map(show.in_four_parts, problems))
    if json_:
        show.document({"exit_code": code, "problems": [p.as_json() for p in problems]})
    show.problems(problems, notes=getattr(error, "__notes__", []))
    raise typer.Exit(code)
