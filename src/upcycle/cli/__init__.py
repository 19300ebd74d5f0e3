"""The command line: `upcycle plan | advise | convert | verify | calibrate | train | ...`.

Results go to standard output, progress and errors to standard error. Exit code 0: done; 1: verify found
that a promise does not hold; 2: a mistake in what was given; 3: a fault of this program; 130: interrupted.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import sys
import traceback

from tyro.conf import FlagCreatePairsOff

from upcycle.cli import building, running, showing  # noqa: F401, which add their commands
from upcycle.cli.options import app
from upcycle.errors import UpcycleError


def main(args: list[str] | None = None) -> None:
    """The console script."""
    try:
        app.cli(
            prog="upcycle",
            description="Turn a trained dense checkpoint into a Mixture of Experts, and prove it.",
            args=args,
            config=(FlagCreatePairsOff,),
        )
    except UpcycleError as error:
        print(f"upcycle: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "upcycle: interrupted; convert and train go on with --resume, calibrate as it was started",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        print(
            f"upcycle: error: {error.filename or 'input or output'}: {error.strerror or error}",
            file=sys.stderr,
        )
        sys.exit(2)
    except Exception:  # never 1, which says that a promise does not hold
        traceback.print_exc()
        print("upcycle: error: this is a fault of upcycle; please report what is above", file=sys.stderr)
        sys.exit(3)
