"""The model card: README.md of an upcycled checkpoint."""

from __future__ import annotations

import json
from typing import Any

from upcycle.blueprints import Blueprint
from upcycle.cost import plan_of

_DENSE = """```python
from transformers import {name}

model = {name}.from_pretrained("path/to/this/folder")
```
"""
_NATIVE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
_UPCYCLED = """```python
import upcycle  # makes the architecture known to transformers' Auto classes

model = upcycle.open("path/to/this/folder")
```
"""


def how_to_load(built: Blueprint | None, architecture: str) -> str:
    """How to open a model of a class: the dense one where nothing was built, or no experts."""
    if built is None or not built.sites:
        return _DENSE.format(name=architecture)
    return _UPCYCLED if built.native.upcycled else _NATIVE


def render(built: Blueprint, record: dict[str, Any]) -> str:
    """Markdown that says what the folder is, what it was made from, and how to load it."""
    plan = plan_of(built)
    source = built.source.name
    state = (
        "Untrained since: it computes what the dense model computes."
        if plan.preserves_function
        else "Untrained since, and it does not compute what the dense model computes: train it before use."
    )
    moe = plan.num_moe_layers > 0
    how = f"initialisation `{built.recipe.init.name}`"
    if built.native.dense == "deeper":
        how = f"every block {built.recipe.moe.depth} times"
    warnings = "".join(f"- {w}\n" for w in plan.warnings) or "- none\n"
    return f"""---
library_name: transformers
tags: [{"mixture-of-experts, upcycled" if moe else "upcycle"}]
---

# {source}, {"upcycled" if moe else plan.kind}

A `{plan.target}` made from the dense `{plan.family}` checkpoint `{source}` with
`upcycle` {record["upcycle_version"]}, {how}.
{state}

| | dense | {plan.kind} |
|---|---|---|
| parameters | {plan.dense_parameters:,} | {plan.total_parameters:,} |
| active parameters per token | {plan.dense_parameters:,} | {plan.active_parameters:,} |
| FLOPs per token (forward, matrix products) | {plan.dense_flops_per_token:,} | {plan.flops_per_token:,} |

It is {plan.made}.

## Load

{how_to_load(built, built.native.architecture)}
## What to know

{warnings}
## Recipe

```json
{json.dumps(record["recipe"], indent=2)}
```

Blueprint `{plan.blueprint_hash}`; the hashes of the source files are in `upcycle.json`.
"""
