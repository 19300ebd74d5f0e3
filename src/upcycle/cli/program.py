"""The program with all its commands."""

from __future__ import annotations

from tyro.conf import FlagCreatePairsOff

from upcycle.cli import building, running, showing  # noqa: F401, which add their commands
from upcycle.cli.options import app


def run(args: list[str] | None) -> None:
    """Run the command that `args`, or those of the process, name."""
    app.cli(
        prog="upcycle",
        description="Turn a trained dense checkpoint into a Mixture of Experts, and prove it.",
        args=args,
        config=(FlagCreatePairsOff,),
    )
