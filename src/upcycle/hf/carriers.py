"""Runs the layers that no mask reaches document by document: convolutions and states along a row.

Such a layer reads everything before a token in its row. So it gets the documents in rows of their own,
padded at their ends, which a causal layer never reads, and what it makes goes back to where it came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from upcycle.errors import UpcycleError
from upcycle.families import Config, Family, _stacks
from upcycle.hf.body import Body
from upcycle.hf.documents import Documents

_NAME = "_upcycle_carriers"  # the attribute of a model that has its `Carriers`


class Carriers:
    """The layers of a model that carry something along a row, and the documents that they read now."""

    def __init__(self) -> None:
        self._told: Documents | None = None
        self._read: Documents | None = None  # stays until the next forward pass, for what is recomputed

    @contextmanager
    def told(self, documents: Documents | None) -> Iterator[None]:
        """Let forward passes inside the block read these documents; None: each row is one."""
        before, self._told = self._told, documents
        try:
            yield
        finally:
            self._told = before

    def _begin(self, *_: Any) -> None:
        self._read = self._told

    @torch.compiler.disable  # the number of documents and their lengths change with every batch
    def _run(self, forward: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        """Return what a layer makes of [B, L, H]."""
        if self._read is None:
            made: Tensor = forward(hidden_states=hidden_states, **options)
            return made
        flat = hidden_states.flatten(0, 1)
        parts = []
        for alike in self._read.alike:
            rows = flat.new_zeros(alike.count * alike.longest, flat.shape[-1])
            rows = rows.index_copy(0, alike.places, flat.index_select(0, alike.tokens))
            made = forward(hidden_states=rows.view(alike.count, alike.longest, -1))
            parts.append(made.flatten(0, 1).index_select(0, alike.places))
        joined = torch.cat(parts)
        tokens = torch.cat([alike.tokens for alike in self._read.alike])
        back = torch.zeros_like(joined).index_copy(0, tokens, joined)
        return back.view(*hidden_states.shape[:2], -1)


def layers_of(model: PreTrainedModel, family: Family, config: Config) -> list[nn.Module]:
    """Return the layers that carry something along a row, in a model made from a dense one of this config.

    Raises `UpcycleError` if there are fewer than the config says: documents would mix in silence.
    """
    body, names = Body.of(model), {*family.carriers.values()}
    lists = _stacks.lists_of(family.stacks(config)) if names else []
    blocks = [block for path in lists for block in body.blocks(path)]
    found = [layer for block in blocks for name, layer in block.named_children() if name in names]
    wanted = sum(kind in family.carriers for kind in config.get("layer_types") or ())
    if len(found) < wanted:
        raise UpcycleError(
            f"{type(model).__name__} has {wanted} layers that carry a state along the row, and upcycle finds "
            f"{len(found)} of them, so the documents in a row would mix; install a version of transformers "
            f"that upcycle was tested with"
        )
    return found


def install(model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
    """Let these layers of the model run document by document if they are told to."""
    if not layers:
        return
    carriers = Carriers()
    model.base_model.register_forward_pre_hook(carriers._begin)
    for layer in layers:
        layer.forward = partial(carriers._run, layer.forward)
    setattr(model, _NAME, carriers)


def of(model: PreTrainedModel) -> Carriers | None:
    """Return the carriers of a model; None if none were installed."""
    found: Carriers | None = getattr(model, _NAME, None)
    return found
