"""OPT and Galactica: learned positions, biases everywhere, the network straight in the layer."""

from dataclasses import replace

from upcycle.families import Config, Stack, Weights
from upcycle.families._plain_decoder import PlainDecoder
from upcycle.families._weights import Table, linear, norm


class OPT(PlainDecoder):
    model_type = "opt"
    architectures = ("OPTForCausalLM",)
    base_class = "OPTModel"
    summary = "OPT, Galactica"
    root = "model.decoder."
    tied = ("lm_head.weight", "model.decoder.embed_tokens.weight")
    before = ("decoder.embed_tokens.", "decoder.embed_positions.", "decoder.project_in.")
    after = ("decoder.final_layer_norm.", "decoder.project_out.")
    blocks = "layers"
    up, down_name = "fc1", "fc2"
    module = "fc1"
    replaced = ("activation_fn", "fc2")
    owned = ("fc1.", "fc2.")
    attention = "self_attn.out_proj"
    keys = {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"}
    defaults = {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": None,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
        "tie_word_embeddings": True,
    }

    def outside(self, config: Config) -> Weights:
        hidden, rows = config["hidden_size"], config["max_position_embeddings"] + 2
        word = config["word_embed_proj_dim"] or hidden
        out: Weights = {"embed_tokens.weight": Table((config["vocab_size"], word))}
        out["embed_positions.weight"] = Table((rows, hidden))
        if word != hidden:
            out |= linear("project_in", hidden, word, bias=False)
            out |= linear("project_out", word, hidden, bias=False)
        final = config["do_layer_norm_before"] and not config["_remove_final_layer_norm"]
        return out | (self._norm(config, "final_layer_norm") if final else {})

    def _norm(self, config: Config, name: str) -> Weights:
        return norm(name, config["hidden_size"]) if config["layer_norm_elementwise_affine"] else {}

    def block(self, config: Config) -> Weights:
        hidden, width, bias = config["hidden_size"], config["intermediate_size"], config["enable_bias"]
        out = self._norm(config, "self_attn_layer_norm") | self._norm(config, "final_layer_norm")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= linear(f"self_attn.{part}", hidden, hidden, bias=bias)
        return out | linear("fc1", width, hidden, bias=bias) | linear("fc2", hidden, width, bias=bias)

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        def inside(name: str) -> str:
            return f"decoder.{name}"  # below the base model in memory

        return tuple(
            replace(
                stack,
                module=inside(stack.module),
                replaced=tuple(map(inside, stack.replaced)),
                down=inside(stack.down),
                heads=tuple(map(inside, stack.heads)),
            )
            for stack in super().stacks(config)
        )


family = OPT()
