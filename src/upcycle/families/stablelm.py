"""StableLM: Llama with LayerNorms and a partial rotation."""

from upcycle.families import Config, Weights
from upcycle.families._decoder import Decoder
from upcycle.families._weights import norm


class StableLM(Decoder):
    model_type = "stablelm"
    borders = False  # its blocks leave out the arguments of flash attention
    architectures = ("StableLmForCausalLM",)
    summary = "StableLM 2 and 3B"
    natives = ()
    no_native = "no native MoE has its LayerNorms"
    biased_norms = True
    rotated = 0.25
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "num_key_value_heads": 32,
    }

    def weights(self, config: Config) -> Weights:
        parallel = config["use_parallel_residual"]  # one norm before both
        norms = "post_attention_layernorm"
        return {n: w for n, w in super().weights(config).items() if not (parallel and norms in n)}

    def attention(self, config: Config, layer: int) -> Weights:
        out = super().attention(config, layer)
        if config["qk_layernorm"]:
            heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
            for part, count in heads.items():
                for i in range(count):
                    name = f"self_attn.{part}_layernorm.norms.{i}"
                    out[f"{name}.weight"] = norm(name, config["head_dim"])[f"{name}.weight"]
        return out

    def attention_biases(self, config: Config) -> str:
        return "qkv" if config["use_qkv_bias"] else ""


family = StableLM()
