"""Flash attention as a loop over sequences, in place of the functions that transformers would call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention of one sequence: queries [T, N, D], keys and values [T, K, D]."""
    assert causal
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    place = torch.arange(len(q))
    back = place[:, None] - place
    sees = (back >= 0) & ((back <= window_size[0]) if window_size[0] >= 0 else True)
    scores = scores.masked_fill(~sees, float("-inf"))
    if s_aux is not None:
        sink = s_aux[:, None, None].expand(-1, len(q), 1)
        return torch.einsum("nqk,knd->qnd", torch.cat([scores, sink], -1).softmax(-1)[..., :-1], v)
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v)


@contextmanager
def installed() -> Iterator[list[int]]:
    """Let transformers run its flash attention naively; yields the number of sequences of each call."""
    calls: list[int] = []

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        ends = cu_seqlens_q.tolist()
        assert cu_seqlens_q.dtype == torch.int32
        assert ends[-1] == len(q)
        assert type(max_seqlen_q) is int
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in itertools.pairwise(ends))
        calls.append(len(ends) - 1)
        options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size}
        options |= {"softcap": softcap, "s_aux": s_aux}
        parts = [attend(q[a:b], k[a:b], v[a:b], **options) for a, b in itertools.pairwise(ends)]
        return torch.cat(parts)

    def whole(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(len(q))
        options.pop("dropout_p", None)
        return torch.stack([attend(*each, **options) for each in zip(q, k, v, strict=True)])

    process = modeling_flash_attention_utils._lazy_define_process_function(varlen)
    functions = ((whole, varlen, None, None, None), (process, dict))
    from transformers.integrations import flash_attention

    with (
        mock.patch.object(flash_attention, "get_target_dtype", return_value=None),  # it would ask for 16 bits
        mock.patch.object(
            modeling_flash_attention_utils, "lazy_import_flash_attention", return_value=functions
        ),
        mock.patch.object(
            PreTrainedModel,
            "_check_and_adjust_attn_implementation",
            lambda self, name, *_, **__: name or "sdpa",
        ),
    ):
        yield calls
