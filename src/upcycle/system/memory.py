"""How much memory the machine has left, and how much this process took."""

import resource
import sys
from pathlib import Path

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_SECOND = ("memory.max", "memory.current", "file", "shmem")  # of version 2 of control groups
_FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem")  # of version 1


def available() -> int | None:
    """Bytes that can be had without swapping, of the machine and of the control groups that this process is
    in, as a container has them; None where the system does not say."""
    return min((n for n in (_of_machine(), _of_groups()) if n is not None), default=None)


def _of_machine() -> int | None:
    import psutil

    try:
        return int(psutil.virtual_memory().available)
    except (OSError, psutil.Error):
        return None


def _of_groups() -> int | None:
    """What the limits of the groups of this process, and of all above them, leave; None without a limit."""
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
    """The folders from `path` in `root` up to it. In a container the root is the group, without `path`."""
    own = root / path.lstrip("/")
    return [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]


def _left(folder: Path, limit: str, used: str, cache: str, shared: str) -> int | None:
    """Bytes under the limit of one group; cached files give way, and memory that is shared does not."""
    try:
        most, now = (int((folder / name).read_text()) for name in (limit, used))
        lines = (folder / "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in (line.split() for line in lines)}
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    return max(0, most - now + stat.get(cache, 0) - stat.get(shared, 0))


def peak() -> int:
    """Bytes that this process held at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
