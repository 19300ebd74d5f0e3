"""The library that a person calls: `upcycle.advise`, `calibrate`, `evaluate`, `inspect`, `report`, `train`.

Each file is one function. It takes paths as text or `Path` and settings as keywords, and gives a frozen
dataclass with `as_dict()`, which is what `--json` prints. `export`, `plan` and `verify` are such
functions in their own rooms; `convert` gives the blueprint there, and `load` a model. The command line calls
these and draws what they give.
"""
