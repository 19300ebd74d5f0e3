"""Decoders that rotate neighbouring channels of a head, for targets that rotate its two halves."""

from __future__ import annotations

from collections.abc import Mapping

from upcycle.families import Config
from upcycle.families._decoder import Decoder
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Take
from upcycle.tensors.positions import Given


class Interleaved(Decoder):
    """A decoder whose rotation pairs channels 2i and 2i + 1 of a head.

    A target pairs i and i + R/2 of the R channels that are rotated. So the rows of queries and keys are put
    in another order within each head, which leaves every product of a query and a key as it is.
    """

    def backbone(self, config: Config, native: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        out = super().backbone(config, native, tensors)
        head, share = config["head_dim"], config["rope_parameters"].get("partial_rotary_factor", 1.0)
        rotated = int(head * share)
        order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, head)]
        for name, tensor in out.items():
            if name.partition(".self_attn.")[2].startswith(("q_proj.", "k_proj.")):
                starts = range(0, tensor.shape[0], head)
                out[name] = Take(tensor, 0, Given(tuple(start + i for start in starts for i in order)))
        return out
