"""How much memory the machine has left, and how much this process took."""

import resource
import sys
from pathlib import Path


def available() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    known = [room for room in (_of_machine(), _of_groups()) if room is not None]
    return min(known) if known else None


def _of_machine(proc: Path = Path("/proc")) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _of_groups(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the control groups of this process, as a container has them, leave to it; None without a limit."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _FIRST if controllers else _SECOND
        base = root / "memory" if controllers else root
        inside = (base / path.lstrip("/"), *(base / path.lstrip("/")).parents)
        # In a container the group's own path may not be there, and its root is the group.
        folders = [folder for folder in inside if folder == base or base in folder.parents]
        found += [room for folder in folders if (room := _left(folder, *files)) is not None]
    return min(found) if found else None


_SECOND = (
    "memory.max",
    "memory.current",
    "inactive_file",
)  # of version 2, and of version 1 of control groups
_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left(folder: Path, limit: str, used: str, cached: str) -> int | None:
    """Bytes under the limit of one group; files that it caches can make room."""
    try:
        most, now = (int((folder / name).read_text()) for name in (limit, used))
    except (OSError, ValueError):  # "max": no limit
        return None
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        now -= int(stat.get(cached, 0))
    except (OSError, ValueError):
        pass
    return max(0, most - now)


def peak() -> int:
    """Bytes that this process held at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
