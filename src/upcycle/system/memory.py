"""The memory that the machine has left, and the peak memory of this process."""

import resource
import sys
from pathlib import Path

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_SECOND = ("memory.max", "memory.current", "file", "shmem")  # cgroup version 2
_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem")  # cgroup version 1


def available() -> int | None:
    """Return the bytes available without swapping, or None if the system does not tell.

    The limits of the control groups of this process, as in a container, are taken into account.
    """
    return min((n for n in (_of_machine(), _of_groups()) if n is not None), default=None)


def _of_machine() -> int | None:
    import psutil

    try:
        return int(psutil.virtual_memory().available)
    except (OSError, psutil.Error):
        return None


def _of_groups() -> int | None:
    """Return the bytes that the control groups of this process leave; None: no limit."""
    try:
        lines = [line.split(":", 2) for line in (_PROC / "self/cgroup").read_text().splitlines()]
    except OSError:
        lines = []
    second = next((path for _, controllers, path in lines if not controllers), "/")
    first = next((path for _, controllers, path in lines if "memory" in controllers.split(",")), "/")
    folders = [(folder, _SECOND) for folder in _upwards(_GROUPS, second)]
    folders += [(folder, _FIRST) for folder in _upwards(_GROUPS / "memory", first)]
    return min((n for folder, files in folders if (n := _left(folder, *files)) is not None), default=None)


def _upwards(root: Path, path: str) -> list[Path]:
    """Return the folders from `path` in `root` up to `root`.

    In a container the root is the group itself, without `path`.
    """
    own = root / path.lstrip("/")
    return [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]


def _left(folder: Path, limit: str, used: str, cache: str, shared: str) -> int | None:
    """Return the bytes left under the limit of one group.

    Cached files count as free, because they are evicted, but shared memory does not.
    """
    try:
        most, now = (int((folder / name).read_text()) for name in (limit, used))
        lines = (folder / "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in (line.split() for line in lines)}
    except (OSError, ValueError):  # the group does not exist, or its limit is "max"
        return None
    return max(0, most - now + stat.get(cache, 0) - stat.get(shared, 0))


def peak() -> int:
    """Return the peak memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
