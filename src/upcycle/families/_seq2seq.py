"""BART and Whisper: an encoder and a decoder whose networks stand straight in the layers, fc1 and fc2."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from upcycle.errors import UpcycleError
from upcycle.families import Config, Stack, Weights
from upcycle.families._encoder import Encoder
from upcycle.families._weights import Table, below, linear, norm
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

STACKS = ("encoder", "decoder")


class Seq2Seq(Encoder):
    """An encoder and a decoder with learned positions, biases and LayerNorms."""

    prefix = "model"
    sizes = (
        "d_model", "vocab_size", *(f"{stack}_{size}" for stack in STACKS for size in (
            "layers", "attention_heads", "ffn_dim")),
    )  # fmt: skip
    counts = ("encoder_layers", "decoder_layers")
    key_bias: ClassVar[bool] = True
    before: tuple[str, ...] = ("shared.",)
    after: tuple[str, ...] = ()

    def finish(self, config: Config) -> Config:
        return config | {
            "hidden_size": config["d_model"],
            "intermediate_size": config["encoder_ffn_dim"],
            "num_hidden_layers": config["encoder_layers"] + config["decoder_layers"],
            "num_attention_heads": config["encoder_attention_heads"],
            "head_dim": config["d_model"] // config["encoder_attention_heads"],
            "hidden_act": config["activation_function"],
        }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        if (name := config["architectures"][0]).endswith("ForCausalLM"):
            raise UpcycleError(
                f"config.json names the class {name}, which is the decoder alone; give the encoder with its "
                f"decoder ({self.architectures[-1]})"
            )
        return config

    def parts(self, config: Config) -> tuple[str, ...]:
        """Return the stacks that the class has; one that classifies sound has the encoder alone."""
        return STACKS[:1] if config["architectures"][0].endswith("ForAudioClassification") else STACKS

    def base(self, config: Config) -> str:
        return super().base(config) if len(self.parts(config)) > 1 else ""

    def unlisted(self, config: Config, name: str) -> bool:
        body = tuple(self.base(config) + part for part in ("shared.", "encoder.", "decoder."))
        return config["architectures"][0] not in self.architectures and not name.startswith(body)

    def body_class(self, config: Config, stored: Collection[str]) -> str | None:
        """Return None for a class whose head is the table of the body, so that nothing of it is missing."""
        whole = config["architectures"][0] in self.architectures and config["tie_word_embeddings"]
        return None if whole else super().body_class(config, stored)

    @abc.abstractmethod
    def outside(self, config: Config) -> Weights:
        """Return the tensors of the base model outside its blocks, by their names in it."""

    def body(self, config: Config) -> Weights:
        hidden, parts = config["d_model"], self.parts(config)
        out = {
            name: weight
            for name, weight in self.outside(config).items()
            if name.startswith(("shared.", *parts))
        }
        for stack in parts:
            block = self._attention(hidden, "self_attn") | norm("final_layer_norm", hidden)
            block |= self._attention(hidden, "encoder_attn") if stack == "decoder" else {}
            width = config[f"{stack}_ffn_dim"]
            block |= linear("fc1", width, hidden) | linear("fc2", hidden, width)
            for i in range(config[f"{stack}_layers"]):
                out |= below(f"{stack}.layers.{i}.", block)
        return out

    def _attention(self, hidden: int, name: str) -> Weights:
        out = norm(f"{name}_layer_norm", hidden)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= linear(f"{name}.{part}", hidden, hidden, bias=self.key_bias or part != "k_proj")
        return out

    def head(self, config: Config) -> Weights:
        return {}

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        read = super().inputs(config, tokens)
        return {**read, "decoder_input_ids": read["input_ids"]} if "decoder" in self.parts(config) else read

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        base = self.base(config)
        return tuple(
            Stack(
                name=name,
                count=config[f"{name}_layers"],
                hidden=config["d_model"],
                width=config[f"{name}_ffn_dim"],
                attention=config["d_model"],
                across="encoder" if name == "decoder" else "",
                path=f"{base}{name}.layers.{{i}}.fc1",
                owned=(f"{base}{name}.layers.{{i}}.fc1.", f"{base}{name}.layers.{{i}}.fc2."),
                module=f"{name}.layers.{{i}}.fc1",
                replaced=(f"{name}.layers.{{i}}.activation_fn", f"{name}.layers.{{i}}.fc2"),
                down=f"{name}.layers.{{i}}.fc2",
                heads=(f"{name}.layers.{{i}}.self_attn.out_proj",),
                causal=name == "decoder",
                activation=config["hidden_act"],
            )
            for name in self.parts(config)
        )

    def stack_of(self, name: str) -> str:
        name = name.removeprefix("model.")
        of_the_encoder = "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
        ends = ("decoder.", "lm_head", "proj_out", "final_logits")
        return "decoder" if name.startswith(ends) and not of_the_encoder else "encoder"

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "encoder"
    ) -> FeedForward:
        block = f"{self.base(config)}{stack}.layers.{layer}."
        return FeedForward(
            up=tensors[block + "fc1.weight"],
            up_bias=tensors[block + "fc1.bias"],
            down=tensors[block + "fc2.weight"],
            down_bias=tensors[block + "fc2.bias"],
        )


def positions(stack: str, rows: int, hidden: int) -> Weights:
    """Return the learned positions of a stack."""
    return {f"{stack}.embed_positions.weight": Table((rows, hidden))}
