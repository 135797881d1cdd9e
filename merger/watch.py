"""Who looks on while a run is under way: whoever is told of events, and a timeline where one was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from merger.clock import Span
from merger.events import Announce, Event, say
from merger.timeline import TimelineFile


@dataclass(slots=True)
class Watch:
    """Passes on what a loop has to tell. Called from the loop's thread alone."""

    timeline: TimelineFile | None = None
    told: list[Announce] = field(default_factory=lambda: [say])
    run: str = ""
    """What the events of one merge are known by: the beginning of its plan's digest."""

    def event(self, event: Event) -> None:
        if self.run and "run" not in event.facts:
            event = replace(event, facts={"run": self.run, **event.facts})
        for announce in self.told:
            announce(event)
        if self.timeline is not None:
            self.timeline.mark(event)

    def spans(self, worker: int, spans: Iterable[Span], *, dropped: int = 0) -> None:
        if self.timeline is not None:
            self.timeline.add(worker, spans, dropped=dropped)

    @property
    def draws(self) -> bool:
        """Whether spans are wanted."""
        return self.timeline is not None

    def also(self, announce: Announce, *, run: str = "") -> Watch:
        """The same, with one more who is told."""
        return Watch(self.timeline, [*self.told, announce], run or self.run)
