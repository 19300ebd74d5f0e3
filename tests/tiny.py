"""Tiny random dense checkpoints of every family, made by transformers itself."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

from upcycle import families

logging.disable_progress_bar()

DECODERS = [
    name
    for name in families.names()
    if families.find(name).natives and families.find(name).architectures[0].endswith("ForCausalLM")
]
"""Decoders that have a native MoE, but for those that are only ever part of a wrapper."""

OTHERS = [
    "olmo", "olmo3", "gemma2", "gemma3_text", "exaone4", "glm4", "starcoder2", "phi", "stablelm", "cohere",
    "nemotron", "arcee", "helium", "apertus", "gemma4_text",
]  # fmt: skip
"""Decoders with Llama's names that have none."""

RECENT = [
    "nemotron_h",
    "glm", "lfm2", "youtu", "granitemoehybrid", "seed_oss", "ministral", "ministral3", "cwm", "granite_swa",
    "starcoder2", "phi", "stablelm", "cohere", "nemotron", "arcee", "helium",
    "apertus", "gemma4_text",
]  # fmt: skip
"""Decoders of which only the native form is pinned."""

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 12, "rms_norm_eps": 3e-5},
    "qwen3": {"head_dim": 12},
    "granite": {
        "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
    },
    "youtu": {
        "pad_token_id": None,  # its class empties the row of the padding token when it opens a checkpoint
        "kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 4, "v_head_dim": 12, "qk_nope_head_dim": 8,
        "initializer_range": 0.02, "embedding_initializer_range": 0.02, "num_key_value_heads": 4,
    },
    "granitemoehybrid": {
        "num_local_experts": 0, "shared_intermediate_size": 48, "position_embedding_type": "rope",
        "layer_types": ["linear_attention", "full_attention"] * 2, "mamba_n_heads": 4, "mamba_d_state": 8,
        "mamba_chunk_size": 16, "embedding_multiplier": 3.0, "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 96, "global_head_dim": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"], "mamba_num_heads": 4,
        "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 16, "sliding_window": None,
    },
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"] * 2},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3_5_text": {
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-rope3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "llama-linear": (
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    ),
    "phi3-longrope": (
        "phi3",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0], "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen2-head_dim": ("qwen2", {"head_dim": 12}),
    "gemma-head_dim": ("gemma", {"head_dim": 12}),
    "olmo2-head_dim": ("olmo2", {"head_dim": 12}),
    "granite-head_dim": ("granite", {"head_dim": 12}),
    "phi3-head_dim": ("phi3", {"head_dim": 12}),
    "smollm3-head_dim": ("smollm3", {"head_dim": 12}),
    "ernie4_5-head_dim": ("ernie4_5", {"head_dim": 12}),
    "hunyuan-head_dim": ("hunyuan_v1_dense", {"head_dim": 12}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "qwen3_5_text-bias": ("qwen3_5_text", {"attention_bias": True}),
    "qwen3-sliding": ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
    "youtu-whole": ("youtu", {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False}),
    "qwen3-windows": (
        "qwen3", {"use_sliding_window": True, "max_window_layers": 2, "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e4}},
    ),
    "lfm2-rounded": ("lfm2", {"block_auto_adjust_ff_dim": True, "block_multiple_of": 8, "conv_bias": True}),
    "phi3-partial": (
        "phi3",
        {
            "hidden_size": 64, "max_position_embeddings": 128, "original_max_position_embeddings": 64,
            "sliding_window": None, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6,
                "partial_rotary_factor": 0.75,
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "original_max_position_embeddings": 64,
            },
        },
    ),
    "glm-no-bias": ("glm", {"attention_bias": False, "head_dim": 12}),
    "granite-bias": ("granite", {"attention_bias": True}),
    "olmo2-bias": ("olmo2", {"attention_bias": True}),
    "hunyuan-bias": ("hunyuan_v1_dense", {"attention_bias": True}),
    "smollm3-sliding": ("smollm3", {"use_sliding_window": True}),
    "cohere2-full": ("cohere2", {"layer_types": ["full_attention"] * 4}),
    "ernie4_5-untied": ("ernie4_5", {"tie_word_embeddings": False}),
}  # fmt: skip


NEEDED: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"num_local_experts": 0, "mamba_n_heads": 4},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
}
"""Fields without which a config would be of another kind of model."""

ROUTER_STD = {"lfm2": 0.05}
"""Deviations of routers with which a native keeps the function to 1e-5, if it warns that 0.5 is too wide."""


