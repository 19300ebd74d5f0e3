"""The data of all stages of a run: one feed for each data table, which goes on where it was left.

A source that several tables have goes on as well, so that no row comes twice before all have come once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from upcycle.data.corpus import Data, digest_of_tokenizer
from upcycle.data.feeding import Feed
from upcycle.data.readings import Reading, Readings, fresh
from upcycle.data.stamps import Stamp
from upcycle.errors import UpcycleError
from upcycle.system import progress
from upcycle.tasks import Task
from upcycle.training import together
from upcycle.training.course import Course, Leg
from upcycle.training.parallel import Ranks
from upcycle.training.run import Run
from upcycle.training.start import Start


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

    @classmethod
    def opened(cls, course: Course, task: Task, begun: Start, here: Ranks) -> Feeds:
        """Open the data of all stages. Raises `UpcycleError` on all ranks if they see different data.

        The first rank prepares the files, and checks those that are there. The others wait, and check a file
        only if they do not see the one that it has checked. So each compares the hashes of what it reads.
        Tokenizers of the hub are compared by now, because each rank has fetched them.
        """
        feeds: Feeds | None = None
        reason: str | None = None

        def made(checked: Mapping[str, Stamp]) -> Feeds:
            def feed(run: Run, readings: tuple[Reading, ...]) -> Feed:
                return task.feed(replace(run.feeding(task, readings), checked=checked), begun.subject)

            return cls(course, feed)

        def of_first() -> dict[str, Stamp]:
            nonlocal feeds
            feeds = made({})
            return feeds.checked()

        checked = together.of_first(of_first, here)
        if not here.first:
            with progress.reporting_to(progress.UNHEARD):  # the first one says it for all
                feeds, reason = together.tried(lambda: made(checked), here.world)
        together.refuse_different(reason, [], here)
        words = together.by_each(lambda: _tokenizers(course), here)
        together.refuse_different(None, [words, feeds.prints() if feeds else {}], here)
        assert feeds is not None
        return feeds

    def of(self, leg: Leg) -> Feed:
        """Return the feed of a stage."""
        return self._feeds[self._kinds.index(leg.run.data)]

    def state(self) -> dict[str, Any]:
        """Return the positions as JSON; if there is one feed, its own."""
        states = [feed.state() for feed in self._feeds]
        return states[0] if len(states) == 1 else {"feeds": states}

    def prints(self) -> dict[str, str]:
        """Return by what the data is known again, by the names of its sets for a user."""
        found: dict[str, list[Any]] = {}
        for feed in self._feeds:
            for name, known in feed.known():
                found.setdefault(f"{name} of the data", []).append(known)
        return {name: json.dumps(known, sort_keys=True) for name, known in found.items()}

    def checked(self) -> dict[str, Stamp]:
        """Return the stamps of the prepared files that another process need not check again."""
        return {path: stamp for feed in self._feeds for path, stamp in feed.checked().items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to saved positions. Raises `UpcycleError` if the data has changed since."""
        states = [state] if len(self._feeds) == 1 else state.get("feeds")
        if not isinstance(states, list) or len(states) != len(self._feeds):
            raise UpcycleError(
                "what the checkpoint says of its place in the data is damaged; delete its folder"
            )
        for feed, own in zip(self._feeds, states, strict=True):
            feed.restore(own)


def _tokenizers(course: Course) -> dict[str, str]:
    """Return the digests of tokenizers on the hub, by their names for a user; files in folders are compared
    before (`agreement.py`)."""
    named = {leg.run.data.tokenizer for leg in course.legs}
    return {
        f"tokenizer {name}": digest_of_tokenizer(name)
        for name in named
        if name is not None and not Path(name).is_dir()
    }
