"""Who looks on while a run is under way: whoever is told of events, and a timeline where one was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from merger.clock import Span
from merger.events import Announce, Event, say
from merger.timeline import TimelineFile


@dataclass(slots=True)
class Watch:
    """Passes on what a loop has to tell. Called from the loop's thread alone."""

    timeline: TimelineFile | None = None
    told: list[Announce] = field(default_factory=lambda: [say])

    def event(self, event: Event) -> None:
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

    def also(self, announce: Announce) -> Watch:
        """The same, with one more who is told."""
        return Watch(self.timeline, [*self.told, announce])