def config_of(model_type: str, **changes: Any) -> Any:
    """A small config of transformers' own class for `model_type`."""
    cls = CONFIG_MAPPING[model_type]
    known = families.find(model_type).defaults
    wanted = {k: v for k, v in SMALL.items() if k in known or k in _ALWAYS}
    return cls(**{**wanted, **SPECIAL.get(model_type, {}), **changes})


_ALWAYS = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}


CENTRED_NORMS = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "qwen3_5_text",
    "nemotron",
)  # their norms multiply by 1 + w


def make_dense(
    folder: Path,
    model_type: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard: str = "5GB",
    **changes: Any,
) -> Path:
    """A dense checkpoint with weights large enough that a missing or misplaced one shows."""
    config = config_of(model_type, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                centred = model_type in CENTRED_NORMS and "linear_attn.norm" not in name
                p.copy_(0.3 * noise + (0.0 if centred else 1.0))
            elif name.endswith(("bias", "A_log")):
                p.copy_(0.2 * noise)
            else:
                p.copy_(noise * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder


def make_headers(folder: Path, config: dict[str, Any], dtype: str = "BF16") -> Path:
    """A checkpoint of any size: its config and its headers, and no data."""
    family = families.find(config["model_type"])
    return write_headers(folder, config, family.shapes(family.config(config)), dtype)


def write_headers(folder: Path, config: dict[str, Any], shapes: families.Shapes, dtype: str = "BF16") -> Path:
    """The same of tensors of these names and shapes."""
    item, table, place = {"BF16": 2, "F32": 4}[dtype], {}, 0
    for name, shape in shapes.items():
        end = place + item * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    return folder


def make_bytes_tokenizer(folder: Path, *marks: str) -> None:
    """A tokenizer of bytes in `folder`: <s> is 1 and stands before every text, </s> is 2; `marks` come
    last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet, *marks])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)


def make_adapter(
    folder: Path,
    base: Path,
    modules: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
    *,
    seed: int = 0,
    ranks: Any = None,
    **settings: Any,
) -> Path:
    """A LoRA adapter as peft saves it, with random matrices for the modules whose names end so.

    `ranks` gives the rank of a module; without it, all have `r`, which is 4 unless the settings say more.
    """
    from safetensors.torch import load_file, save_file

    wanted = {"r": 4, "lora_alpha": 8, **settings}
    stored, random, tensors = load_file(base / "model.safetensors"), torch.Generator().manual_seed(seed), {}
    for name, weight in stored.items():
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and module.split(".")[-1] in modules:
            rank = ranks(module) if ranks else wanted["r"]
            rows, columns = reversed(weight.shape) if wanted.get("fan_in_fan_out") else weight.shape
            for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                drawn = 0.3 * torch.randn(shape, generator=random)
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = drawn
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": [*modules]}
    (folder / "adapter_config.json").write_text(json.dumps({**about, **wanted}))
    return folder


# Classes that have no native MoE, and what makes a small config of each.
_BLOCKS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
_IMAGES = {**_BLOCKS, "image_size": 12, "patch_size": 4, "num_labels": 3}
_TEXT = {**_BLOCKS, "vocab_size": 60, "max_position_embeddings": 40}
_T5 = {
    "d_model": 16, "d_ff": 24, "num_layers": 4, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 8,
    "vocab_size": 60, "decoder_start_token_id": 0,
}  # fmt: skip
_SEQ2SEQ = {
    "d_model": 16, "vocab_size": 60, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 4,
}  # fmt: skip
_STAGES = {
    "hidden_sizes": [8, 12, 16, 24], "depths": [2, 1, 2, 1], "image_size": 12, "patch_size": 1,
    "num_labels": 3,
}  # fmt: skip
_SIZES = {
    "vit": _IMAGES,
    "deit": _IMAGES,
    "dinov2": {k: v for k, v in _IMAGES.items() if k != "intermediate_size"} | {"mlp_ratio": 2},
    "convnext": {**_STAGES, "layer_scale_init_value": 0.1},
    "convnextv2": _STAGES,
    "bert": _TEXT,
    "roberta": _TEXT,
    "xlm-roberta": _TEXT,
    "camembert": _TEXT,
    "electra": {**_TEXT, "embedding_size": 12},
    "mpnet": _TEXT,
    "distilbert": {
        "dim": 16,
        "hidden_dim": 24,
        "n_layers": 4,
        "n_heads": 2,
        "vocab_size": 60,
        "max_position_embeddings": 40,
    },
    "modernbert": {
        **_TEXT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 8,
    },
    "gpt2": {
        "n_embd": 16,
        "n_layer": 4,
        "n_head": 2,
        "n_positions": 40,
        "vocab_size": 60,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _TEXT,
    "clip": {
        "text_config": {**_TEXT, "eos_token_id": 2},
        "vision_config": {**_IMAGES, "num_hidden_layers": 2},
        "projection_dim": 8,
    },
    "clip_vision_model": _IMAGES,
    "siglip_vision_model": _IMAGES,
    "pixtral": _IMAGES,
    "siglip": {"text_config": _TEXT, "vision_config": {**_IMAGES, "num_hidden_layers": 2}},
    "nomic_bert": _TEXT,
    "bloom": {"hidden_size": 16, "n_layer": 4, "n_head": 2, "vocab_size": 60},
    "siglip2": {
        "text_config": _TEXT,
        "vision_config": {**_BLOCKS, "num_hidden_layers": 2, "num_patches": 9, "patch_size": 2},
    },
    "wav2vec2": {
        **_BLOCKS,
        "vocab_size": 60,
        "conv_dim": (8, 8),
        "conv_stride": (3, 2),
        "conv_kernel": (4, 3),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    },
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "vocab_size": 60,
        "max_position_embeddings": 40,
        "word_embed_proj_dim": 12,
    },
    "falcon": _TEXT,
    "deberta-v2": {
        **_TEXT,
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    },
    "dinov2_with_registers": {k: v for k, v in _IMAGES.items() if k != "intermediate_size"}
    | {"mlp_ratio": 2},
    "dinov3_vit": {**_IMAGES, "num_register_tokens": 2},
    "bart": {**_SEQ2SEQ, "max_position_embeddings": 40},
    "whisper": {
        **_SEQ2SEQ,
        "num_mel_bins": 8,
        "max_source_positions": 20,
        "max_target_positions": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
        "begin_suppress_tokens": None,
    },
    "t5": _T5,
    "mt5": _T5,
}


def make(folder: Path, architecture: str, *, seed: int = 0, **changes: Any) -> Path:
    """A dense checkpoint of any class of transformers, with weights large enough that a missing one shows."""
    import transformers

    cls = getattr(transformers, architecture)
    model_type = cls.config_class.model_type
    config = (
        cls.config_class(**{**_SIZES[model_type], **changes})
        if model_type in _SIZES
        else config_of(model_type, **changes)
    )
    model = shake(cls(config).float(), seed)
    model.save_pretrained(folder)
    return folder


def shake(model: Any, seed: int = 0) -> Any:
    """Every parameter drawn: norms around one, vectors N(0, 0.3^2), matrices so that they keep a scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            centre = float("norm" in name.lower() and name.endswith("weight"))
            p.copy_(centre + noise * (p[0].numel() ** -0.5 if p.ndim > 1 and len(p) > 1 else 0.3))
    return model


def make_statistics(file: Path, folder: Path, seed: int = 0, *, marked: bool = False) -> Path:
    """A file of statistics of a dense checkpoint as `upcycle calibrate` writes it, with random numbers.

    `marked` adds those of 200 tokens of which each marks a quarter of the neurons.
    """
    import numpy as np
    from safetensors.numpy import save_file

    from upcycle.checkpoints.checkpoint import Checkpoint
    from upcycle.dense.admission import admit
    from upcycle.records.statistics import FORMAT, KEY

    dense, random = admit(Checkpoint.open(folder)), np.random.default_rng(seed)
    tensors = {}
    for stack in dense.stacks:
        sizes = {"neurons": stack.width, "channels": stack.hidden}
        if stack.heads:
            sizes["heads"] = dense.config["num_attention_heads"] * dense.config["head_dim"]
        for layer in range(stack.count):
            for position, size in sizes.items():
                for name in ("l1", "l2", "count"):
                    found = random.random(size).astype(np.float32)
                    tensors[f"{position}.{stack.name}.{layer}.{name}"] = found
            both = random.random((stack.width, stack.width)).astype(np.float32)
            tensors[f"neurons.{stack.name}.{layer}.co_activation"] = (both + both.T) / 2
            if marked:
                marks = (random.random((200, stack.width)) < 0.25).astype(np.float32)
                tensors[f"neurons.{stack.name}.{layer}.co_marker"] = marks.T @ marks / 200
    about = {
        "format": FORMAT,
        "source": {"name": folder.name, "fingerprint": dense.fingerprint},
        "tokens": {stack.name: 200 for stack in dense.stacks},
    }
    save_file(tensors, file, metadata={KEY: json.dumps(about)})
    return file
