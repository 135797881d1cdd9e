"""A merge of one or several steps: what has to be run before it can go on.

    stretches    of one plan: first what finds its ranks, where they follow from the data, then the plan itself
    steps        of a merge with all that it needs: documents that it reads, gates, ranks

Both are generators that yield a `Stretch` and go on when its progression is finished. Who runs it, here or on Ray,
alone or beside other merges, is the caller's business; so is where errors come from: what happens to a stretch is
thrown into `steps`, which gives the output back and raises what the merge ends with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from merger.crew import thread_bytes
from merger.documents import bytes_beside, needed, plans_of
from merger.errors import MergeFailedError, PlanError, Problem, RaymergeError, RefusedError, StoppedError
from merger.gates import HiddenStates, check_forward, fill_gates
from merger.intermediates import between
from merger.output import to_seal
from merger.planning.build import check_machine
from merger.planning.devices import uses_gpu
from merger.planning.nouns import MergePlan
from merger.planning.settle import measuring
from merger.receipts import Receipt
from merger.report import MergeReport
from merger.run import Progression, ranks_found
from merger.session import Session
from merger.storage.base import Sink


@dataclass(frozen=True, slots=True)
class Stretch:
    """Units of one plan that have to be done next."""

    session: Session
    plan: MergePlan
    progression: Progression
    sinks: Sequence[Sink]
    record: Callable[[list[Receipt]], None] = field(repr=False)
    """Makes receipts durable."""


def stretches(session: Session) -> Iterator[Stretch]:
    """What has to be run of a session that is taken. When it ends, the session can be finished."""
    planned = session.planned
    if planned.unsettled:
        measured = measuring(planned)
        progression = Progression(measured, session.durable())
        if not progression.finished:
            yield Stretch(session, measured, progression, (), session.append)
        session.settle(ranks_found(planned, progression), sum(r.read_bytes for r in progression.receipts.values()))
    session.begin()
    planned, sinks = session.planned, session.sinks
    batch = max(sink.batch_bytes for sink in sinks)
    progression = Progression(planned, session.receipts.values(), to_seal(planned, sinks), batch_bytes=batch)
    yield Stretch(session, planned, progression, sinks, session.record)


def end_without_result(session: Session, error: BaseException) -> BaseException:
    """Give an output back. Returns what its merge ends with: what is refused before anything is done leaves the output
    as it was found; later it is a failure, and what is done is kept."""
    if isinstance(error, RefusedError) and not session.has_begun:
        session.refuse()
        return error
    # A place that is closed to us takes no lease back either: it goes stale by itself, and what ended the run is told.
    with contextlib.suppress(RaymergeError):
        session.close()
    return MergeFailedError(error.problems) if isinstance(error, RefusedError) else error


def check_steps(
    session: Session, share: int, allowed: int, hidden: HiddenStates | None, *, beside: bool = True
) -> None:  # fmt: skip
    """Whether the last step of several could begin: seen before the first of them does.

    `share` is bytes of a worker, `allowed` of them all together; `beside`: intermediates will lie with the output.
    Raises PlanError, OutputExistsError.
    """
    planned = session.planned
    if planned.before or planned.gates is not None:
        session.check_place()
    if not planned.before:
        check_forward(planned, hidden, allowed)
        return
    free = session.free_bytes()
    room = None if free is None else free - (bytes_beside(planned) if beside else 0)
    problems: list[Problem] = []
    for name, plan in plans_of(planned).items():
        problems += check_machine(plan, memory=share, free_bytes=None if name else room)
        check_forward(plan, hidden, allowed)
    if problems:
        raise PlanError(problems)


def steps(
    planned: MergePlan, *, restart: bool = False, run_dir: str | None = None, memory: int, threads: int, workers: str,
    hidden: HiddenStates | None = None, fingerprint: Callable[[], Mapping[str, str] | None] = lambda: None,
) -> Generator[Stretch, None, MergeReport]:  # fmt: skip
    """A merge from its output being looked at to its being published. `memory` bytes are shared by `threads`.

    Intermediates lie beside the output, where every worker reaches them. `fingerprint` says, once units are done, that
    of workers with GPUs. Raises what `merger.api.merge` raises.
    """
    session = Session.open(planned, restart=restart, run_dir=run_dir)
    if session.done is not None and not needed(session.planned, result=False):
        return session.conclude_done()
    if session.done is None:
        check_steps(session, memory // threads, memory, hidden)
    with between(session.planned, session.destinations[0]) as made:
        for name, one in made.plans(result=session.done is None):
            report = yield from steps(
                one, restart=restart, run_dir=run_dir, memory=memory, threads=threads, workers=workers, hidden=hidden,
                fingerprint=fingerprint,
            )  # fmt: skip
            made.add(name, report.path)
        if session.done is not None:
            return session.conclude_done()
        session.planned = fill_gates(made.ready(), hidden)
        session.check(thread_bytes(session.planned, session.sinks, memory=memory, threads=threads))
        session.take()
        try:
            yield from stretches(session)
            done_by = fingerprint() if uses_gpu(session.planned) else None
            return session.finish(workers=workers, fingerprint=done_by)
        except BaseException as error:  # whatever ends the run, a stop too, the lease is given back
            session.diary.end(error, stopped=isinstance(error, StoppedError | GeneratorExit))
            failed = end_without_result(session, error)
            if failed is error:
                raise
            raise failed from error
