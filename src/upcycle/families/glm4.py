"""GLM-4-0414: norms before and after each part, gate and up in one matrix, biased queries and keys."""

from upcycle.families._glm import GlmDecoder


class Glm4(GlmDecoder):
    model_type = "glm4"
    architectures = ("Glm4ForCausalLM",)
    summary = "GLM-4-0414"
    natives = ()
    no_native = "glm4_moe lacks its post-norms"
    norms = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
    residual = norms[2:]


family = Glm4()
