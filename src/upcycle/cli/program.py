"""The program with all its commands."""

from __future__ import annotations

import sys

from tyro.conf import FlagCreatePairsOff

import upcycle
from upcycle.cli import building, running, showing  # noqa: F401, which add their commands
from upcycle.cli.bars import Bars
from upcycle.cli.options import app
from upcycle.system.progress import reporting_to


def run(args: list[str] | None) -> None:
    """Run the command in `args`, or in the arguments of the process."""
    if (sys.argv[1:] if args is None else args) == ["--version"]:
        print(f"upcycle {upcycle.__version__}")
        return
    with reporting_to(Bars()):
        app.cli(
            prog="upcycle",
            description="Turn a trained dense checkpoint into a Mixture of Experts, and prove it. "
            "`upcycle --version` says which upcycle this is.",
            args=args,
            config=(FlagCreatePairsOff,),
        )
