"""How much memory the machine has left, and how much this process took."""

import resource
import sys
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_FILES = (  # limit, use, statistics, and their key of file cache: of version 2, and of version 1
    ("memory.max", "memory.current", "memory.stat", "file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_cache"),
)


def available() -> int | None:
    """Bytes that can be had without swapping, of the machine and of the container; None where the system does
    not say."""
    return min((n for n in (_of_machine(), _of_container()) if n is not None), default=None)


def _of_container() -> int | None:
    """What the limit on this process's group leaves; None where there is none. File cache gives way."""
    for folder in (_GROUPS, _GROUPS / "memory"):
        for limit, used, statistics, cache in _FILES:
            try:
                most, now = (int((folder / name).read_text()) for name in (limit, used))
                lines = (line.split() for line in (folder / statistics).read_text().splitlines())
                return max(0, most - now + next(int(n) for key, n in lines if key == cache))
            except (OSError, ValueError, StopIteration):
                continue
    return None


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def peak() -> int:
    """Bytes that this process held at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
