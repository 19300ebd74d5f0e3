"""The model card: README.md of an upcycled checkpoint."""

from __future__ import annotations

import json
from typing import Any

from upcycle.blueprints import Blueprint
from upcycle.cost import plan_of


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
    warnings = "".join(f"- {w}\n" for w in plan.warnings) or "- none\n"
    return f"""---
library_name: transformers
tags: [{"mixture-of-experts, upcycled" if moe else "upcycle"}]
---

# {source}, {"upcycled" if moe else plan.kind}

A `{plan.target}` made from the dense `{plan.family}` checkpoint `{source}` with
`upcycle` {record["upcycle_version"]}, {built.target.origin(built.recipe)}.
{state}

| | dense | {plan.kind} |
|---|---|---|
| parameters | {plan.dense_parameters:,} | {plan.total_parameters:,} |
| active parameters per token | {plan.dense_parameters:,} | {plan.active_parameters:,} |
| FLOPs per token (forward, matrix products) | {plan.dense_flops_per_token:,} | {plan.flops_per_token:,} |

It is {plan.made}.

## Load

```python
{built.target.snippet()}```

## What to know

{warnings}
## Recipe

```json
{json.dumps(record["recipe"], indent=2)}
```

Blueprint `{plan.blueprint_hash}`; the hashes of the source files are in `upcycle.json`.
"""
