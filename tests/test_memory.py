"""Memory that is left: what the machine has, or the control group of a container."""

from __future__ import annotations

from pathlib import Path

from upcycle import memory

GIGABYTE = 1 << 30


def group(folder: Path, names: tuple[str, str, str], most: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def proc(folder: Path, groups: str) -> Path:
    (folder / "self").mkdir(parents=True)
    (folder / "self" / "cgroup").write_text(groups)
    return folder


def test_the_tightest_group_counts(tmp_path):
    """Version 2: limits of the group and of all above it; cached files make room."""
    root = tmp_path / "cgroup"
    group(root / "a", memory._SECOND, str(8 * GIGABYTE), 3 * GIGABYTE, 1 * GIGABYTE)
    group(root / "a" / "b", memory._SECOND, "max", 3 * GIGABYTE, 0)
    where = proc(tmp_path / "proc", "0::/a/b\n")
    assert memory._of_groups(where, root) == 6 * GIGABYTE
    group(root / "a" / "b", memory._SECOND, str(4 * GIGABYTE), 3 * GIGABYTE, 0)
    assert memory._of_groups(where, root) == GIGABYTE
    group(root / "a" / "b", memory._SECOND, str(2 * GIGABYTE), 3 * GIGABYTE, 0)
    assert memory._of_groups(where, root) == 0


def test_in_a_container_the_root_is_the_group(tmp_path):
    root = tmp_path / "cgroup"
    group(root, memory._SECOND, str(2 * GIGABYTE), GIGABYTE, 0)
    assert memory._of_groups(proc(tmp_path / "proc", "0::/docker/1234\n"), root) == GIGABYTE


def test_version_1_and_none_at_all(tmp_path):
    root = tmp_path / "cgroup"
    group(root / "memory" / "a", memory._FIRST, str(5 * GIGABYTE), GIGABYTE, 0)
    where = proc(tmp_path / "proc", "7:cpu,cpuacct:/a\n6:memory:/a\n")
    assert memory._of_groups(where, root) == 4 * GIGABYTE
    assert memory._of_groups(proc(tmp_path / "cpu", "7:cpu:/a\n"), root) is None
    assert memory._of_groups(tmp_path / "nowhere", root) is None
    assert memory._of_machine(tmp_path / "nowhere") is None


def test_the_smaller_of_both_is_what_is_there(monkeypatch):
    monkeypatch.setattr(memory, "_of_machine", lambda: 5)
    monkeypatch.setattr(memory, "_of_groups", lambda: 3)
    assert memory.available() == 3
    monkeypatch.setattr(memory, "_of_groups", lambda: None)
    assert memory.available() == 5
