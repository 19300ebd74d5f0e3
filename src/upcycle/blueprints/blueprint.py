"""The blueprint: the definition of every tensor of the MoE, worked out from headers alone.

It takes a dense checkpoint and a recipe, and gives lazy tensors by name, the MoE's config, and what is lost
or kept. `convert` writes it to disk, `verify` compares it with a folder, and `plan` counts its costs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from upcycle.blueprints import heads, spared
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.dtypes import BY_TORCH_NAME, COUNTERS, FLOATS, TORCH_NAMES, holds
from upcycle.dense.source import Dense
from upcycle.families import Config, Weights
from upcycle.families._weights import Weight
from upcycle.families._wrappers import VISION
from upcycle.init import Site
from upcycle.nn import router_rows
from upcycle.nn.router_rows import RouterRows
from upcycle.recipe import Recipe
from upcycle.targets import Target, _moe_layer
from upcycle.tensors.entries import Entry


def as_written(config: Config) -> Config:
    """Return config.json without what would mislead whoever opens the folder, also in the configs of parts.

    With `use_cache = false`, which training scripts write, generation would compute every token anew. An
    `auto_map` names code that lay beside the source; the class is that of transformers, or ours.
    """
    out = {key: as_written(v) if isinstance(v, dict) else v for key, v in config.items() if key != "auto_map"}
    return out | ({"use_cache": True} if config.get("use_cache") is False else {})


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Every tensor of the MoE, by its name on disk."""

    dense: Dense
    donors: tuple[Dense, ...]  # more dense models that experts are made from
    recipe: Recipe
    target: Target
    config: Config  # config.json of the MoE
    entries: Mapping[str, Entry]
    sites: tuple[Site, ...]  # the blocks that become MoE layers, stack by stack
    remarks: tuple[str, ...] = ()  # what differs between the dense models and does not matter
    tower: Blueprint | None = None  # that of a vision tower which gets experts beside the text model

    @property
    def shared_width(self) -> int:
        """The number of neurons of the shared expert; 0 if there is none."""
        return self.sites[0].shared_width if self.sites else 0

    @property
    def source(self) -> Checkpoint:
        """The dense checkpoint that it is made from."""
        return self.dense.checkpoint

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The source and all other checkpoints that tensors come from."""
        models = (self.dense, *self.donors)
        return list(dict.fromkeys(opened for model in models for opened in (model.checkpoint, *model.others)))

    @cached_property
    def weights(self) -> Weights:
        """The kind of every tensor of the result."""
        own = self.target.weights(self.dense, self.config, self.entries)
        tower = self.tower.own_entries if self.tower else ()
        return (
            own
            | heads.weights(self.dense, self.recipe, self.entries)
            | {name: self.tower.weights[name] for name in tower if self.tower}
            | {n: Weight(e.shape) for n, e in self.entries.items() if self.predicts_further(n)}
        )

    @property
    def own_entries(self) -> Mapping[str, Entry]:
        """The tensors of the model itself, by their names on disk, without what is around it."""
        return {name: entry for name, entry in self.entries.items() if self.target.owns(name)}

    @property
    def all_sites(self) -> tuple[Site, ...]:
        """The blocks that become MoE layers, those of a vision tower beside the text model included."""
        towers = self.tower.sites if self.tower else ()
        return self.sites + tuple(replace(site, stack=VISION) for site in towers)

    @property
    def tied_head(self) -> int:
        """The number of weights in a head that is tied to the embedding."""
        return 0 if self.recipe.moe.untie else self.dense.tied_head

    @cached_property
    def family_config(self) -> Config:
        """The dense config, or that of the deeper model if blocks are repeated."""
        own = self.target.own_config(self.config)
        return self.dense.config if self.sites else self.dense.family.config(own)

    @property
    def left_out(self) -> dict[str, str]:
        """The unused source tensors, with the reason; those of a second checkpoint carry its label."""
        if not self.recipe.init.uses_source:
            unused = [name for name in self.source.tensors if not self.predicts_further(name)]
            none = dict.fromkeys(unused, "the recipe takes no weights of the source")
            return none | {name: why for name, why in self._spared.items() if name not in none}
        tower = self.tower.dense if self.tower else None
        theirs = {n: why for n, why in tower.left_out.items() if tower.place.own(n)} if tower else {}
        own = {n: why for n, why in self.dense.left_out.items() if not self.predicts_further(n)}
        return own | self._left_aside | self._spared | theirs

    @property
    def _left_aside(self) -> dict[str, str]:
        """The stored tensors that another checkpoint has too, unless something is made of them."""
        listed = self.dense.left_aside({(site.stack, site.layer) for site in self.sites})
        if not listed:
            return listed
        used = {info for entry in self.entries.values() for info in entry.lazy.sources()}
        others = {f"{c.label}: {t.name}" for c in self.dense.others for t in c.tensors.values() if t in used}
        return {name: why for name, why in listed.items() if name not in others}

    def predicts_further(self, name: str) -> bool:
        """Return whether a tensor is of a block that predicts further tokens and is in the result."""
        known = self.dense.family.further
        return known is not None and self.recipe.moe.mtp != "drop" and known.owns(name)

    @cached_property
    def _spared(self) -> dict[str, str]:
        return spared.of(self)

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of names, shapes, dtypes, how each tensor is made, config and source headers."""
        headers = [sorted((t.name, t.dtype, t.shape) for t in c.tensors.values()) for c in self.checkpoints]
        made = {name: [e.shape, e.dtype, e.lazy.describe()] for name, e in sorted(self.entries.items())}
        text = json.dumps([headers, self.config, made], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def stored_config(self, dtype: str | None = None) -> Config:
        """Return config.json as it is written, for weights in `dtype` (None: as planned).

        It names the kernel for the experts if the default of transformers cannot handle the length of their
        rows.
        """
        stored = dtype or str(self.config["dtype"])
        config = as_written({**self.config, "dtype": stored, "torch_dtype": stored})
        lengths = [length for site in self.all_sites for length in (site.width, site.hidden)]
        itemsize = FLOATS[BY_TORCH_NAME[stored]].itemsize
        return config | self.target.kernel(lengths, itemsize)

    @property
    def reads_otherwise(self) -> bool:
        """Whether the new model type opens the files of a tokenizer by another rule than the source's."""
        return self.target.tokenizer(self.dense.family) != self.dense.family.tokenizer

    @property
    def nbytes(self) -> int:
        """The number of bytes of all tensors."""
        return sum(e.nbytes for e in self.entries.values())

    @property
    def narrowed(self) -> str | None:
        """The torch name of the dtype that stored values were rounded to; None if they keep their dtype."""
        rounded = [
            e.dtype
            for e in self.entries.values()
            if any(not holds(e.dtype, info.dtype) for info in e.lazy.sources())
        ]
        return TORCH_NAMES[rounded[0]] if rounded else None

    @property
    def preserves_function(self) -> bool:
        """True if the MoE computes what the dense model computes, up to rounding."""
        return (
            bool(self.sites)
            and self.dense.whole is self.dense  # a successor is another model outside its experts
            and self.recipe.moe.pooling == "class_token"
            and all(self._preserves(site) for site in self.sites)
            and (self._wide or self.target.keeps_narrow_bits(self.dense.family))
            and (self.tower is None or self.tower.preserves_function)
        )

    def _preserves(self, site: Site) -> bool:
        if site.growth is not None:
            return site.growth.exact and (self._wide or not site.growth.cancels)
        router = self.target.routing(self.parts[site.stack].router)
        count, top_k = site.num_experts, site.top_k
        gate, up, _ = _moe_layer.factors(self.recipe, site)
        network = self.dense.feed_forward(site.layer, site.stack)
        gated = network.gate is not None
        return (
            (not network.response() or self._all_meet_all(site))
            and self.recipe.init.preserves(site)
            # An activation that is not linear must not see a factor.
            and gate == 1.0
            and (gated or up == 1.0)
            and router.reaches_all(count, top_k)
            and self.target.divides_exactly(site, router)
            and (
                router.sums_to_one(count, top_k)
                or (site.uniform_router and router.rescale)
                or site.even_weights
            )
            and (self._wide or all(map(_keeps_bits, _moe_layer.factors(self.recipe, site))))
        )

    def _all_meet_all(self, site: Site) -> bool:
        """Return whether every expert sees every token of a row and has all neurons of the dense network.

        The statistics of a response norm are taken over exactly these.
        """
        router, row = self.parts[site.stack].router, self.dense.lengths[site.stack]
        met = router.experts_per_token(site.num_experts, site.top_k, row)
        whole = site.width == site.dense_width and router.group in (0, row)
        return whole and not router.has_slots and met >= site.num_experts

    @cached_property
    def router_rows(self) -> dict[Site, RouterRows]:
        """The similarities of the rows of each router that starts from data."""
        found = {}
        for site in self.sites:
            router = self.parts[site.stack].router
            if site.growth is None and router.start.from_data and router.linear:
                weight = router.start.weight(site, router.rows(site.all_experts), "F32", router.std)
                found[site] = router_rows.seen(weight.all())
        return found

    @cached_property
    def parts(self) -> dict[str, Recipe]:
        """The recipe of each stack that has MoE layers, by stack name."""
        return {name: self.recipe.at(name) for name in dict.fromkeys(site.stack for site in self.sites)}

    @property
    def expert_counts(self) -> set[int]:
        """The numbers of experts of one width in a layer, which expert parallelism must divide."""
        counts = {n for site in self.all_sites for n in (site.num_experts, site.universal_experts)}
        return counts - {0}

    @property
    def moe_layers(self) -> list[int] | dict[str, list[int]]:
        """The numbers of the blocks that become MoE layers, by stack if there are several."""
        by_stack: dict[str, list[int]] = {}
        for site in self.all_sites:
            by_stack.setdefault(site.stack, []).append(site.layer)
        return by_stack.get("layers", []) if set(by_stack) <= {"layers"} else by_stack

    @property
    def _wide(self) -> bool:
        """True if weights are stored in a dtype wide enough to keep rounding below what is promised."""
        return all(e.dtype in ("F32", "F64", *COUNTERS) for e in self.entries.values())


def _keeps_bits(factor: float) -> bool:
    """Return whether multiplying by `factor` is exact, which holds for a power of two."""
    return math.frexp(factor)[0] == 0.5
