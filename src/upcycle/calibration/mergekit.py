"""The rows that mergekit-moe gives routers, by its own arithmetic, for people who compare.

Written from its behaviour (mergekit 0.1.5, `moe/router.py`, `scripts/moe.py`). A prompt is read behind the
BOS token, padded on the left with BOS (or EOS), by the model in bfloat16. The row for block l is the residual
stream that enters block l, at the last token (`hidden`) or summed over all positions and divided by their
number, padding included (`hidden_avg`). It is meaned over the prompts, less that of the negative prompts, and
has length one. A router does not read that stream, but the normalised input of the network after attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from upcycle.calibration import model
from upcycle.calibration.domains import Domain
from upcycle.data import corpus
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError

_SMALLEST = 1e-8  # the least length that a row is divided by


def rows(
    dense: Dense, domains: Sequence[Domain], names: Sequence[str], embedding: Tensor
) -> dict[str, Tensor]:
    """Return the statistics `names` by their names in the file, float32 [D, H] each.

    `embedding` is the table of the model in float32, on the device to work on.
    """
    tokenizer = _tokenizer(dense)
    batches = [
        [_batch(prompts, tokenizer) for prompts in (domain.positive_prompts, domain.negative_prompts)]
        for domain in domains
    ]
    (stack,) = dense.stacks
    needed = {*names} != {"cheap_embed"}
    read = model.opened(dense, embedding.device, torch.bfloat16) if needed else None
    found: dict[str, Tensor] = {}
    for name in names:
        if name == "cheap_embed":
            mean, position = partial(_embedded, embedding), "embedding"
        else:
            mean, position = partial(_hidden, read, average=name == "mergekit_hidden_avg"), "residual"
        with torch.no_grad():
            made = torch.stack([_row(mean, *pair) for pair in batches], dim=1)  # [L or 1, D, H]
        for i, layer in enumerate(made):
            found[f"{position}.{stack.name}.{i}.{name}"] = layer.float().cpu()
    return found


def _tokenizer(dense: Dense) -> Any:
    tokenizer = corpus.read_tokenizer(dense.checkpoint.folder)
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = tokenizer.bos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UpcycleError(
            f"the tokenizer of {dense.checkpoint.folder} has neither a BOS nor an EOS token, with which "
            f"mergekit-moe pads prompts; leave its rows out of --collect"
        )
    return tokenizer


def _batch(prompts: Sequence[str], tokenizer: Any) -> Any:
    """Return the prompts of one side as a batch, or None if there are none."""
    if not prompts:
        return None
    begun = [(tokenizer.bos_token or "") + prompt for prompt in prompts]
    return tokenizer(begun, return_tensors="pt", padding=True, add_special_tokens=False)


def _row(mean: Callable[[Any], Tensor], positive: Any, negative: Any) -> Tensor:
    """Return the row of one domain for every block, [L, H], or [1, H] for cheap_embed."""
    row = mean(positive)
    return _unit(row if negative is None else row - mean(negative))


def _hidden(model: Any, batch: Any, *, average: bool) -> Tensor:
    """Return the mean over prompts of the residual stream, bfloat16 [L, H]."""
    output = model(**batch.to(model.device), output_hidden_states=True)
    states = torch.stack(output.hidden_states[:-1])  # [L, B, T, H]; the last is behind the last norm
    states = states.sum(dim=2) / states.shape[2] if average else states[:, :, -1, :]
    return states.sum(dim=1) / states.shape[1]


def _embedded(embedding: Tensor, batch: Any) -> Tensor:
    """Return the unit sum of the embeddings of all tokens, float32 [1, H]."""
    embedded = embedding[batch["input_ids"].to(embedding.device)]  # [B, T, H]
    mask = batch["attention_mask"].to(embedding.device)[..., None]
    return _unit((embedded * mask).sum(dim=1).sum(dim=0, keepdim=True))


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(p=2, dim=-1, keepdim=True).clamp(min=_SMALLEST)
