"""The file that has the results of an experiment: one result for each run.

Several processes may add to the same file.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.system import whole_file

Result = dict[str, Any]
Key = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class ResultsFile:
    """A JSON file with the results of runs; a result is named by the values of some of its entries."""

    path: Path
    named_by: Sequence[str]
    order: Callable[[Key], Any]  # the runs are sorted by this; equal ones stay in the order of their adding

    def known(self) -> dict[Key, Result]:
        """Return the recorded results by their names, in order; none if there is no file."""
        runs = json.loads(self.path.read_text())["runs"] if self.path.exists() else []
        return self._in_order(runs)

    def add(self, about: Mapping[str, Any], *results: Result) -> None:
        """Add results to those that the file has now, and write `about` beside them; the others stay."""
        with self._locked():
            whole_file.clear_of(self.path)
            runs = [*self._in_order([*self.known().values(), *results]).values()]
            whole_file.write_text(self.path, json.dumps({**about, "runs": runs}, indent=1) + "\n")

    def gather(
        self,
        jobs: Sequence[Key],
        go: Callable[..., Result],
        parallel: int,
        about: Mapping[str, Any],
    ) -> None:
        """Call `go` for the jobs that the file does not have, `parallel` at once, and add each result.

        A result is added when its job ends. If a job fails, its error is raised when those before it have
        ended; those that run by then end too and add their results, and no others begin.
        """

        def run(job: Key) -> None:
            if job not in self.known():  # another process may have added it meanwhile
                self.add(about, go(*job))

        with ThreadPoolExecutor(parallel) as pool:
            for _ in pool.map(run, jobs):
                pass

    def _in_order(self, results: Iterable[Result]) -> dict[Key, Result]:
        """Return results by their names, in order; of two with one name, the later one."""
        named = {tuple(result[entry] for entry in self.named_by): result for result in results}
        return {key: named[key] for key in sorted(named, key=self.order)}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Wait until no other process and no other thread adds to the file. The lock file stays there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
