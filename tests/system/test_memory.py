"""Memory that is left: what the machine has, or the control group of a container."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from upcycle.system import memory

GIGABYTE = 1 << 30


def group(folder: Path, names: tuple[str, str, str, str], most: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached + 7}\n{names[3]} 7\n")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Files of a system in which this process is in the given control groups; the root of the groups."""

    def make(groups: str) -> Path:
        (tmp_path / "proc" / "self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
        monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
        monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
        return tmp_path / "cgroup"

    return make


def test_the_tightest_group_counts(system):
    """Version 2: limits of the group and of all above it; cached files make room."""
    root = system("0::/a/b\n")
    group(root / "a", memory._SECOND, str(8 * GIGABYTE), 3 * GIGABYTE, 1 * GIGABYTE)
    group(root / "a" / "b", memory._SECOND, "max", 3 * GIGABYTE, 0)
    assert memory.available() == 6 * GIGABYTE
    group(root / "a" / "b", memory._SECOND, str(4 * GIGABYTE), 3 * GIGABYTE, 0)
    assert memory.available() == GIGABYTE
    group(root / "a" / "b", memory._SECOND, str(2 * GIGABYTE), 3 * GIGABYTE, 0)
    assert memory.available() == 0


def test_in_a_container_the_root_is_the_group(system):
    group(system("0::/docker/1234\n"), memory._SECOND, str(2 * GIGABYTE), GIGABYTE, 0)
    assert memory.available() == GIGABYTE


def test_version_1_and_none_at_all(system):
    root = system("7:cpu,cpuacct:/b\n6:memory:/a\n")
    assert memory.available() is None
    group(root / "memory" / "a", memory._FIRST, str(5 * GIGABYTE), GIGABYTE, 0)
    assert memory.available() == 4 * GIGABYTE


def test_the_smaller_of_both_is_what_is_there(monkeypatch):
    monkeypatch.setattr(memory, "_of_machine", lambda: 5)
    monkeypatch.setattr(memory, "_of_groups", lambda: 3)
    assert memory.available() == 3
    monkeypatch.setattr(memory, "_of_groups", lambda: None)
    assert memory.available() == 5
