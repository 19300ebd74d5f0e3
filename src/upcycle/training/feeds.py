"""The data of all stages of a run: one feed for each data table, which goes on where it was left.

A source that several tables have goes on as well, so that no row comes twice before all have come once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from upcycle.data.corpus import Data
from upcycle.data.feeding import Feed
from upcycle.data.readings import Reading, Readings, fresh
from upcycle.errors import UpcycleError
from upcycle.training.course import Course, Leg
from upcycle.training.run import Run


class Feeds:
    """The feeds of a course, with a position that can be saved."""

    def __init__(self, course: Course, make: Callable[[Run, tuple[Reading, ...]], Feed]) -> None:
        first: dict[Data, Leg] = {}
        for leg in course.legs:
            first.setdefault(leg.run.data, leg)
        self._kinds, read = list(first), Readings()
        self._feeds = [
            make(leg.run, fresh(len(data.sources)) if leg.anew else read.of(data))
            for data, leg in first.items()
        ]

    def of(self, leg: Leg) -> Feed:
        """Return the feed of a stage."""
        return self._feeds[self._kinds.index(leg.run.data)]

    def state(self) -> dict[str, Any]:
        """Return the positions as JSON; if there is one feed, its own."""
        states = [feed.state() for feed in self._feeds]
        return states[0] if len(states) == 1 else {"feeds": states}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to saved positions. Raises `UpcycleError` if the data has changed since."""
        states = [state] if len(self._feeds) == 1 else state.get("feeds")
        if not isinstance(states, list) or len(states) != len(self._feeds):
            raise UpcycleError(
                "what the checkpoint says of its place in the data is damaged; delete its folder"
            )
        for feed, own in zip(self._feeds, states, strict=True):
            feed.restore(own)
