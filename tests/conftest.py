from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import forked

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores; torch reads it when imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collections, which take a seventh of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


SHARED = Path(os.environ.get("UPCYCLE_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes a tiny dense checkpoint once per session and set of arguments."""
    from tiny import make_dense

    made: dict[object, Path] = {}

    def make(model_type: str, **changes: object) -> Path:
        key = (model_type, repr(sorted(changes.items())))
        if key not in made:
            made[key] = make_dense(tmp_path_factory.mktemp("dense") / model_type, model_type, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def server() -> forked.Server:
    """A server that forks command lines of `upcycle`."""
    return forked.shared()


@pytest.fixture
def on_screen() -> Iterator[None]:
    """Functions of the library report as they do under the command line: on standard error."""
    from upcycle.cli.bars import Bars
    from upcycle.system.progress import reporting_to

    with reporting_to(Bars()):
        yield


@pytest.fixture(scope="session")
def stories() -> Path:
    """A really trained Llama of 260,032 parameters."""
    folder = SHARED / "real" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"the trained checkpoint stories260k is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """A text that stories260k knows."""
    text = SHARED / "real" / "text" / "tinystories.txt"
    if not text.is_file():
        pytest.skip(f"the text tinystories.txt is not at {text}")
    return text


@pytest.fixture(scope="session")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with a tokenizer, and stories for it in a file: real ones, or of the same shape where they
    are not there. It lies near what tests make, so that a provenance says the way to it."""
    folder = tmp_path_factory.mktemp("trainable")
    real, text = SHARED / "real" / "stories260k", SHARED / "real" / "text" / "tinystories.txt"
    if real.is_dir() and text.is_file():
        (folder / "text.txt").write_text(text.read_text()[:120_000])
        return Path(shutil.copytree(real, folder / real.name)), folder / "text.txt"
    from tiny import make_bytes_tokenizer, make_dense

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5}
    made = make_dense(folder / "dense", "llama", max_position_embeddings=512, **sizes)
    make_bytes_tokenizer(made)
    source = Path(pytest.__file__).parent.parent / "_pytest"
    texts = [path.read_text() for path in sorted(source.glob("*.py"))]
    (folder / "text.txt").write_text("<|endoftext|>".join(texts)[:120_000])
    return made, folder / "text.txt"
