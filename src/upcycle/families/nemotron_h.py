"""Nemotron-H: Mamba layers, a few of attention, and networks that are layers of their own."""

from collections.abc import Mapping
from typing import Any

from upcycle.errors import UpcycleError, shown
from upcycle.families import Config, Stack, Weights
from upcycle.families._plain_decoder import PlainDecoder
from upcycle.families._weights import Bias, Matrix, Norm, Table, Weight, below, linear, rms_norm
from upcycle.tensors.lazy import Lazy

_LETTERS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
_FORMERLY = {"mamba": "linear_attention", "attention": "full_attention"}
_OLD_NAMES = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min", "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor", "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}  # fmt: skip


class NemotronH(PlainDecoder):
    model_type = "nemotron_h"
    architectures = ("NemotronHForCausalLM",)
    base_class = "NemotronHModel"
    summary = "Nemotron-H 8B to 56B, Nemotron Nano 2"
    natives = ("nemotron_h",)
    root = "backbone."
    tied = ("lm_head.weight", "backbone.embeddings.weight")
    before = ("embeddings.",)
    after = ("norm_f.",)
    theta = 10_000.0  # its attention does not rotate
    blocks = "layers"
    up, down_name = "mixer.up_proj", "mixer.down_proj"
    module = "mixer"
    keys = {"hidden_act": "mlp_hidden_act"}
    residual = ("mixer",)
    counts = ()
    per_block = ("layers_block_type",)
    reads = frozenset(
        {"hybrid_override_pattern", "num_hidden_layers", "time_step_limit", "mamba_dt_limit", *_OLD_NAMES}
    )
    spellings = reads
    defaults = {
        "vocab_size": 131072,
        "hidden_size": 4096,
        "layers_block_type": None,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "attention_dropout": 0.0,
        "sliding_window": None,
        "intermediate_size": 21504,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "ssm_state_size": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "mamba_hidden_act": "silu",
        "n_groups": 8,
        "conv_kernel": 4,
        "expand": 2,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "use_conv_bias": True,
        "chunk_size": 128,
        "use_bias": False,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": True,
        "hidden_dropout": 0.0,
        "num_logits_to_keep": 1,
        "mamba_ssm_cache_dtype": "float32",
    }

    def config(self, raw: Mapping[str, Any]) -> Config:
        given = {_OLD_NAMES.get(key, key): value for key, value in raw.items()}
        given = {
            key: value for key, value in given.items() if key not in ("time_step_limit", "mamba_dt_limit")
        }
        kinds = _kinds(given)  # of its native Mixture of Experts, too, whose settings tasks read
        if not {"mlp", "moe"} & {*kinds}:
            raise UpcycleError(
                "config.json of a nemotron_h model names no layer that is a network (mlp); give a dense one "
                "with networks"
            )
        config = super().config({**given, "num_hidden_layers": len(kinds)})
        head = raw.get("head_dim") or self.defaults["head_dim"]
        config |= {"layers_block_type": kinds, "layer_types": kinds, "head_dim": head}
        if config["num_key_value_heads"] is None:
            config["num_key_value_heads"] = config["num_attention_heads"]
        # Its class never ties the head, and its attention has no positions.
        rope = {"rope_type": "default", "rope_theta": self.theta}
        return config | {"tie_word_embeddings": False, "rope_parameters": rope}

    def reach(self, config: Config, layer: int, length: int) -> int:
        return length if config["layer_types"][layer] == "full_attention" else 0

    def tells_apart(self, config: Config, length: int) -> str | None:
        mixing = [kind for kind in config["layer_types"] if kind not in ("mlp", "moe")]
        return super().tells_apart({**config, "layer_types": mixing}, length)

    def outside(self, config: Config) -> Weights:
        hidden = config["hidden_size"]
        table: Weights = {"embeddings.weight": Table((config["vocab_size"], hidden))}
        return table | rms_norm("norm_f", hidden)

    def block(self, config: Config) -> Weights:
        """Return what every layer has."""
        return rms_norm("norm", config["hidden_size"])

    def weights(self, config: Config) -> Weights:
        if "moe" in config["layer_types"]:
            raise UpcycleError(
                "config.json of a nemotron_h model names experts already; give a dense one with networks"
            )
        out = super().weights(config)
        makers = {"mlp": _network, "full_attention": _attention, "linear_attention": _mamba}
        for i, kind in enumerate(config["layer_types"]):
            out |= below(f"{self.root}{self.blocks}.{i}.mixer.", makers[kind](config))
        return out

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        kinds, block = config["layer_types"], f"{self.blocks}.{{i}}."
        heads = config["num_attention_heads"] * config["head_dim"]
        return (
            Stack(
                count=len(kinds),
                having=tuple(i for i, kind in enumerate(kinds) if kind == "mlp"),
                hidden=config["hidden_size"],
                width=config["intermediate_size"],
                attention=heads,
                path=f"{self.root}{block}mixer",
                owned=(f"{self.root}{block}mixer.",),
                module=f"{block}mixer",
                down=f"{block}mixer.down_proj",
                causal=True,
                activation=config["hidden_act"],
                norm_path=f"{self.root}{block}norm",
            ),
        )

    def backbone(self, config: Config, native: str, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        (stack,) = self.stacks(config)
        return {n: t for n, t in tensors.items() if not any(stack.owns(n, i) for i in stack.numbers)}

    def refusal(self, config: Config, native: str) -> str | None:
        if config["mlp_bias"]:
            return "its feed-forward networks have biases and no native MoE's experts do"
        return None

    def repeated(self, config: Config, raw: Mapping[str, Any], times: int) -> Config:
        out = super().repeated(config, raw, times)
        out["hybrid_override_pattern"] = "".join(
            next(letter for letter, kind in _LETTERS.items() if kind == name)
            for name in out["layers_block_type"]
        )
        return out | {"num_hidden_layers": len(out["layers_block_type"])}


def _kinds(raw: Mapping[str, Any]) -> list[str]:
    """Return what each layer is, from the list or the pattern of letters in config.json."""
    listed, pattern = (
        raw.get("layers_block_type") or raw.get("layer_types"),
        raw.get("hybrid_override_pattern"),
    )
    if listed is None and pattern is None:
        return ["linear_attention", "moe", "full_attention", "mlp"]  # as its class assumes
    kinds = [_LETTERS.get(c, c) for c in pattern] if listed is None and isinstance(pattern, str) else listed
    given = kinds if isinstance(kinds, (list, tuple)) else ()
    kinds = [_FORMERLY.get(kind, kind) for kind in given if isinstance(kind, str)]
    if not kinds or len(kinds) != len(given) or not {*kinds} <= {*_LETTERS.values()}:
        raise UpcycleError(
            f"config.json of a nemotron_h model: layers_block_type = {shown(listed)} and "
            f"hybrid_override_pattern = {shown(pattern)}; layers are {', '.join(_LETTERS.values())}, or the "
            f"letters {''.join(_LETTERS)}"
        )
    return kinds


def holds_experts(raw: Mapping[str, Any]) -> bool:
    """Return whether a layer of this config.json has experts."""
    return "moe" in _kinds(raw)


def _network(config: Config) -> Weights:
    hidden, width, bias = config["hidden_size"], config["intermediate_size"], config["mlp_bias"]
    return linear("up_proj", width, hidden, bias=bias) | linear("down_proj", hidden, width, bias=bias)


def _attention(config: Config) -> Weights:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    out: Weights = {f"{name}.weight": Matrix((n, hidden)) for name, n in rows.items()}
    return out | {"o_proj.weight": Matrix((hidden, queries))}


def _mamba(config: Config) -> Weights:
    hidden, heads, bias = config["hidden_size"], config["mamba_num_heads"], config["use_bias"]
    inner = heads * config["mamba_head_dim"]
    channels = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    out: Weights = {name: Weight((heads,)) for name in ("dt_bias", "A_log", "D")}
    out["conv1d.weight"] = Matrix((channels, 1, config["conv_kernel"]))
    out |= {"conv1d.bias": Bias((channels,))} if config["use_conv_bias"] else {}
    out["norm.weight"] = Norm((inner,))
    out |= linear("in_proj", inner + channels + heads, hidden, bias=bias)
    return out | linear("out_proj", hidden, inner, bias=bias)


family = NemotronH()
