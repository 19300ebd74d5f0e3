"""Tells a decoder of transformers which tokens of a row may see each other, and asks the device nothing.

If there is no attention mask, transformers looks for jumps in the positions of every row, and asks the device
whether there are any. We know it: a row is one text, or the documents in it do not see each other. For these
we limit the masks themselves, where all classes get them, because some classes (OPT, Falcon) do not tell
transformers their positions. Flash attention reads no masks and gets the borders of the documents. Layers
that carry a state along the row read each document by itself (`carriers.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface, and_masks, packed_sequence_mask_function
from transformers.utils.generic import is_flash_attention_requested

from upcycle.hf import carriers
from upcycle.hf.documents import Documents

POSITIONS = "position_ids"  # the argument of a model with positions that start anew at each document
MASKED = ("sdpa", "eager", "flex_attention")  # implementations of attention that read these masks


@contextmanager
def told(
    model: PreTrainedModel, inputs: Mapping[str, Any], positions: Tensor | None = None
) -> Iterator[dict[str, Any]]:
    """Tell a model inside the block which tokens of the rows in `inputs` may see each other.

    It yields the inputs that the model then takes. With positions, tokens see those of their document, which
    begins wherever the position does not grow by one. Without, they see all of the row. With positions, masks
    do not depend on `attention_mask`: padding is a document of its own at the end of a row. The mask still
    tells MoE layers what is padding. `positions` are the same on the host; without them, what has to know
    the lengths of documents asks the device.
    """
    given, layers = dict(inputs), carriers.of(model)
    with ExitStack() as stack:
        stack.enter_context(_in_place("find_packed_sequence_indices", _one_text))
        apart = None
        if POSITIONS in inputs:
            masks = _limited(documents(inputs[POSITIONS]))
            if asks_lengths(model):
                on_host = inputs[POSITIONS] if positions is None else positions
                apart = Documents.of(on_host, inputs[POSITIONS].device)
            if apart is not None and reads_borders(model):
                masks[attention(model)] = _no_mask
                given |= _borders(apart)
            stack.enter_context(_in_place("ALL_MASK_ATTENTION_FUNCTIONS", masks))
        if layers is not None:
            stack.enter_context(layers.told(apart))
        yield given


def _borders(apart: Documents) -> dict[str, Any]:
    """Return what transformers' flash attention takes in place of a mask (its `FlashAttentionKwargs`)."""
    ends = {"cu_seq_lens_q": apart.borders, "cu_seq_lens_k": apart.borders}
    return {**ends, "max_length_q": apart.longest, "max_length_k": apart.longest}


def way(model: PreTrainedModel) -> str:
    """Return how a model keeps the documents of a row apart, in words."""
    how = f"by {'borders' if reads_borders(model) else 'masks'} for {attention(model)}"
    return how if carriers.of(model) is None else f"{how}, and one by one in layers that carry a state"


def documents(positions: Tensor) -> Tensor:
    """Return the number of each token's document in its row, [B, L], for positions [B, L]."""
    return (torch.diff(positions, dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)


def attention(model: PreTrainedModel) -> str:
    """Return the name of the implementation of attention that a decoder runs with."""
    return str(model.config.get_text_config()._attn_implementation)


def reads_borders(model: PreTrainedModel) -> bool:
    """Return whether a decoder runs with flash attention."""
    asked: bool = is_flash_attention_requested(requested_attention_implementation=attention(model))
    return asked


def asks_lengths(model: PreTrainedModel) -> bool:
    """Return whether a decoder has to know on the host how long the documents are to keep them apart."""
    return reads_borders(model) or carriers.of(model) is not None


def can_keep_apart(model: PreTrainedModel) -> bool:
    """Return whether a decoder runs with attention that can keep documents apart."""
    return attention(model) in MASKED or reads_borders(model)


def _limited(numbers: Tensor) -> AttentionMaskInterface:
    """Return transformers' makers of masks, which hide what has another number, [B, L]."""
    inside = packed_sequence_mask_function(numbers)
    limited = AttentionMaskInterface()
    for name in MASKED:
        limited[name] = _maker(limited[name], inside)
    return limited


def _no_mask(**options: Any) -> None:
    return None


def _maker(make: Any, inside: Any) -> Any:
    def made(*, mask_function: Any, **options: Any) -> Any:
        options |= {"attention_mask": None, "allow_is_causal_skip": False}
        return make(mask_function=and_masks(mask_function, inside), **options)

    return made


@contextmanager
def _in_place(name: str, value: Any) -> Iterator[None]:
    """Replace something of transformers' module inside the block; a version may lack it."""
    original = getattr(masking_utils, name, None)
    if original is None:
        yield
        return
    setattr(masking_utils, name, value)
    try:
        yield
    finally:
        setattr(masking_utils, name, original)


def _one_text(position_ids: Tensor) -> None:
    return None
