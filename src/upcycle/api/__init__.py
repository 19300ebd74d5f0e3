"""The public functions: `upcycle.advise`, `calibrate`, `evaluate`, `foretell`, `inspect`, `report`, `train`,
`translate`.

Each file holds one function. It takes paths as text or `Path` and settings as keywords, and returns a frozen
dataclass whose `as_dict()` is what `--json` prints. `convert`, `export`, `load`, `plan` and `verify` are
defined in their own packages; `convert` returns the blueprint and `load` a model. The command line calls
these functions and prints their results.
"""
