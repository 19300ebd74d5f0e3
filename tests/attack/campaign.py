"""A million damaged inputs and a hundred kills of each command: `make attack`.

    campaign.py [--cases N] [--minutes M] [--kills K] [--only WORD] [--json FILE]

The cases are shared between the targets as in the suite. Each target runs in a process of its own, so that
one that dies is a crash and not the end. The targets take turns. With --json the counts are kept, and the
next run goes on after the last case that they hold: a million adds up over as many runs as it takes. Prints a
table, and gives 1 if anything crashed in this run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import aims
import kills
import trial
from tally import Row, Tally, table
from workshop import Workshop, in_memory

import forked
from upcycle.system.signals import interrupting

_BATCH = 50  # cases between two signs of life
_MEMORY = 12 << 30  # bytes of address space that a target may take
_TURN = 20  # seconds of processor time of a target before the next one's turn
_KEEP = 10  # seconds between two writings of the counts
_KILLS = 5  # kills of a command between two writings of the counts


def damaged(row: Row, make: Callable[[], trial.Target], goal: int, seconds: float, tally: Tally) -> bool:
    """The next cases of one target, in a child process; whether the process ended well."""
    began, before = time.monotonic(), row.seconds
    kept, first = began, row.next
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if not child:
        ours.close()
        _child(make, theirs, range(first, goal), seconds)
    theirs.close()
    status = None
    try:
        while True:
            counts: trial.Counts = ours.recv()
            row.cases += counts.cases
            row.accepted += counts.accepted
            row.refused += counts.refused
            row.crashes += len(counts.crashes)
            row.said += [str(crash) for crash in counts.crashes if crash.said]
            row.seconds = before + time.monotonic() - began
            if time.monotonic() > kept + _KEEP:
                tally.keep()
                kept = time.monotonic()
    except EOFError:
        status = os.waitpid(child, 0)[1]
    finally:
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    row.seconds = before + time.monotonic() - began
    if status:
        row.crashes += 1
        row.said.append(
            f"{row.name}: the process ended with {os.waitstatus_to_exitcode(status)} after case {row.next}"
        )
        row.lost += min(_BATCH, goal - row.next)
    tally.keep()
    return not status


def _child(make: Callable[[], trial.Target], there: Connection, numbers: range, seconds: float) -> None:
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        target = make()
        end, turn = time.monotonic() + seconds, time.process_time() + _TURN
        while numbers and time.monotonic() < end and time.process_time() < turn:
            counts = trial.attack(target, numbers[:_BATCH], end - time.monotonic())
            there.send(counts)
            numbers = numbers[counts.cases :]
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        there.close()
        os._exit(code)


def killed(row: Row, server: forked.Server, times: int, folder: Path, tally: Tally) -> None:
    """Kill one command until it was started `times` times."""
    (folder / "shop").mkdir(parents=True)
    (folder / "arena").mkdir()
    shop, name = Workshop(folder / "shop"), row.name.removeprefix(KILL)
    while row.cases < times:
        began = time.monotonic()
        draw = random.Random(f"campaign {name} {row.cases}")
        arena = kills.Arena(shop, server, folder / "arena", draw)
        try:
            kills.KILLED[name](arena, min(_KILLS, times - row.cases))
        except AssertionError as error:
            row.crashes += 1
            row.said.append(f"{row.name}: {error}")
        row.cases += arena.started
        row.accepted += arena.killed
        row.refused += arena.started - arena.killed
        row.seconds += time.monotonic() - began
        tally.keep()
        if not arena.started:
            return


KILL = "SIGKILL: "


def shares(made: Mapping[str, aims.Aim]) -> dict[str, float]:
    """The part of all cases that a target takes: as in the suite, whose numbers follow what a case costs."""
    every = sum(aim.cases for aim in made.values())
    return {name: aim.cases / every for name, aim in made.items()}


def main() -> int:
    """The whole campaign, or as much of it as there is time for."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    asked.add_argument("--cases", type=int, default=1_000_000)
    asked.add_argument("--minutes", type=float, default=120, help="for damaged files, all targets together")
    asked.add_argument("--kills", type=int, default=100, help="of each command")
    asked.add_argument("--only", default="", help="targets whose name has this in it")
    asked.add_argument("--json", type=Path, help="where the counts are kept, and gone on from")
    given = asked.parse_args()
    tally = Tally(given.json)
    before = sum(row.crashes for row in tally.rows.values())
    with (
        interrupting(signal.SIGTERM),
        tempfile.TemporaryDirectory(
            prefix="upcycle-attack-", dir=in_memory(), ignore_cleanup_errors=True
        ) as at,
    ):
        goals = {
            n: max(1, round(given.cases * s)) for n, s in shares(aims.targets(Workshop(Path(at)))).items()
        }
        wanted = {name: goal for name, goal in goals.items() if given.only in name}
        _damage_all(tally, wanted, given.minutes * 60, Path(at))
        damage = [tally.row(name) for name in wanted]
        print(table(damage), flush=True)
        deaths = []
        if given.kills and not given.only:
            server = forked.Server()
            for name in kills.KILLED:
                deaths.append(tally.row(KILL + name))
                killed(deaths[-1], server, given.kills, Path(at) / f"kills {name}", tally)
                _show(deaths[-1])
            server.close()
    if deaths:
        print(f"\n{table(deaths, head='command | started | killed | ended before | failures')}")
    tally.keep()
    tried = sum(row.cases for row in damage)
    print(f"\n{tried:,} of {sum(wanted.values()):,} cases so far; the same command goes on from {given.json}")
    return 1 if sum(row.crashes for row in tally.rows.values()) > before else 0


def _damage_all(tally: Tally, wanted: Mapping[str, int], seconds: float, folder: Path) -> None:
    """Give the targets turns until all of their cases are done or the time is over."""
    end, dead = time.monotonic() + seconds, set()
    while left := [n for n, goal in wanted.items() if tally.row(n).next < goal and n not in dead]:
        for place, name in enumerate(left):
            if (rest := end - time.monotonic()) <= 0:
                return
            row = tally.row(name)
            share = rest / (len(left) - place)
            # Each target has inputs of its own: torch's threads do not live through a fork.
            (own := folder / "target").mkdir()
            make = aims.targets(Workshop(own))[name]
            if not damaged(row, make, wanted[name], share, tally):
                dead.add(name)
            shutil.rmtree(own, ignore_errors=True)
            _show(row)


def _show(row: Row) -> None:
    print(f"{row.name}: {row.cases:,} cases, {row.crashes} crashes, {row.seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
