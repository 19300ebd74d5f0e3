"""Gemma 2: norms before and after each part, soft-capped logits, GELU gates."""

from collections.abc import Mapping
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.families import Config
from upcycle.families._decoder import every_nth_full
from upcycle.families._gemma import DEFAULTS, FourNorms


class Gemma2(FourNorms):
    model_type = "gemma2"
    architectures = ("Gemma2ForCausalLM",)
    summary = "Gemma 2"
    no_native = "no native MoE has its four norms and soft-capping"
    centred_norms = True
    defaults = {
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        **DEFAULTS,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        config = super().config(raw)
        if config["hidden_activation"] is None:
            raise UpcycleError(
                f"config.json of a {self.model_type} model: hidden_activation is null; name the "
                f"activation, such as gelu_pytorch_tanh"
            )
        kinds = every_nth_full(config, self.interval(config))
        return {**config, "hidden_act": config["hidden_activation"], "layer_types": kinds}

    def interval(self, config: Config) -> int | str:
        """Return the distance between layers of full attention, for a config.json without their kinds."""
        return 2


family = Gemma2()
