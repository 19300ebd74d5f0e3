"""The logits of a step: how many there are at a time, as `training/chunked_entropy.py` computes them."""

from __future__ import annotations

from dataclasses import dataclass

from upcycle.forecast.setting import Setting

F32 = 4
CHUNKED = 1 << 28  # bytes of float32 logits from which on they are computed in chunks


@dataclass(frozen=True, kw_only=True)
class Logits:
    """The logits of one pass on a rank: T tokens and the V words of all ranks."""

    tokens: int
    words: int  # of this rank; tensor parallelism shares them out
    hidden: int
    chunk: int | None  # tokens at a time; None: all
    trained: bool = True  # whether the head's matrix has a gradient

    @property
    def at_once(self) -> int:
        """The number of logits that are there at a time."""
        return (self.tokens if self.chunk is None else min(self.chunk, self.tokens)) * self.words

    @property
    def chunks(self) -> int:
        """The number of chunks; 0 if there are none."""
        return 0 if self.chunk is None else -(-self.tokens // self.chunk)


def of(setting: Setting) -> Logits | None:
    """Return the logits of a setting; None if the model has no language head.

    A teacher's are not compared with logits of which each rank has a part, so these are not in chunks.
    """
    dense = setting.built.dense
    if not dense.has_language_head:
        return None
    last, words, chunk = dense.stacks[-1], int(dense.config["vocab_size"]), None
    tokens, mine = setting.tokens(last.name), -(-words // setting.layout.tp)
    whole = setting.teacher is not None and setting.layout.tp > 1
    if F32 * tokens * words >= CHUNKED and not whole:
        about = -(-tokens // -(-mine // last.hidden))
        chunk = 1 << max(0, about - 1).bit_length()
    return Logits(
        tokens=tokens,
        words=words if chunk is None else mine,
        hidden=last.hidden,
        chunk=chunk,
        trained=_is_trained(setting),
    )


def _is_trained(setting: Setting) -> bool:
    """Return whether the head's matrix, which may be the embedding, is trained."""
    built = setting.built
    ends = built.dense.family.tied
    if setting.trained is None or ends is None:
        return True
    return ends[1 if built.tied_head else 0] in {built.target.own(name) for name in setting.trained}
