"""The model card: README.md of an upcycled checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import upcycle
from upcycle.blueprints.blueprint import Blueprint
from upcycle.blueprints.cost import Plan, plan_of
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.conversion.plain import code, plain
from upcycle.conversion.provenance import published
from upcycle.targets import Target, dense_snippet


def how_to_load(target: Target | None, config: Mapping[str, Any], architecture: str) -> str:
    """Return Python code, in a fence, that opens a target with this config, or the class `architecture`."""
    code = target.snippet(config) if target else dense_snippet(architecture)
    return f"```python\n{code}```\n"


def _state(built: Blueprint) -> str:
    """Say whether the model computes what the dense model does, and how a narrower dtype changes that."""
    source = f"the {built.dense.called} model"
    if not built.preserves_function:
        return f"Untrained since, and it does not compute what {source} computes: train it before use."
    said = f"Untrained since: it computes what {source} computes"
    if not (narrowed := built.narrowed):
        return f"{said}."
    return (
        f"{said}, once that is rounded to {narrowed} as this checkpoint is. The rounding itself changes the "
        f"output: `upcycle verify` measures how far it is from {source} as it was stored."
    )


def made_from(checkpoints: Sequence[Checkpoint]) -> str:
    """Return a list of the checkpoints that the tensors come from, as text."""
    *rest, last = [code(opened.name) for opened in checkpoints]
    return f"checkpoints {', '.join(rest)} and {last}" if rest else f"checkpoint {last}"


def _counts(plan: Plan) -> str:
    """Return parameters and FLOPs of the source, of the narrower dense model (if any), and of the result."""
    heads, parameters, active, flops = zip(*plan.columns, strict=True)
    rows = [
        ["", *heads],
        ["---"] * (len(heads) + 1),
        ["parameters", *(f"{n:,}" for n in parameters)],
        ["active parameters per token", *(f"{n:,}" for n in active)],
        ["FLOPs per token (forward, matrix products)", *(f"{n:,}" for n in flops)],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("|  |", "| |")


def _public(value: Any, out: Path) -> Any:
    """Return a recipe's table with each absolute path in the words that `published` has for it."""
    if isinstance(value, Mapping):
        return {key: _public(each, out) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_public(each, out) for each in value)
    absolute = isinstance(value, str) and Path(value).is_absolute()
    return published(Path(value), out) if absolute else value


def _warnings(built: Blueprint, plan: Plan, out: Path) -> str:
    """Return the warnings of a plan as a list, without the absolute paths of checkpoints."""
    folders = {opened.folder for opened in built.checkpoints if opened.folder.is_absolute()}
    found = "\0".join(plan.warnings)
    for folder in sorted(folders, key=lambda path: len(str(path)), reverse=True):  # one may begin another
        found = found.replace(str(folder), published(folder, out))
    return "".join(f"- {plain(said)}\n" for said in found.split("\0") if said) or "- none\n"


def render(built: Blueprint, out: Path) -> str:
    """Return Markdown that says what the folder `out` is, what it was made from, and how to load it.

    It holds no path of the machine that it was made on, because a card is published.
    """
    plan, recipe = plan_of(built), built.recipe.as_table()
    moe = plan.num_moe_layers > 0
    public = _public(recipe, out)
    seen = "" if public == recipe else "\nPaths are seen from this folder; `~` is a home folder.\n"
    return f"""---
library_name: transformers
tags: [{"mixture-of-experts, upcycled" if moe else "upcycle"}]
---

# {plain(built.source.name)}, {"upcycled" if plan.kind == "MoE" else plan.kind}

A `{plan.target}` made from the {plan.source_kind} `{plan.family}` {made_from(built.checkpoints)} with
`upcycle` {upcycle.__version__}, {built.target.origin(built.recipe)}.
{_state(built)}

{_counts(plan)}

It is {plain(plan.made)}.

## Load

{how_to_load(built.target, built.config, built.target.architecture)}
## What to know

{_warnings(built, plan, out)}
## Recipe

```json
{json.dumps(public, indent=2)}
```
{seen}
Blueprint `{plan.blueprint_hash}`; the hashes of the source files are in `upcycle.json`.
"""
