"""The allowed values of config.json: one kind per key, checked before any family reads them.

A key that is not listed here does not affect what upcycle works out. Such keys are only refused NaN and inf,
because JSON has neither and config.json of the result would carry them on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from upcycle.errors import UpcycleError, shown

MOST = 1 << 40  # no size of a model comes near it
MOST_BLOCKS = 10_000  # blocks one after the other; the deepest published models have a few hundred

# Names in transformers (ACT2FN), listed so that upcycle need not import it; a test compares them.
ACTIVATIONS = frozenset(
    "gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh hardswish "
    "laplace leaky_relu linear mish prelu quick_gelu relu relu2 relu6 sigmoid silu sqrtsoftplus swish tanh "
    "xielu".split()
)
# Likewise (ROPE_INIT_FUNCTIONS), plus former names of longrope.
ROPE_TYPES = frozenset("default dynamic linear llama3 longrope proportional yarn su".split())
LAYER_TYPES = frozenset("full_attention sliding_attention chunked_attention linear_attention conv".split())


@dataclass(frozen=True)
class Kind:
    """A kind of value: its name in an error, and a check whether a value belongs to it."""

    said: str
    fits: Callable[[Any], bool]

    def or_null(self) -> Kind:
        """Return a kind that also allows null."""
        return Kind(f"{self.said}, or null", lambda value: value is None or self.fits(value))

    def listed(self) -> Kind:
        """Return the kind of a list of such values."""
        return Kind(f"a list, each entry {self.said}", lambda v: _is_list(v) and all(map(self.fits, v)))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _whole(least: int, most: int = MOST) -> Kind:
    said = f"a whole number of {least} or more" + (f", {most:,} at most" if most != MOST else "")
    return Kind(said, lambda value: type(value) is int and least <= value <= most)


def _number(least: float, said: str, *, most: float = 1e30, open_: bool = False) -> Kind:
    # NaN compares as false; integers of any length compare without becoming a float.
    return Kind(
        said,
        lambda v: type(v) in (int, float) and least <= v <= most and not (open_ and v == least),
    )


def _one_of(names: frozenset[str]) -> Kind:
    return Kind(f"one of {', '.join(sorted(names))}", lambda v: isinstance(v, str) and v in names)


_SIZE = _whole(1)
_BLOCKS = _whole(1, MOST_BLOCKS)
_COUNT = _whole(0)
_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_TEXT = Kind("text", lambda value: isinstance(value, str))
_ANY_NUMBER = _number(-1e30, "a number")
_POSITIVE = _number(0.0, "a number above 0", open_=True)
_NOT_NEGATIVE = _number(0.0, "a number of 0 or more")
_SHARE = _number(0.0, "a number from 0 to 1", most=1.0)
_ID = Kind("a whole number", lambda value: type(value) is int and abs(value) < 1 << 31)
_IDS = Kind(
    "a whole number, a list of them, or null",
    lambda v: v is None or _ID.fits(v) or (_is_list(v) and all(map(_ID.fits, v))),
)
_SIDES = Kind(
    "a whole number of 1 or more, or two of them",
    lambda v: _SIZE.fits(v) or (_is_list(v) and len(v) == 2 and all(map(_SIZE.fits, v))),
)
_SIZES = Kind(f"{_SIZE.said}, or a list of them", lambda v: _SIZE.fits(v) or _SIZE.listed().fits(v))
_SIZE_OR_AUTO = Kind(f"{_SIZE.said}, or auto", lambda v: v == "auto" or _SIZE.fits(v))
_TEXTS = Kind("text, or a list of text", lambda v: _TEXT.fits(v) or _TEXT.listed().fits(v))
_ACT = _one_of(ACTIVATIONS)
_TABLE = Kind("a table, or null", lambda value: value is None or isinstance(value, Mapping))
_GATED_ACT = Kind(
    f"an activation or gated-ACTIVATION, of {', '.join(sorted(ACTIVATIONS))}",
    lambda value: isinstance(value, str) and re.sub("^gated-", "", value) in ACTIVATIONS,
)
_PATTERN = Kind(
    f"a whole number of 1 to {MOST_BLOCKS:,}, or L and G for each layer",
    lambda v: _BLOCKS.fits(v) or (isinstance(v, str) and re.fullmatch("[LG]+", v) is not None),
)
_FLAG_OR_COUNT = Kind("0, 1, true or false", lambda value: type(value) in (int, bool) and value in (0, 1))


def _a_stage(kind: Kind) -> Kind:
    """Return the kind of a list with one value for each stage of a ConvNeXt."""
    return Kind(
        "4 whole numbers of 1 or more, one a stage",
        lambda v: _is_list(v) and len(v) == 4 and all(map(kind.fits, v)),
    )


def _each(kind: Kind, keys: str) -> dict[str, Kind]:
    return dict.fromkeys(keys.split(), kind)


KINDS: Mapping[str, Kind] = {
    **_each(
        _SIZE,
        "vocab_size_per_layer_input "
        "vocab_size hidden_size intermediate_size num_attention_heads max_position_embeddings "
        "original_max_position_embeddings no_rope_layer_interval "
        "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads "
        "linear_num_value_heads num_channels num_stages mamba_chunk_size d_model d_ff d_kv num_heads "
        "relative_attention_num_buckets relative_attention_max_distance n_positions n_embd n_head n_heads "
        "ffn_dim dim hidden_dim embedding_size projection_dim conv_L_cache block_multiple_of "
        "kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_n_heads "
        "mamba_n_groups mamba_d_state mamba_d_conv mamba_expand num_mel_bins max_source_positions "
        "max_target_positions encoder_ffn_dim "
        "decoder_ffn_dim encoder_attention_heads decoder_attention_heads num_patches "
        "num_conv_pos_embeddings num_conv_pos_embedding_groups adapter_kernel_size adapter_stride "
        "num_adapter_layers ssm_state_size pretraining_tp "
        "mamba_num_heads mamba_head_dim n_groups expand chunk_size",
    ),
    **_each(
        _SIZE.or_null(),
        "global_head_dim num_global_key_value_heads "
        "num_key_value_heads head_dim pooler_output_size attention_chunk_size n_inner word_embed_proj_dim "
        "projection_size q_lora_rank num_kv_heads ffn_hidden_size output_hidden_size adapter_attn_dim",
    ),
    **_each(
        _BLOCKS,
        "num_hidden_layers num_layers full_attention_interval n_layer n_layers encoder_layers decoder_layers",
    ),
    "num_decoder_layers": _BLOCKS.or_null(),
    "sliding_window": _COUNT.or_null(),
    "sliding_window_pattern": _PATTERN.or_null(),
    "local_attention": _COUNT,
    "global_attn_every_n_layers": _SIZE,
    **_each(
        _COUNT,
        "hidden_size_per_layer_input num_kv_shared_layers "
        "max_window_layers num_register_tokens type_vocab_size num_local_experts shared_intermediate_size",
    ),
    **_each(_COUNT.or_null(), "chunk_size_feed_forward num_labels num_ln_in_parallel_attn"),
    "max_relative_positions": _ID,
    "num_logits_to_keep": _COUNT,
    "mamba_ssm_cache_dtype": _TEXT,
    "layers_block_type": _TEXT.listed().or_null(),
    "hybrid_override_pattern": _TEXT.or_null(),
    "mamba_d_head": _SIZE_OR_AUTO,
    "pos_att_type": _TEXTS.or_null(),
    "position_embedding_type": _TEXT.or_null(),
    "block_ffn_dim_multiplier": _POSITIVE,
    "dropout": _SHARE,
    "init_std": _NOT_NEGATIVE,
    "embedding_initializer_range": _NOT_NEGATIVE.or_null(),
    **_each(_IDS, "pad_token_id bos_token_id eos_token_id eod_token_id sep_token_id cls_token_id "
                  "decoder_start_token_id image_token_id"),
    **_each(
        _FLAG,
        "attention_bias mlp_bias use_bias qkv_bias tie_word_embeddings use_cache use_sliding_window "
        "use_qkv_bias qk_layernorm use_parallel_residual attention_out_bias conv_bias "
        "block_auto_adjust_ff_dim mamba_conv_bias mamba_proj_bias do_stable_layer_norm add_adapter "
        "attention_k_eq_v enable_moe_block use_double_wide_mlp use_conv_bias slow_but_exact residual_in_fp32 "
        "rescale_prenorm_residual apply_residual_connection_post_layernorm",
    ),
    **_each(
        _FLAG.or_null(),
        "use_swiglu_ffn use_mask_token use_bidirectional_attention is_decoder add_cross_attention "
        "is_encoder_decoder use_qk_norm do_layer_norm_before enable_bias layer_norm_elementwise_affine "
        "_remove_final_layer_norm norm_bias vision_use_head rope_interleave "
        "query_bias key_bias value_bias proj_bias "
        "use_gated_mlp alibi new_decoder_architecture multi_query parallel_attn bias relative_attention "
        "position_biased_input share_att_key",
    ),
    **_each(_ACT, "hidden_act activation_function activation mlp_hidden_act mamba_hidden_act"),
    "hidden_activation": _ACT.or_null(),
    "feed_forward_proj": _GATED_ACT,
    **_each(_NOT_NEGATIVE, "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon "
                           "initializer_range initializer_factor layerscale_value"),
    "layer_scale_init_value": _ANY_NUMBER,
    **_each(
        _SHARE,
        "attention_dropout embd_pdrop resid_pdrop dropout_rate drop_path_rate hidden_dropout_prob "
        "attention_probs_dropout_prob residual_dropout activation_dropout hidden_dropout "
        "mask_time_prob mask_feature_prob",
    ),
    **_each(_SHARE.or_null(), "partial_rotary_factor classifier_dropout"),
    **_each(
        _ANY_NUMBER,
        "logit_scale logit_scale_init_value embedding_multiplier "
        "residual_multiplier attention_multiplier",
    ),
    **_each(_NOT_NEGATIVE, "time_step_min time_step_max time_step_floor"),
    **_each(_POSITIVE, "logits_scaling query_pre_attn_scalar mlp_ratio"),
    **_each(_POSITIVE.or_null(), "attn_logit_softcapping final_logit_softcapping clip_qkv rope_theta"),
    **_each(_SIDES, "image_size patch_size"),
    **_each(_SIZES, "conv_dim conv_stride conv_kernel"),  # lists in a wav2vec2, single sizes elsewhere
    "feat_extract_norm": _one_of(frozenset({"group", "layer"})),
    "hidden_sizes": _a_stage(_SIZE),
    "depths": _a_stage(_BLOCKS),
    "architectures": _TEXT.listed().or_null(),
    "layer_types": _one_of(LAYER_TYPES).listed().or_null(),
    "layer_rope_theta": _NOT_NEGATIVE.listed().or_null(),
    "no_rope_layers": _FLAG_OR_COUNT.listed().or_null(),
    **_each(_TABLE, "rope_scaling rope_parameters label2id id2label"),
}  # fmt: skip

# The keys inside rope_scaling or rope_parameters.
_ROPE: Mapping[str, Kind] = {
    "rope_type": _one_of(ROPE_TYPES),
    "type": _one_of(ROPE_TYPES),
    "rope_theta": _POSITIVE,
    **_each(
        _POSITIVE.or_null(),
        "factor original_max_position_embeddings low_freq_factor high_freq_factor attention_factor beta_fast "
        "beta_slow short_mscale long_mscale",
    ),
    **_each(_NOT_NEGATIVE.or_null(), "mscale mscale_all_dim"),
    **_each(_POSITIVE.listed().or_null(), "short_factor long_factor"),
    "partial_rotary_factor": _SHARE.or_null(),
}


def check(model_type: str, raw: Mapping[str, Any]) -> None:
    """Raise `UpcycleError`, with key and value, if a value of config.json is not of its kind."""
    for key, value in raw.items():
        if key in KINDS and not KINDS[key].fits(value):
            raise _refusal(model_type, key, value, KINDS[key])
        if (odd := _not_finite(value)) is not None:
            raise UpcycleError(
                f"config.json of a {model_type} model: {key} holds {odd}, which JSON does not have; "
                f"give a number"
            )
    for section in ("rope_scaling", "rope_parameters"):
        given = raw.get(section) or {}
        inner = [
            (section, given),
            *((f"{section}.{k}", v) for k, v in given.items() if isinstance(v, Mapping)),
        ]
        for where, table in inner:
            for key, kind in _ROPE.items():
                if key in table and not kind.fits(table[key]):
                    raise _refusal(model_type, f"{where}.{key}", table[key], kind)

    _refuse_padding_outside(model_type, raw)


def _refuse_padding_outside(model_type: str, raw: Mapping[str, Any]) -> None:
    """Refuse a padding token without a row in the table of embeddings, with which no model can be opened."""
    pad, rows = raw.get("pad_token_id"), raw.get("vocab_size")
    if type(pad) is int and type(rows) is int and not -rows <= pad < rows:
        raise UpcycleError(
            f"config.json of a {model_type} model: pad_token_id = {pad}, and a vocab_size of {rows} "
            f"has rows 0 to {rows - 1}; set it to null, or to the token that pads"
        )


def _refusal(model_type: str, key: str, value: Any, kind: Kind) -> UpcycleError:
    return UpcycleError(
        f"config.json of a {model_type} model: {key} = {shown(value)}; it must be {kind.said}"
    )


def _not_finite(value: Any) -> float | None:
    """Return a NaN or inf from anywhere in a value, or None."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return value
        if isinstance(value, Mapping):
            left += value.values()
        elif _is_list(value):
            left += value
    return None
