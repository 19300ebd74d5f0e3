"""The axes of a decoder's tensors: which are channels, heads and neurons."""

from __future__ import annotations

from collections.abc import Mapping

from upcycle.errors import UpcycleError
from upcycle.families import Config
from upcycle.families._narrowing import Axes, Axis, Narrowable, unknown_axes

_ENDS: Axes = {
    "model.embed_tokens.weight": (None, Axis("channels")),
    "model.norm.weight": (Axis("channels"),),
    "lm_head.weight": (None, Axis("channels")),
}


class DecoderWidth(Narrowable):
    """A decoder with Llama's names, from which a narrower one can be chosen."""

    norms: tuple[str, ...]  # the norms of a block, by their names in it

    def axes(self, config: Config) -> Axes:
        """Return channels, neurons, and groups of query heads with their key head; for Llama's names only."""
        out: Axes = {}
        for name in self.shapes(config):
            if name in _ENDS:
                out[name] = _ENDS[name]
                continue
            number, _, part = name.removeprefix("model.layers.").partition(".")
            inside = self._inside(config, int(number)) if number.isdecimal() else {}
            if part not in inside:
                raise unknown_axes(self)
            out[name] = inside[part]
        return out

    def _inside(self, config: Config, layer: int) -> Axes:
        """Return the axes of the tensors of a block, by their names in it."""
        channels, head = Axis("channels"), config["head_dim"]
        group = config["num_attention_heads"] // config["num_key_value_heads"] * head
        queries, keys = (Axis("heads", layer=layer, unit=unit) for unit in (group, head))
        neurons = Axis("neurons", layer=layer)
        return {
            "self_attn.q_proj.weight": (queries, channels),
            "self_attn.k_proj.weight": (keys, channels),
            "self_attn.v_proj.weight": (keys, channels),
            "self_attn.o_proj.weight": (channels, queries),
            "self_attn.q_proj.bias": (queries,),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.bias": (keys,),
            "self_attn.o_proj.bias": (channels,),
            "mlp.gate_proj.weight": (neurons, channels),
            "mlp.up_proj.weight": (neurons, channels),
            "mlp.down_proj.weight": (channels, neurons),
            "mlp.gate_proj.bias": (neurons,),
            "mlp.up_proj.bias": (neurons,),
            "mlp.down_proj.bias": (channels,),
            "self_attn.q_norm.weight": self.head_norm(queries, head),
            "self_attn.k_norm.weight": self.head_norm(keys, head),
            **{f"{norm}.weight": (channels,) for norm in self.norms},
        }

    def head_norm(self, heads: Axis, head: int) -> tuple[Axis | None, ...]:
        """Return the axes of a norm of queries or keys, which all heads of `head` elements share.

        `heads` is the axis of the queries or keys themselves.
        """
        return (None,)

    def narrowed(self, config: Config, hidden: Mapping[str, int], width: Mapping[str, int]) -> Config:
        """Keep whole groups of query heads with their key head."""
        share, rest = divmod(hidden["layers"] * config["num_key_value_heads"], config["hidden_size"])
        if rest or not share:
            raise UpcycleError(
                f"successor.hidden_size = {hidden['layers']} of {config['hidden_size']}: its share of the "
                f"{config['num_key_value_heads']} key heads is no whole number; heads are kept whole"
            )
        return {
            "hidden_size": hidden["layers"],
            "intermediate_size": width["layers"],
            "num_attention_heads": share * (config["num_attention_heads"] // config["num_key_value_heads"]),
            "num_key_value_heads": share,
            "head_dim": config["head_dim"],
        }
