"""The dense side: a checkpoint found to be a plain dense model of a known family, whole and sound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from upcycle import families, natives
from upcycle.checkpoint import Checkpoint
from upcycle.dtypes import FLOATS
from upcycle.errors import UpcycleError, listed
from upcycle.families import Config, Family
from upcycle.hub import open_checkpoint
from upcycle.lazy import Lazy, Stored

_SIZES = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
    "num_key_value_heads partial_rotary_factor hidden_activation sliding_window_pattern "
    "full_attention_interval original_max_position_embeddings".split()
)
_MOE_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense checkpoint, its family, and its config with every default in place."""

    checkpoint: Checkpoint
    family: Family
    config: Config
    left_out: Mapping[str, str]  # stored tensors that the model does not have, and why that is well

    @cached_property
    def tensors(self) -> dict[str, Lazy]:
        """The model's tensors by their names on disk."""
        stored = self.checkpoint.tensors.items()
        return {name: Stored(self.checkpoint, info) for name, info in stored if name not in self.left_out}

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """Keys of config.json that the family knows nothing of."""
        known = {*self.family.defaults, *families.SILENT, *_SIZES}
        return tuple(sorted(key for key in self.checkpoint.config if key not in known))


def admit(checkpoint: Checkpoint) -> Dense:
    """The dense model in a checkpoint; whatever is not exactly that is refused with the reason."""
    raw, where = checkpoint.config, checkpoint.folder
    model_type = raw.get("model_type")
    if model_type in natives.names() or any(isinstance(raw.get(k), int) and raw[k] > 1 for k in _MOE_KEYS):
        raise UpcycleError(f"{where} is already a Mixture of Experts ({model_type}); give a dense checkpoint")
    if "quantization_config" in raw:
        method = raw["quantization_config"]
        name = method.get("quant_method", "?") if isinstance(method, dict) else "?"
        raise UpcycleError(f"{where} is quantised ({name}); give the checkpoint it was made from")
    if not isinstance(model_type, str):
        raise UpcycleError(f"{where}/config.json has no model_type; known: {', '.join(families.names())}")
    if odd := sorted(t.name for t in checkpoint.tensors.values() if t.dtype not in FLOATS):
        dtype = checkpoint.tensors[odd[0]].dtype
        raise UpcycleError(
            f"{where} holds {listed(odd)} as {dtype}: it is quantised or packed; give a checkpoint in "
            f"{', '.join(FLOATS)}"
        )
    family = families.find(model_type)
    config = family.config(raw)
    left_out = _check_tensors(checkpoint, family, config)
    return Dense(checkpoint=checkpoint, family=family, config=config, left_out=left_out)


def _check_tensors(checkpoint: Checkpoint, family: Family, config: Config) -> dict[str, str]:
    """Compare the headers with what the config promises; what may be left out, with the reason."""
    expected, found = family.shapes(config), checkpoint.tensors
    where = checkpoint.folder
    if missing := [n for n in expected if n not in found]:
        raise UpcycleError(f"{where} lacks {listed(missing)}, which its config.json calls for")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UpcycleError(
                f"{where}: {name} has shape {list(found[name].shape)} and config.json says {list(shape)}"
            )
    extra = [n for n in found if n not in expected]
    left_out = {n: reason for n in extra if (reason := family.ignored(n)) is not None}
    if config["tie_word_embeddings"] and "lm_head.weight" in extra:
        left_out["lm_head.weight"] = "tied to model.embed_tokens.weight by the config"
    if surplus := [n for n in extra if n not in left_out]:
        raise UpcycleError(
            f"{where} holds {listed(surplus)}, which a {family.model_type} of this config does not have; "
            f"nothing is dropped in silence"
        )
    return left_out


def admit_donors(first: Dense, names: tuple[str, ...], *, allow_nonfinite: bool) -> list[Dense]:
    """The dense models called `names`, of the same type and shapes as `first`."""
    out = []
    for place, name in enumerate(names, start=1):
        opened = open_checkpoint(name, allow_nonfinite=allow_nonfinite, label=f"donor {place}")
        donor = admit(opened)
        mine = {n: t.shape for n, t in first.tensors.items()}
        theirs = {n: t.shape for n, t in donor.tensors.items()}
        different = sorted(n for n in {*mine, *theirs} if mine.get(n) != theirs.get(n))
        if donor.family is not first.family or different:
            raise UpcycleError(
                f"{opened.folder} is not of the same shape as {first.checkpoint.folder}"
                + (f" ({listed(different)})" if different else "")
                + "; init.sources must share model_type and every tensor shape"
            )
        out.append(donor)
    return out
