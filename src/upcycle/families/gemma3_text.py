"""Gemma 3, the text model: Gemma 2 with normalised queries and keys."""

from upcycle.families import Config, Weights
from upcycle.families._decoder import rotation_by_kind, sizes
from upcycle.families._weights import Norm
from upcycle.families.gemma2 import Gemma2


class Gemma3(Gemma2):
    model_type = "gemma3_text"
    architectures = ("Gemma3ForCausalLM",)
    base_class = "Gemma3TextModel"
    summary = "Gemma 3, text"
    reads = Gemma2.reads | {"sliding_window_pattern", "rope_local_base_freq"}
    spellings = Gemma2.spellings | {"sliding_window_pattern", "rope_local_base_freq"}
    no_native = "no native MoE has its four norms"
    theta = 1_000_000.0
    assumed = sizes(262_208, 2304, 9216, 26, 8)
    defaults = {
        **Gemma2.defaults,
        "max_position_embeddings": 131_072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    }

    def interval(self, config: Config) -> int | str:
        return config.get("sliding_window_pattern") or 6

    def rotation(self, config: Config) -> Config:
        return rotation_by_kind(config, config.get("rope_local_base_freq", 10_000.0))

    def attention(self, config: Config, layer: int) -> Weights:
        norm = Norm((config["head_dim"],))
        norms: Weights = {"self_attn.q_norm.weight": norm, "self_attn.k_norm.weight": norm}
        return super().attention(config, layer) | norms


family = Gemma3()
