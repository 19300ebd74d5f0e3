"""The blueprint: what every tensor of the MoE is, worked out from headers alone.

Takes a dense checkpoint and a recipe; gives names to lazy tensors, the MoE's config, and what is lost or
kept. Written to disk it is `convert`, compared with a folder `verify`, counted `plan`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from upcycle import families, natives
from upcycle.checkpoint import Checkpoint
from upcycle.dtypes import BY_TORCH_NAME, FLOATS, TORCH_NAMES
from upcycle.errors import UpcycleError, listed
from upcycle.families import Config, Family
from upcycle.feed_forward import FeedForward
from upcycle.hub import resolve
from upcycle.init import Site
from upcycle.lazy import Drawn, Extent, Fill, Given, Lazy, Stored, Take, blocks
from upcycle.natives import Native
from upcycle.recipe import Recipe

CHUNK = 8 << 20  # bytes of a stored tensor that are copied at once
NARROW = 128  # neurons of a shared expert that must exist and was not asked for
SHARED_GATE_STD = 1e-7  # sigmoid(gate) = 1/2 to 1e-6, and no weight is zero (llama.cpp: NaN at exactly 0)


@dataclass(frozen=True)
class Entry:
    """One tensor of the MoE: how it is made, and the type it is stored in."""

    lazy: Lazy
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lazy.shape

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.lazy.size * FLOATS[self.dtype].itemsize

    @property
    def extents(self) -> list[Extent] | None:
        """The stored bytes that make it up, where nothing has to be computed or cast."""
        return self.lazy.extents() if self.dtype == self.lazy.dtype else None

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """The bytes (uint8) in order and in pieces, each with its place."""
        start = 0
        for data in self._stored() if self.extents is not None else self._computed():
            yield start, data
            start += data.size

    def _stored(self) -> Iterator[np.ndarray]:
        for extent in self.extents or ():
            for start in range(extent.start, extent.stop, CHUNK):
                yield extent.checkpoint.pread(extent.info, start, min(extent.stop, start + CHUNK))

    def _computed(self) -> Iterator[np.ndarray]:
        for index in blocks(tuple((0, n) for n in self.shape)):
            yield np.ascontiguousarray(self.lazy.read(index, self.dtype)).reshape(-1).view(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Every tensor of the MoE, by its name on disk."""

    checkpoints: tuple[Checkpoint, ...]  # the source first
    recipe: Recipe
    family: Family
    native: Native
    dense: Config
    config: Config  # config.json of the MoE
    entries: Mapping[str, Entry]
    sites: Mapping[int, Site]  # by layer
    shared_width: int  # neurons of the shared expert, 0 where there is none
    left_out: Mapping[str, str]  # source tensors that are in nothing, and why
    unknown_keys: tuple[str, ...]  # of the dense config; carried over as they are

    @property
    def source(self) -> Checkpoint:
        return self.checkpoints[0]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what is built: names, shapes, types, the making of each, config, source headers."""
        headers = [sorted((t.name, t.dtype, t.shape) for t in c.tensors.values()) for c in self.checkpoints]
        made = {name: [e.shape, e.dtype, e.lazy.describe()] for name, e in sorted(self.entries.items())}
        text = json.dumps([headers, self.config, made], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e.nbytes for e in self.entries.values())

    @property
    def preserves_function(self) -> bool:
        """Whether the MoE computes what the dense model computes, up to rounding."""
        moe, router = self.recipe.moe, self.recipe.router
        return (
            all(self.recipe.init.preserves(site) for site in self.sites.values())
            and (router.normalize or moe.top_k == moe.num_experts or _is_uniform(self.recipe))
            and (self.family.exact_when_narrow or self._wide)
            and (
                self._wide
                or all(_keeps_bits(f) for s in self.sites.values() for f in _factors(self.recipe, s))
            )
        )

    @property
    def _wide(self) -> bool:
        """Whether weights are stored wide enough for rounding to stay below what is promised."""
        return all(e.dtype in ("F32", "F64") for e in self.entries.values())

    def _misaligned(self) -> str | None:
        """Which rows of the experts do not begin at a multiple of 16 bytes, as grouped_mm wants."""
        item = FLOATS[BY_TORCH_NAME[self.config["dtype"]]].itemsize
        width = next(iter(self.sites.values())).width
        for name, length in (("neurons", width), ("hidden units", self.dense["hidden_size"])):
            if length * item % 16:
                return f"rows of {length} {name} take {length * item} bytes, no multiple of 16"
        return None

    @property
    def warnings(self) -> list[str]:
        """What a person should know before spending money on this model."""
        moe, router = self.recipe.moe, self.recipe.router
        out = list(self.recipe.init.warnings())
        if moe.top_k == 1 and router.normalize:
            out.append(
                "top-1 with renormalised weights is always exactly 1: the router gets no gradient from the "
                "task; use top_k = 2 or more, or router.normalize = false where the target allows it"
            )
        if _is_uniform(self.recipe):
            out.append(
                "an all-zero router gives every expert the same score, and ties send every token to the "
                "same experts; use another init, or a small std"
            )
        if not router.normalize:
            out.append(
                f"the router's weights are not renormalised: experts are scaled by N / K = "
                f"{moe.num_experts / moe.top_k:g} and the function is kept only as far as the router is "
                f"uniform (std {router.std:g})"
            )
        if any(s.granularity > 1 and not s.grouped_router for s in self.sites.values()) and (
            self.recipe.init.name == "virtual_group"
        ):
            out.append(
                'a token\'s experts need not hold every shard: virtual_group wants router.init = "grouped"'
            )
        if moe.shared_experts == 0 and self.shared_width:
            out.append(
                f"{self.native.model_type} cannot be without a shared expert: one of {self.shared_width} "
                f"neurons is there with a zero down projection, and training may use it"
            )
        if odd := self._misaligned():
            out.append(
                f"{odd}: transformers' default kernel for experts refuses that; load with "
                f'experts_implementation="eager"'
            )
        for client, why in self.native.clients(self.config).items():
            out.append(f"{client} {why}: it will not reproduce this model's function")
        if self.unknown_keys:
            out.append(
                f"config.json has keys unknown to {self.family.model_type}, carried over as they are: "
                f"{listed(list(self.unknown_keys), 5)}"
            )
        return out + self.family.warnings(self.native.model_type)


def blueprint(source: str | Path | Checkpoint, recipe: Recipe, *, allow_nonfinite: bool = False) -> Blueprint:
    """The blueprint of the MoE that `recipe` makes of the dense checkpoint `source` (folder or hub id).

    Raises `UpcycleError` where source and recipe do not fit; reads headers only.
    """
    checkpoint = (
        source
        if isinstance(source, Checkpoint)
        else Checkpoint.open(resolve(source), allow_nonfinite=allow_nonfinite)
    )
    family, dense = _dense(checkpoint)
    native = _target(family, dense, recipe.moe.target)
    left_out = _check_tensors(checkpoint, family, dense)
    checkpoints = (checkpoint, *_donors(checkpoint, recipe, allow_nonfinite))
    layers = moe_layers(recipe, dense["num_hidden_layers"])
    sites = {layer: _site(layer, recipe, dense) for layer in layers}
    for site in sites.values():
        recipe.init.check(site)
    shared_width = _shared_width(recipe, native, dense)
    if recipe.router.init == "grouped" and recipe.moe.num_experts % recipe.moe.granularity:
        raise UpcycleError(
            f"router.init = grouped needs moe.num_experts to be a multiple of moe.granularity; "
            f"{recipe.moe.num_experts} is no multiple of {recipe.moe.granularity}"
        )

    sources = [{n: Stored(c, i) for n, i in c.tensors.items() if n not in left_out} for c in checkpoints]
    combined: dict[str, Lazy] = {
        name: recipe.init.backbone([s[name] for s in sources]) for name in sources[0]
    }
    tensors = family.backbone(dense, native.model_type, combined)
    for layer in range(dense["num_hidden_layers"]):
        if layer in sites:
            networks = [family.feed_forward(dense, layer, s) for s in sources]
            made = _moe_layer(networks, sites[layer], recipe, native, shared_width)
        else:
            network = family.feed_forward(dense, layer, combined)
            made = {f"mlp.{name}_proj.weight": m for name, m in network.matrices().items()}
        for name, tensor in made.items():
            full = f"model.layers.{layer}.{name}"
            if full in tensors:
                raise AssertionError(f"{full} is defined twice")
            tensors[full] = tensor

    dtype = None if recipe.dtype == "source" else BY_TORCH_NAME[recipe.dtype]
    entries = {
        name: Entry(lazy, lazy.dtype if dtype is None or _keeps_dtype(name) else dtype)
        for name, lazy in _in_order(tensors).items()
    }
    known = {*family.defaults, *families.SILENT, *_KNOWN}
    unknown = tuple(sorted(k for k in checkpoint.config if k not in known))
    config = _config(recipe, native, family, dense, layers, shared_width, entries)
    config |= {key: checkpoint.config[key] for key in unknown if key not in config}
    if not recipe.init.uses_source:
        left_out = dict.fromkeys(checkpoint.tensors, "the recipe takes no weights of the source")
    return Blueprint(
        checkpoints=checkpoints,
        recipe=recipe,
        family=family,
        native=native,
        dense=dense,
        config=config,
        entries=entries,
        sites=sites,
        shared_width=shared_width,
        left_out=left_out,
        unknown_keys=unknown,
    )


_KNOWN = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "num_key_value_heads",
        "partial_rotary_factor",
        "hidden_activation",
        "sliding_window_pattern",
        "full_attention_interval",
        "original_max_position_embeddings",
    ]
)
_MOE_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def _dense(checkpoint: Checkpoint) -> tuple[Family, Config]:
    """The family and the full config of a checkpoint, refusing what is no plain dense model."""
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
    odd = sorted(t.name for t in checkpoint.tensors.values() if t.dtype not in FLOATS)
    if odd:
        dtype = checkpoint.tensors[odd[0]].dtype
        raise UpcycleError(
            f"{where} holds {listed(odd)} as {dtype}: it is quantised or packed; give a checkpoint in "
            f"{', '.join(FLOATS)}"
        )
    family = families.find(model_type)
    return family, family.config(raw)


def _target(family: Family, dense: Config, target: str) -> Native:
    name = family.natives[0] if target == "native" else target
    if name not in family.natives:
        if (reason := families.INEXACT.get((family.model_type, name))) is not None:
            raise UpcycleError(f"{family.model_type} -> {name} does not compute the same: {reason}")
        allowed = ", ".join(family.natives)
        raise UpcycleError(f"{family.model_type} cannot become {name!r} exactly; moe.target can be {allowed}")
    if reason := family.refusal(dense, name):
        raise UpcycleError(f"this {family.model_type} checkpoint cannot become {name} exactly: {reason}")
    return natives.find(name)


def _check_tensors(checkpoint: Checkpoint, family: Family, dense: Config) -> dict[str, str]:
    """Compare the headers with what the config promises; what may be left out, with the reason."""
    expected, found = family.shapes(dense), checkpoint.tensors
    where = checkpoint.folder
    if missing := [n for n in expected if n not in found]:
        raise UpcycleError(f"{where} lacks {listed(missing)}, which its config.json calls for")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UpcycleError(
                f"{where}: {name} has shape {list(found[name].shape)} and config.json says {list(shape)}"
            )
    left_out = {}
    extra = [n for n in found if n not in expected]
    if dense["tie_word_embeddings"] and "lm_head.weight" in extra:
        left_out["lm_head.weight"] = "tied to model.embed_tokens.weight by the config"
    left_out |= {n: reason for n in extra if (reason := family.ignored(n)) is not None}
    if surplus := [n for n in extra if n not in left_out]:
        raise UpcycleError(
            f"{where} holds {listed(surplus)}, which a {family.model_type} of this config does not have; "
            f"nothing is dropped in silence"
        )
    return left_out


def _donors(source: Checkpoint, recipe: Recipe, allow_nonfinite: bool) -> list[Checkpoint]:
    """The other dense checkpoints that the initialisation wants, same shapes or an error."""
    out = []
    for place, name in enumerate(recipe.init.donors, start=1):
        donor = Checkpoint.open(resolve(name), allow_nonfinite=allow_nonfinite, label=f"donor {place}")
        family, dense = _dense(donor)
        left_out = _check_tensors(donor, family, dense)
        mine = {n: t.shape for n, t in source.tensors.items()}
        theirs = {n: t.shape for n, t in donor.tensors.items() if n not in left_out}
        different = [n for n, shape in theirs.items() if mine.get(n) != shape]
        if donor.config.get("model_type") != source.config.get("model_type") or different:
            raise UpcycleError(
                f"{donor.folder} is not of the same shape as {source.folder}"
                + (f" ({listed(different)})" if different else "")
                + "; init.sources must share model_type and every tensor shape"
            )
        out.append(donor)
    return out


def moe_layers(recipe: Recipe, count: int) -> list[int]:
    """The layers that become MoE: every_other is 1, 3, 5, ...; last_half the layers from count // 2 on."""
    layers = recipe.moe.layers
    if layers == "all":
        return list(range(count))
    if layers == "every_other":
        chosen = list(range(1, count, 2))
    elif layers == "last_half":
        chosen = list(range(count // 2, count))
    else:
        chosen = sorted(set(layers))
        wrong = [i for i in chosen if not 0 <= i < count]
        if wrong:
            raise UpcycleError(f"moe.layers has {wrong}; the model has layers 0 to {count - 1}")
    if not chosen:
        raise UpcycleError("moe.layers chooses no layer; the result would be the dense model")
    return chosen


def _site(layer: int, recipe: Recipe, dense: Config) -> Site:
    moe, normalize = recipe.moe, recipe.router.normalize
    return Site(
        layer=layer,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        granularity=moe.granularity,
        dense_width=dense["intermediate_size"],
        seed=recipe.seed,
        grouped_router=recipe.router.init == "grouped",
        uniform_router=_is_uniform(recipe),
        gate_sum=1.0 if normalize else moe.top_k / moe.num_experts,
    )


def _is_uniform(recipe: Recipe) -> bool:
    return recipe.router.init == "zeros" or recipe.router.std == 0


def _shared_width(recipe: Recipe, native: Native, dense: Config) -> int:
    asked, shared, granularity = recipe.moe.shared_experts, native.shared, recipe.moe.granularity
    if asked and shared is None:
        raise UpcycleError(f"{native.model_type} has no shared expert; set moe.shared_experts = 0")
    if asked and asked != granularity:
        raise UpcycleError(
            f"moe.shared_experts = {asked} of 1/{granularity} of the dense width; the shared expert is the "
            f"dense network itself, so it must be 0 or moe.granularity ({granularity})"
        )
    if not recipe.router.normalize and native.renormalizes == "always":
        raise UpcycleError(
            f"{native.model_type} always renormalises; router.normalize = false cannot be kept"
        )
    if asked and shared.mandatory == "full" and granularity > 1:  # type: ignore[union-attr]
        raise UpcycleError(
            f"the shared network of {native.model_type} is as wide as one expert, 1/{granularity} of the "
            f"dense network; set moe.shared_experts = 0"
        )
    if asked:
        return int(dense["intermediate_size"])
    if shared is None or shared.mandatory is None:
        return 0
    full = int(dense["intermediate_size"])
    # hunyuan's shared network is as wide as one expert, by its config.
    return full // granularity if shared.mandatory == "full" else min(NARROW, full)


def _moe_layer(
    networks: list[FeedForward], site: Site, recipe: Recipe, native: Native, shared_width: int
) -> dict[str, Lazy]:
    """The tensors of one MoE layer by their names below the layer's prefix."""
    hidden, dtype = networks[0].gate.shape[1], networks[0].down.dtype
    asked = recipe.moe.shared_experts > 0
    halved = asked and native.shared is not None and native.shared.combine in ("gated", "sum")
    experts = [
        _scaled(recipe.init.expert(networks, e, site), recipe, site).scaled(down=0.5 if halved else 1.0)
        for e in range(site.num_experts)
    ]
    out = {native.router: _router(recipe, site, hidden, dtype), **native.layout.write(experts)}
    if native.extra:
        out |= native.extra(site.num_experts, dtype)
    if native.shared and shared_width:
        shared = native.shared
        network = _combined(networks, recipe).neurons(0, shared_width)
        if not asked:
            network = FeedForward(
                gate=network.gate, up=network.up, down=Fill((hidden, shared_width), dtype, 0.0)
            )
        elif shared.combine == "sum":
            network = network.scaled(down=0.5)
        out |= shared.write(network)
        if shared.gate:
            std = SHARED_GATE_STD if asked else 0.02
            out[shared.gate] = Drawn((1, hidden), dtype, "normal", std, site.key("shared gate"))
    return out


def _combined(networks: list[FeedForward], recipe: Recipe) -> FeedForward:
    """One network from those of the dense checkpoints, combined as everything that is no expert."""
    return networks[0].map(
        lambda name, _, __: recipe.init.backbone([getattr(network, name) for network in networks])
    )


def _scaled(expert: FeedForward, recipe: Recipe, site: Site) -> FeedForward:
    """Bring the output of an expert to the size that the router's weights call for."""
    gate, up, down = _factors(recipe, site)
    return expert.scaled(gate=gate, up=up, down=down)


def _factors(recipe: Recipe, site: Site) -> tuple[float, float, float]:
    """What gate, up and down are multiplied by."""
    factor = recipe.init.scale(site) / site.gate_sum
    if recipe.init.spread == "down":
        return 1.0, 1.0, factor
    if recipe.init.spread == "sqrt":
        return 1.0, math.sqrt(factor), math.sqrt(factor)
    root = factor ** (1 / 3)
    return root, root, root


def _keeps_bits(factor: float) -> bool:
    """Whether multiplying by it rounds nothing: a power of two."""
    return math.frexp(factor)[0] == 0.5


def _router(recipe: Recipe, site: Site, hidden: int, dtype: str) -> Lazy:
    """The router weight [E, H]. `grouped`: G rows in turn are the same, one for each shard of a group."""
    kind, std, key = recipe.router.init, recipe.router.std, site.key("router")
    if kind == "zeros":
        return Fill((site.num_experts, hidden), dtype, 0.0)
    if kind == "grouped":
        groups = site.num_experts // site.granularity
        rows = Given(tuple(np.repeat(np.arange(groups), site.granularity).tolist()))
        return Take(Drawn((groups, hidden), dtype, "normal", std, key), 0, rows)
    return Drawn((site.num_experts, hidden), dtype, kind, std, key)


def _keeps_dtype(name: str) -> bool:
    """Whether no recipe may narrow this tensor: a correction bias accumulates tiny steps."""
    return name.endswith("e_score_correction_bias")


def _in_order(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Embeddings, then layer by layer, then the rest: what belongs together lies together."""

    def place(name: str) -> tuple[int, list[tuple[int, str]]]:
        parts = [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
        if name.startswith("model.layers."):
            return parts[2][0], parts
        return (-1 if "embed" in name else 1 << 30), parts

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def _config(
    recipe: Recipe,
    native: Native,
    family: Family,
    dense: Config,
    layers: list[int],
    shared_width: int,
    entries: Mapping[str, Entry],
) -> Config:
    translated = family.native_config(dense, native.model_type)
    config = native.config(
        translated,
        num_experts=recipe.moe.num_experts,
        top_k=recipe.moe.top_k,
        width=dense["intermediate_size"] // recipe.moe.granularity,
        normalize=recipe.router.normalize,
        shared_experts=recipe.moe.shared_experts,
        shared_width=shared_width,
    )
    if native.dense_layers is not None:
        chosen = native.dense_layers(dense, frozenset(layers))
        if isinstance(chosen, str):
            raise UpcycleError(f"moe.layers = {recipe.moe.layers}: {chosen}")
        config |= chosen
    elif len(layers) != dense["num_hidden_layers"]:
        raise UpcycleError(
            f"{native.model_type} has experts in every layer and cannot keep dense ones; "
            f"use moe.layers = all, or a family whose target can (qwen2, qwen3, ernie4_5, cohere2)"
        )
    common = Counter(e.dtype for e in entries.values()).most_common(1)[0][0]
    name = TORCH_NAMES[common]
    return {**config, "dtype": name, "torch_dtype": name}
