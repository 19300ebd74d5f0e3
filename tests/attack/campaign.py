"""A million damaged inputs and a hundred kills of each command: `make attack`.

    campaign.py [--cases N] [--minutes M] [--kills K] [--only WORD] [--json FILE]

The cases are shared between the targets as in the suite, and the time evenly. Each target runs in a process
of its own, so that one that dies is a crash and not the end. Prints a table, and gives 1 where anything
crashed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import aims
import kills
import trial
from workshop import Workshop

import forked

_BATCH = 50  # cases between two signs of life
_MEMORY = 12 << 30  # bytes of address space that a target may take


@dataclass
class Row:
    """What came of a target, or of the kills of a command."""

    name: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: int = 0
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)


def damaged(shop: Workshop, name: str, make: Callable[[], trial.Target], cases: int, seconds: float) -> Row:
    """The cases of one target, in a child process."""
    row, began = Row(name), time.monotonic()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if not child:
        ours.close()
        _child(make, theirs, cases, seconds)
    theirs.close()
    try:
        while True:
            counts: trial.Counts = ours.recv()
            row.cases += counts.cases
            row.accepted += counts.accepted
            row.refused += counts.refused
            row.crashes += len(counts.crashes)
            row.said += [str(crash) for crash in counts.crashes if crash.said]
    except EOFError:
        _, status = os.waitpid(child, 0)
    if status:
        row.crashes += 1
        row.said.append(
            f"{name}: the process ended with {os.waitstatus_to_exitcode(status)} after case {row.cases}"
        )
    row.seconds = time.monotonic() - began
    return row


def _child(make: Callable[[], trial.Target], there: Connection, cases: int, seconds: float) -> None:
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        target, number = make(), 0
        end = time.monotonic() + seconds
        while number < cases and time.monotonic() < end:
            batch = range(number, min(cases, number + _BATCH))
            counts = trial.attack(target, batch, end - time.monotonic())
            there.send(counts)
            number += counts.cases
        code = 0
    finally:
        there.close()
        os._exit(code)


def killed(shop: Workshop, server: forked.Server, name: str, times: int, folder: Path) -> Row:
    """The kills of one command."""
    row, began = Row(f"SIGKILL: {name}"), time.monotonic()
    arena = kills.Arena(shop, server, folder, random.Random(f"campaign {name}"))
    try:
        kills.KILLED[name](arena, times)
    except AssertionError as error:
        row.crashes, row.said = 1, [f"{row.name}: {error}"]
    row.cases, row.accepted, row.refused = arena.started, arena.killed, arena.started - arena.killed
    row.seconds = time.monotonic() - began
    return row


def shares(made: Mapping[str, aims.Aim]) -> dict[str, float]:
    """The part of all cases that a target takes: as in the suite, whose numbers follow what a case costs."""
    every = sum(aim.cases for aim in made.values())
    return {name: aim.cases / every for name, aim in made.items()}


def table(rows: list[Row], *, head: str = "target | cases | accepted | refused | crashes") -> str:
    """The rows as Markdown, with their sum."""
    total = Row(
        "all",
        *(sum(getattr(row, key) for row in rows) for key in ("cases", "accepted", "refused", "crashes")),
    )
    lines = [f"| {head} |", "|---|--:|--:|--:|--:|"]
    for row in [*rows, total]:
        lines.append(f"| {row.name} | {row.cases:,} | {row.accepted:,} | {row.refused:,} | {row.crashes:,} |")
    return "\n".join(lines)


def main() -> int:
    """The whole campaign."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--cases", type=int, default=1_000_000)
    asked.add_argument("--minutes", type=float, default=120, help="for damaged files, all targets together")
    asked.add_argument("--kills", type=int, default=100, help="of each command")
    asked.add_argument("--only", default="", help="targets whose name has this in it")
    asked.add_argument("--json", type=Path, help="where the counts go as JSON")
    given = asked.parse_args()
    damage, deaths = [], []
    with tempfile.TemporaryDirectory(prefix="upcycle-attack-") as made_here:
        folder = Path(made_here)
        parts = shares(aims.targets(Workshop(folder)))
        for number, (name, share) in enumerate(parts.items()):
            if given.only not in name:
                continue
            # Each target has inputs of its own: torch's threads do not live through a fork.
            (place := folder / str(number)).mkdir()
            shop = Workshop(place)
            make = aims.targets(shop)[name]
            cases = max(1, round(given.cases * share))
            row = damaged(shop, name, make, cases, given.minutes * 60 / len(parts))
            damage.append(row)
            _show(row)
        print(table(damage), flush=True)
        _keep(given.json, damage)
        if given.kills and not given.only:
            server = forked.Server()
            for name in kills.KILLED:
                (place := folder / f"kills {name}").mkdir()
                (place / "shop").mkdir()
                (place / "arena").mkdir()
                deaths.append(killed(Workshop(place / "shop"), server, name, given.kills, place / "arena"))
                _show(deaths[-1])
            server.close()
    if deaths:
        print(f"\n{table(deaths, head='command | started | killed | ended before | failures')}")
    _keep(given.json, damage + deaths)
    return 1 if any(row.crashes for row in damage + deaths) else 0


def _keep(path: Path | None, rows: list[Row]) -> None:
    if path is not None:
        path.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")


def _show(row: Row) -> None:
    print(f"{row.name}: {row.cases:,} cases, {row.crashes} crashes, {row.seconds:.0f} s", file=sys.stderr)
    for said in row.said:
        print(said, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
