"""Runs another program's script, in which transformers runs no code from a model's folder or from the hub.

A process of its own runs this file: `python -P untrusting.py SCRIPT ARGUMENT...`. The script sees its own
name, arguments and folder, as if Python had been started with it. It may ask for `trust_remote_code=True`,
but it does not get it. If transformers has a class of its own, the script gets that one, and else an error.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any, NoReturn

NEEDS_CODE = "the model needs code of its own"  # begins the error; who started the script looks for it


def distrust() -> None:
    """Make transformers refuse the code of models in this process, whatever its callers ask for."""
    from transformers import dynamic_module_utils as gate

    resolve = gate.resolve_trust_remote_code

    def resolved(trust_remote_code: Any, *others: Any, **named: Any) -> Any:
        try:
            return resolve(False, *others, **named)
        except ValueError:
            _refuse()

    # Auto classes import the first by its name, and only when they are used for the first time. The second
    # fetches files of code; whoever executes one calls it before, and looks it up in this module.
    gate.resolve_trust_remote_code = resolved
    gate.get_cached_module_file = _refuse


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(NEEDS_CODE)


def main(script: str, *arguments: str) -> None:
    """Run the script as Python would."""
    distrust()
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.realpath(script)))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
