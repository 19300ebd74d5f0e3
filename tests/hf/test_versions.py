"""transformers: the versions that are taken, and what importing `upcycle` does to it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from upcycle.errors import UpcycleError
from upcycle.hf import versions
from upcycle.system.progress import Unheard, reporting_to


class Heard(Unheard):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, sentence: str) -> None:
        self.warned.append(sentence)


@pytest.fixture
def heard():
    listener = Heard()
    with reporting_to(listener):
        yield listener.warned


def test_what_is_installed_was_tested(heard):
    versions.require()
    assert heard == []
    assert versions.OLDEST <= versions._release(version("transformers")) <= versions.NEWEST


@pytest.mark.parametrize("found", ["5.21.3", "4.57.0", "5.9"])
def test_an_older_one_is_refused(found, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda _: found)
    with pytest.raises(
        UpcycleError, match=rf"transformers {found} is older than 5\.22.*pip install --upgrade"
    ):
        versions.require()


@pytest.mark.parametrize("found", ["5.24.0", "6.0.0.dev0", "5.100.1"])
def test_a_newer_one_is_warned_about_until_a_person_accepts_it(found, monkeypatch, heard):
    monkeypatch.setattr(versions, "version", lambda _: found)
    versions.require()
    (said,) = heard
    assert said.startswith(f"transformers {found} is newer than 5.23, the newest that was tested")
    assert f"set {versions.ACCEPTED}={found}" in said
    heard.clear()
    monkeypatch.setenv(versions.ACCEPTED, found)
    versions.require()
    assert heard == []
    monkeypatch.setenv(versions.ACCEPTED, "5.23.9")  # the next release is another one
    versions.require()
    assert heard


@pytest.mark.parametrize("patch", ["5.22.0", "5.23.99"])
def test_patches_of_tested_ones_are_taken(patch, monkeypatch, heard):
    monkeypatch.setattr(versions, "version", lambda _: patch)
    versions.require()
    assert heard == []


def in_a_process(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_upcycle_imports_and_changes_no_other_library():
    said = in_a_process(
        "import sys; before = set(sys.modules)\n"
        "import upcycle\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(tops - set(sys.stdlib_module_names) - {'upcycle'}))\n"
    )
    assert said == "[]"


@pytest.mark.slow
def test_names_are_added_to_the_registry_of_transformers_and_nothing_else():
    """Whichever is imported first; classes come with the first config of ours, and torch with them."""
    look = (
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "def look(): return set(CONFIG_MAPPING._mapping), len(CONFIG_MAPPING._extra_content)\n"
    )
    first = f"{look}before, extra = look()\nimport upcycle\nafter, still = look()\n"
    first += "print(extra, still, *after - before)"
    later = f"import upcycle\n{look}after, extra = look()\nprint(extra, extra, *after)"
    one, other = in_a_process(first).split(), in_a_process(later).split()
    assert one[:2] == other[:2] == ["0", "0"]
    assert set(one[2:]) == {name for name in other[2:] if name.startswith("upcycled_")}
    assert "upcycled_llama" in one
    assert in_a_process(f"{look}import upcycle, sys\nprint('upcycle.hf.models' in sys.modules)") == "False"


@pytest.mark.slow
def test_an_old_transformers_can_still_be_imported():
    said = in_a_process(
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '4.0' if name == 'transformers' else real(name)\n"
        "import logging; logging.basicConfig(format='%(message)s', stream=__import__('sys').stdout)\n"
        "import upcycle\n"
        "import transformers.models.auto.configuration_auto as auto\n"
        "print(any(name.startswith('upcycled_') for name in auto.CONFIG_MAPPING._mapping))\n"
    )
    assert said.startswith("transformers 4.0 is older than 5.22")
    assert said.endswith("False")
