"""T5: an encoder and a decoder with relative position biases, and networks without biases, gated or not."""

from __future__ import annotations

from collections.abc import Mapping

from upcycle.families import Config, Stack, Weights
from upcycle.families._encoder import Encoder
from upcycle.families._weights import Initial, Matrix, Normal, Table, Weight, linear, rms_norm
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy

# The number of the layer in a block that is the feed-forward network.
NETWORK = {"encoder": 1, "decoder": 2}


class EncoderDecoder(Encoder):
    """T5, T5 1.1 and mT5."""

    sizes = ("d_model", "d_ff", "d_kv", "num_layers", "num_heads", "vocab_size")
    prefix = "transformer"
    counts = ("num_layers", "num_decoder_layers")
    over_classes = "classification_head.out_proj"
    tied = ("lm_head.weight", "shared.weight")
    before: tuple[str, ...] = ("shared.", "encoder.embed_tokens.", "decoder.embed_tokens.")
    after = ("decoder.final_layer_norm.",)
    defaults = {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": None,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
        "feed_forward_proj": "relu",
        "pad_token_id": 0,
        "eos_token_id": 1,
    }

    def finish(self, config: Config) -> Config:
        layers = config["num_decoder_layers"] or config["num_layers"]
        gate, _, act = config["feed_forward_proj"].rpartition("-")
        return config | {
            "num_decoder_layers": layers,
            "hidden_size": config["d_model"],
            "intermediate_size": config["d_ff"],
            "num_hidden_layers": config["num_layers"] + layers,
            "num_attention_heads": config["num_heads"],
            "head_dim": config["d_kv"],
            # "gated-gelu" has always meant the tanh approximation
            "hidden_act": "gelu_new" if config["feed_forward_proj"] == "gated-gelu" else act,
            "gated": gate == "gated",
            "tie_word_embeddings": True,  # unless a checkpoint stores a head of its own: see `optional`
        }

    def base(self, config: Config) -> str:
        name = config["architectures"][0]
        return (
            "transformer." if name.endswith(("ForSequenceClassification", "ForTokenClassification")) else ""
        )

    def unlisted(self, config: Config, name: str) -> bool:
        body = tuple(self.base(config) + part for part in ("shared.", "encoder.", "decoder."))
        return config["architectures"][0] not in self.architectures and not name.startswith(body)

    def body(self, config: Config) -> Weights:
        hidden = config["d_model"]
        out: Weights = {"shared.weight": Table((config["vocab_size"], hidden))}
        for stack in self._stacks(config, ""):
            for i in range(stack.count):
                block = f"{stack.name}.block.{i}.layer."
                out |= self._attention(config, block + "0", "SelfAttention")
                if i == 0:
                    bias = (config["relative_attention_num_buckets"], config["num_heads"])
                    out[f"{block}0.SelfAttention.relative_attention_bias.weight"] = Table(bias)
                if stack.name == "decoder":
                    out |= self._attention(config, block + "1", "EncDecAttention")
                network = f"{block}{NETWORK[stack.name]}"
                names = ("wi_0", "wi_1") if config["gated"] else ("wi",)
                for name in names:
                    out |= linear(f"{network}.DenseReluDense.{name}", config["d_ff"], hidden, bias=False)
                out |= linear(f"{network}.DenseReluDense.wo", hidden, config["d_ff"], bias=False)
                out |= rms_norm(f"{network}.layer_norm", hidden)
            out |= rms_norm(f"{stack.name}.final_layer_norm", hidden)
        return out

    def _attention(self, config: Config, layer: str, name: str) -> Weights:
        hidden, inner = config["d_model"], config["num_heads"] * config["d_kv"]
        out: Weights = rms_norm(f"{layer}.layer_norm", hidden)
        for part in ("q", "k", "v"):
            out |= linear(f"{layer}.{name}.{part}", inner, hidden, bias=False)
        return out | linear(f"{layer}.{name}.o", hidden, inner, bias=False)

    def head(self, config: Config) -> Weights:
        return {}

    def optional(self, config: Config) -> Weights:
        """Allow the separate head that T5 1.1 stores.

        transformers 5 loads it, although it treats every T5 as tied.
        """
        if config["architectures"][0] not in self.architectures:
            return {}
        return {"lm_head.weight": Matrix((config["vocab_size"], config["d_model"]))}

    def inputs(self, config: Config, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        read = super().inputs(config, tokens)
        return read if len(self.stacks(config)) == 1 else {**read, "decoder_input_ids": read["input_ids"]}

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        return self._stacks(config, self.base(config))

    def _stacks(self, config: Config, base: str) -> tuple[Stack, ...]:
        """Return the stacks, with `base` before the names of their tensors on disk."""
        counts = {"encoder": config["num_layers"], "decoder": config["num_decoder_layers"]}
        if config["architectures"][0].endswith(("EncoderModel", "ForTokenClassification")):
            del counts["decoder"]
        out = []
        for name, count in counts.items():
            layer = f"{name}.block.{{i}}.layer."
            path = f"{layer}{NETWORK[name]}.DenseReluDense"
            out.append(
                Stack(
                    name=name,
                    count=count,
                    hidden=config["d_model"],
                    width=config["d_ff"],
                    attention=config["num_heads"] * config["d_kv"],
                    across="encoder" if name == "decoder" else "",
                    path=base + path,
                    owned=(base + path + ".",),
                    module=path,
                    down=path + ".wo",
                    heads=(f"{name}.block.{{i}}.layer.0.SelfAttention.o",),
                    causal=name == "decoder",
                    activation=config["hidden_act"],
                    dropout=config["dropout_rate"],
                )
            )
        return tuple(out)

    def depth(self, name: str, counts: Mapping[str, int]) -> int:
        if name.startswith("encoder.final_layer_norm."):
            return counts["encoder.block"]
        return super().depth(name, counts)

    def stack_of(self, name: str) -> str:
        name = name.removeprefix("transformer.")
        of_the_encoder = "EncDecAttention.k." in name or "EncDecAttention.v." in name
        return "decoder" if name.startswith(("decoder.", "lm_head")) and not of_the_encoder else "encoder"

    def branches(self, config: Config, stack: Stack) -> tuple[str, ...]:
        attention = ("0.SelfAttention", "1.EncDecAttention")[: NETWORK[stack.name]]
        return (*(f"{stack.name}.block.{{i}}.layer.{each}" for each in attention), stack.module)

    def own_norm(self, config: Config, stack: Stack) -> str:
        return f"{stack.name}.block.{{i}}.layer.{NETWORK[stack.name]}.layer_norm"

    def deviation(self, config: Config) -> float:
        """Return the deviation with which a product over all channels starts at a variance of one."""
        return float(config["initializer_factor"] * config["d_model"] ** -0.5)

    def initial(self, config: Config, name: str, weight: Weight) -> Initial | None:
        """Return deviations with which products start at a variance of one, as T5's `_init_weights` does."""
        inner, name = config["num_heads"] * config["d_kv"], name.removeprefix("transformer.")
        if name in ("shared.weight", "lm_head.weight"):
            return Normal(float(config["initializer_factor"]))
        if name.endswith("Attention.q.weight"):
            return Normal(float(config["initializer_factor"] * (config["d_model"] * config["d_kv"]) ** -0.5))
        if name.endswith("Attention.o.weight"):
            return Normal(float(config["initializer_factor"] * inner**-0.5))
        if name.endswith(".wo.weight"):
            return Normal(float(config["initializer_factor"] * config["d_ff"] ** -0.5))
        return super().initial(config, name, weight)

    def feed_forward(
        self, config: Config, layer: int, tensors: Mapping[str, Lazy], stack: str = "layers"
    ) -> FeedForward:
        network = f"{self.base(config)}{stack}.block.{layer}.layer.{NETWORK[stack]}.DenseReluDense."
        down = tensors[network + "wo.weight"]
        if not config["gated"]:
            return FeedForward(up=tensors[network + "wi.weight"], down=down)
        return FeedForward(
            gate=tensors[network + "wi_0.weight"], up=tensors[network + "wi_1.weight"], down=down
        )

    def twins(self, config: Config) -> Mapping[str, str]:
        base = self.base(config)
        tables = (f"{base}{stack}.embed_tokens.weight" for stack in ("encoder", "decoder"))
        return {**super().twins(config), **dict.fromkeys(tables, f"{base}shared.weight")}

    def ignored(self, name: str) -> str | None:
        name = name.removeprefix("transformer.")
        if name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            return "tied to shared.weight"
        if name.startswith("decoder.") and "EncDecAttention.relative_attention_bias" in name:
            return "never read by transformers"
        return super().ignored(name)
