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

from upcycle import deeper, families, kernels, moe_layer, natives, successors, upcycled
from upcycle.checkpoint import CHUNK, Checkpoint
from upcycle.dtypes import BY_TORCH_NAME, FLOATS, TORCH_NAMES, holds
from upcycle.errors import UpcycleError
from upcycle.families import Config, Stack
from upcycle.hub import open_checkpoint
from upcycle.init import Site
from upcycle.lazy import Extent, Lazy, blocks
from upcycle.natives import Native
from upcycle.recipe import Recipe
from upcycle.source import Dense, admit, admit_donors


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

    dense: Dense
    donors: tuple[Dense, ...]  # more dense models that experts are made from
    recipe: Recipe
    native: Native
    config: Config  # config.json of the MoE
    entries: Mapping[str, Entry]
    sites: tuple[Site, ...]  # the blocks that became MoE, stack by stack
    shared_width: int  # neurons of the shared expert, 0 where there is none

    @property
    def source(self) -> Checkpoint:
        return self.dense.checkpoint

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The source and whatever else tensors come from."""
        donors = (donor.checkpoint for donor in self.donors)
        return [self.dense.checkpoint, *self.dense.others, *donors]

    @property
    def family_config(self) -> Config:
        """The dense config, or that of the deeper model where blocks are repeated."""
        return self.dense.config if self.sites else self.dense.family.config(self.config)

    @property
    def left_out(self) -> dict[str, str]:
        """Source tensors that are in nothing, and why; those of a second checkpoint with its label before."""
        if not self.recipe.init.uses_source:
            return dict.fromkeys(self.source.tensors, "the recipe takes no weights of the source")
        return dict(self.dense.left_out) | self.dense.left_aside({(s.stack, s.layer) for s in self.sites})

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what is built: names, shapes, types, the making of each, config, source headers."""
        headers = [sorted((t.name, t.dtype, t.shape) for t in c.tensors.values()) for c in self.checkpoints]
        made = {name: [e.shape, e.dtype, e.lazy.describe()] for name, e in sorted(self.entries.items())}
        text = json.dumps([headers, self.config, made], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def stored_config(self, dtype: str | None = None) -> Config:
        """config.json as it is written, with weights in `dtype` (None: as planned).

        Where transformers by itself would run experts as grouped products that do not take their rows, it
        says how they run. An upcycled class knows that by itself.
        """
        stored = dtype or str(self.config["dtype"])
        config = {**self.config, "dtype": stored, "torch_dtype": stored}
        lengths = [length for site in self.sites for length in (site.width, site.hidden)]
        itemsize = FLOATS[BY_TORCH_NAME[stored]].itemsize
        if self.native.upcycled or kernels.take_groups(lengths, itemsize):
            return config
        return config | {kernels.KEY: kernels.ONE_BY_ONE}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(e.nbytes for e in self.entries.values())

    @property
    def narrowed(self) -> str | None:
        """The type that stored values were rounded to, by its torch name; None where they keep theirs."""
        rounded = [
            e.dtype
            for e in self.entries.values()
            if any(not holds(e.dtype, info.dtype) for info in e.lazy.sources())
        ]
        return TORCH_NAMES[rounded[0]] if rounded else None

    @property
    def preserves_function(self) -> bool:
        """Whether the MoE computes what the dense model computes, up to rounding."""
        return (
            bool(self.sites)
            and self.recipe.moe.pooling == "class_token"
            and all(self._preserves(site) for site in self.sites)
            and (self._wide or self.native.upcycled or self.dense.family.exact_when_narrow)
        )

    def _preserves(self, site: Site) -> bool:
        router = self.recipe.at(site.stack).router
        count, top_k = site.num_experts, site.top_k
        gate, up, _ = moe_layer.factors(self.recipe, site)
        network = self.dense.feed_forward(site.layer, site.stack)
        gated = network.gate is not None
        return (
            (not network.response() or self._all_meet_all(site))
            and self.recipe.init.preserves(site)
            # No activation that is not linear may see a factor.
            and gate == 1.0
            and (gated or up == 1.0)
            and router.reaches_all(count, top_k)
            and (router.sums_to_one(count, top_k) or (site.uniform_router and router.rescale))
            and (self._wide or all(map(_keeps_bits, moe_layer.factors(self.recipe, site))))
        )

    def _all_meet_all(self, site: Site) -> bool:
        """Whether every expert has every token of a row, and all neurons of the dense network: what the
        statistics of a response norm are over."""
        router, length = self.recipe.at(site.stack).router, self.dense.family.lengths(self.dense.config)
        row = length[site.stack]
        met = router.experts_per_token(site.num_experts, site.top_k, row)
        whole = site.width == site.dense_width and router.group in (0, row)
        return whole and not router.has_slots and met >= site.num_experts

    @property
    def parts(self) -> dict[str, Recipe]:
        """The recipe of each stack that has MoE layers, by its name."""
        return {site.stack: self.recipe.at(site.stack) for site in self.sites}

    @property
    def expert_counts(self) -> set[int]:
        """How many experts of one width stand in a layer: what expert parallelism must divide."""
        counts = {n for site in self.sites for n in (site.num_experts, site.universal_experts)}
        return counts - {0}

    @property
    def moe_layers(self) -> list[int] | dict[str, list[int]]:
        """The numbers of the blocks that became MoE, by stack where there are several."""
        by_stack: dict[str, list[int]] = {}
        for site in self.sites:
            by_stack.setdefault(site.stack, []).append(site.layer)
        return by_stack.get("layers", []) if set(by_stack) <= {"layers"} else by_stack

    @property
    def _wide(self) -> bool:
        """Whether weights are stored wide enough for rounding to stay below what is promised."""
        return all(e.dtype in ("F32", "F64") for e in self.entries.values())


def blueprint(source: str | Path | Checkpoint, recipe: Recipe, *, allow_nonfinite: bool = False) -> Blueprint:
    """The blueprint of the MoE that `recipe` makes of the dense checkpoint `source` (folder or hub id).

    Raises `UpcycleError` where source and recipe do not fit; reads headers only.
    """
    if not isinstance(source, Checkpoint):
        source = open_checkpoint(source, allow_nonfinite=allow_nonfinite)
    dense = admit(source)
    recipe.init.admit(dense)
    if recipe.successor is not None:
        dense = successors.narrowed(dense, recipe, allow_nonfinite=allow_nonfinite)
    native = _target(dense, recipe)
    any_dtype = recipe.dtype != "source"
    donors = admit_donors(dense, recipe.init.donors, any_dtype=any_dtype, allow_nonfinite=allow_nonfinite)
    sites = () if native.dense else moe_layer.sites(recipe, dense)
    shared_width = 0 if native.dense else moe_layer.shared_width(recipe, native, _first(dense, sites).width)
    if native.dense == "deeper":
        config, lazies = deeper.config(dense, recipe.moe.depth), deeper.tensors(dense, recipe.moe.depth)
    elif native.dense:
        config, lazies = dict(dense.raw), dense.tensors
    else:
        config = _config(dense, native, recipe, sites, shared_width)
        lazies = _tensors([dense, *donors], native, recipe, sites)
    dtype = None if recipe.dtype == "source" else BY_TORCH_NAME[recipe.dtype]
    entries = {
        name: Entry(lazy, lazy.dtype if dtype is None or _keeps_dtype(name) else dtype)
        for name, lazy in _in_order(lazies).items()
    }
    stored = TORCH_NAMES[Counter(e.dtype for e in entries.values()).most_common(1)[0][0]]
    return Blueprint(
        dense=dense,
        donors=tuple(donors),
        recipe=recipe,
        native=native,
        config={**config, "dtype": stored, "torch_dtype": stored},
        entries=entries,
        sites=sites,
        shared_width=shared_width,
    )


def _first(dense: Dense, sites: tuple[Site, ...]) -> Stack:
    """The first stack with MoE layers."""
    return next(stack for stack in dense.stacks if stack.name == sites[0].stack)


def _target(dense: Dense, recipe: Recipe) -> Native:
    """The architecture that the recipe names, if the dense model is exactly one of its kind."""
    family, target = dense.family, recipe.moe.target
    if target == deeper.TARGET:
        return deeper.target(dense, recipe)
    if target == successors.TARGET:
        if recipe.successor is None:
            raise UpcycleError("moe.target = dense is the smaller model of [successor]; add that section")
        return successors.target(dense, recipe)
    if target == upcycled.TARGET:
        lengths = family.lengths(dense.config)
        for stack in dense.stacks:
            part = recipe.at(stack.name)
            upcycled.refuse_look_ahead(stack, part)
            if part.moe.universal_experts and not part.router.has_slots:
                raise UpcycleError(
                    f"moe.universal_experts needs a router that fills slots, spherical or soft; "
                    f"{part.router.name} sends tokens to experts of one width"
                )
            if moe_layer.chosen_layers(part, stack):
                part.router.check(part.moe.num_experts, part.moe.top_k, lengths[stack.name])
            elif stack.name in recipe.parts and stack.total > stack.count:
                raise UpcycleError(
                    f"[{stack.name}] has keys for experts, and moe.layers chooses no block of that stage; "
                    f"take it out, or choose other layers"
                )
        if recipe.moe.pooling == "mean" and not family.class_tokens:
            raise UpcycleError(
                f"moe.pooling = mean is for heads on a class token, in vit and deit; {family.model_type} "
                f"has none"
            )
        if unknown := [name for name in recipe.parts if name not in {s.name for s in dense.stacks}]:
            named = ", ".join(s.name for s in dense.stacks)
            raise UpcycleError(
                f"[{unknown[0]}] is a stack of blocks that {family.model_type} does not have; it has {named}"
            )
        return upcycled.target(family.model_type, dense.architecture, recipe)
    if not family.natives:
        raise UpcycleError(
            f"{family.model_type} has no exact native MoE: {family.no_native}; use moe.target = "
            f"{upcycled.TARGET}"
        )
    name = family.natives[0] if target == "native" else target
    if name not in family.natives:
        if (reason := families.INEXACT.get((family.model_type, name))) is not None:
            raise UpcycleError(f"{family.model_type} -> {name} does not compute the same: {reason}")
        allowed = ", ".join([*family.natives, upcycled.TARGET])
        raise UpcycleError(f"{family.model_type} cannot become {name!r} exactly; moe.target can be {allowed}")
    if reason := family.refusal(dense.config, name):
        raise UpcycleError(
            f"this {family.model_type} checkpoint cannot become {name} exactly: {reason}; "
            f"moe.target = {upcycled.TARGET} takes it"
        )
    native = natives.find(name)
    if recipe.moe.universal_experts:
        raise UpcycleError(f"moe.universal_experts is for moe.target = {upcycled.TARGET}; {name} has none")
    if recipe.moe.pooling != "class_token":
        raise UpcycleError(f"moe.pooling is for moe.target = {upcycled.TARGET}; {name} has no images")
    if recipe.parts:
        table = next(iter(recipe.parts))
        raise UpcycleError(f"[{table}] is for moe.target = {upcycled.TARGET}; {name} has one stack of blocks")
    if own := recipe.router.beyond_native():
        raise UpcycleError(
            f"{name} routes as transformers does and cannot keep {', '.join(own)}; use moe.target = "
            f"{upcycled.TARGET}"
        )
    if native.renormalizes == "always" and not recipe.router.normalize:
        raise UpcycleError(f"{name} always renormalises; router.normalize = false cannot be kept")
    return native


def _tensors(models: list[Dense], native: Native, recipe: Recipe, sites: tuple[Site, ...]) -> dict[str, Lazy]:
    """Every tensor of the MoE; a name that two rules define is an error of ours."""
    family, config = models[0].family, models[0].config
    every: dict[str, Lazy] = {
        name: recipe.init.backbone([m.tensors[name] for m in models]) for name in models[0].tensors
    }
    chosen = {(site.stack, site.layer): site for site in sites}
    if native.upcycled:
        gone = [
            (stack, i) for stack in models[0].stacks for i in range(stack.count) if (stack.name, i) in chosen
        ]
        out = {n: t for n, t in every.items() if not any(stack.owns(n, i) for stack, i in gone)}
    else:
        out = family.backbone(config, native.model_type, every)
    for stack in models[0].stacks:
        part = recipe.at(stack.name)
        if native.upcycled and recipe.parts:
            native = upcycled.target(family.model_type, models[0].architecture, part)
        shared_width = moe_layer.shared_width(part, native, stack.width)
        for layer in range(stack.count):
            if (stack.name, layer) in chosen:
                networks = [m.origin(layer, stack.name) for m in models]
                before = stack.norm_path.format(i=layer)
                parts = {p: every[f"{before}.{p}"] for p in ("weight", "bias") if f"{before}.{p}" in every}
                site = chosen[stack.name, layer]
                made = moe_layer.tensors(networks, site, part, native, shared_width, parts)
            elif native.upcycled:
                continue
            else:
                network = family.feed_forward(config, layer, every)
                made = {f"mlp.{name}_proj.weight": m for name, m in network.matrices().items()}
            prefix = stack.path.format(i=layer) if native.upcycled else f"model.layers.{layer}"
            for name, tensor in made.items():
                full = f"{prefix}.{name}"
                if full in out:
                    raise AssertionError(f"{full} is defined twice")
                out[full] = tensor
    return out


def _keeps_bits(factor: float) -> bool:
    """Whether multiplying by it rounds nothing: a power of two."""
    return math.frexp(factor)[0] == 0.5


def _keeps_dtype(name: str) -> bool:
    """Whether no recipe may narrow this tensor: a correction bias accumulates tiny steps."""
    return name.endswith("e_score_correction_bias")


def _in_order(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Embeddings, then layer by layer, then the rest: what belongs together lies together."""

    def place(name: str) -> tuple[int, list[tuple[int, str]]]:
        parts = [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
        number = next((n for n, _ in parts if n >= 0), None)
        if number is not None:
            return number + (1 << 20) * name.startswith("decoder."), parts
        return (-1 if "embed" in name or name == "shared.weight" else 1 << 30), parts

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def _config(
    dense: Dense, native: Native, recipe: Recipe, sites: tuple[Site, ...], shared_width: int
) -> Config:
    """config.json of the MoE, but for its dtype."""
    if native.upcycled:
        entries = []
        for stack in dense.stacks:
            mine = [site for site in sites if site.stack == stack.name]
            if mine:
                network = dense.feed_forward(mine[0].layer, stack.name)
                part = recipe.at(stack.name)
                width = moe_layer.shared_width(part, native, stack.width)
                entries.append(upcycled.entry(stack, mine, part, network, width))
        pooled = dense.family.class_tokens if recipe.moe.pooling == "mean" else 0
        return upcycled.config(dense.raw, dense.family.model_type, dense.architecture, entries, pooled)
    config = native.config(
        dense.family.native_config(dense.config, native.model_type),
        num_experts=recipe.moe.num_experts,
        top_k=recipe.moe.top_k,
        width=sites[0].width,
        normalize=recipe.router.normalize,
        shared_experts=recipe.moe.shared_experts,
        shared_width=shared_width,
    )
    layers = frozenset(site.layer for site in sites)
    if native.dense_layers is not None:
        chosen = native.dense_layers(dense.config, layers)
        if isinstance(chosen, str):
            raise UpcycleError(f"moe.layers = {recipe.moe.layers}: {chosen}")
        return config | chosen
    if len(layers) != dense.config["num_hidden_layers"]:
        raise UpcycleError(
            f"{native.model_type} has experts in every layer and cannot keep dense ones; use moe.layers = "
            f"all, moe.target = {upcycled.TARGET}, or a family whose target can (qwen2, qwen3, ernie4_5, "
            f"cohere2)"
        )
    return config
