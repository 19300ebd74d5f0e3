"""The versions of transformers that this package was tested with.

A version older than `OLDEST` is refused, because names that we import are missing in it. A version newer than
`NEWEST` gives one warning: private parts may have changed, but most releases change none that we use, and a
user must be able to take a fix of transformers without waiting for us. A user who has checked a version sets
`UPCYCLE_TRANSFORMERS` to it, which silences the warning for that version.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version

from upcycle.errors import UpcycleError
from upcycle.system import progress

OLDEST = (5, 22)
NEWEST = (5, 23)
ACCEPTED = "UPCYCLE_TRANSFORMERS"  # an environment variable: the version that the user has accepted


def require() -> None:
    """Raise `UpcycleError` if transformers is older than `OLDEST`; warn if it is newer than `NEWEST`."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return  # Python's own error appears when transformers is imported
    release = _release(found)
    if release < OLDEST:
        raise UpcycleError(
            f"transformers {found} is older than {_written(OLDEST)}, the oldest that works; "
            f"pip install --upgrade transformers"
        )
    if release > NEWEST and os.environ.get(ACCEPTED) != found:
        progress.warn(
            f"transformers {found} is newer than {_written(NEWEST)}, the newest that was tested. If "
            f"something breaks, pip install 'transformers<{NEWEST[0]}.{NEWEST[1] + 1}'; if all is well, set "
            f"{ACCEPTED}={found} and this is not said again"
        )


def _release(found: str) -> tuple[int, ...]:
    """Return the major and minor version."""
    return tuple(int(n) for n in re.findall(r"\d+", found)[:2])


def _written(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
