"""The upcycled target: a dense class of transformers with `nn.MoE` in some of its blocks.

It serves routers and models for which transformers has no MoE class. Names on disk are the dense model's,
except those of the networks that become MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from upcycle import families
from upcycle.errors import UpcycleError
from upcycle.families import Config, Stack
from upcycle.families._training import Trained
from upcycle.families._weights import AsMade, Bias, Constant, Initial, Matrix, Scale, Weight
from upcycle.families._wrappers import Wrapper
from upcycle.init import Site
from upcycle.nn import upcycled_config
from upcycle.nn.upcycled_config import CLASS_PREFIX, PREFIX
from upcycle.targets import Block, _moe_layer
from upcycle.targets._layouts import Shared, SharedExpert, Stacked
from upcycle.targets._with_experts import WithExperts
from upcycle.tensors.computed import Drawn, Fill
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.blueprints.blueprint import Blueprint
    from upcycle.dense.source import Dense
    from upcycle.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Upcycled(WithExperts):
    """A dense class with MoE layers in it."""

    summary: str = "the dense class itself with MoE layers in it; any family, any router"
    needs: ClassVar[str] = "import upcycle, to open it"
    gathers_ends: ClassVar[bool] = False
    has_own_routers: ClassVar[bool] = True
    wide_router = MappingProxyType({"mixed": (".router.",)})
    layout: ClassVar[Stacked] = Stacked()
    router: ClassVar[str] = "router.weight"
    shared: ClassVar[Shared] = SharedExpert(path="shared", combine="sum", config=lambda width, count: {})

    model_type: str
    architecture: str

    def admit(self, dense: Dense, recipe: Recipe) -> None:
        """Raise `UpcycleError` if the routers cannot be used in the stacks of the dense model."""
        _moe_layer.refuse_look_ahead(dense, recipe)
        family, lengths = dense.family, dense.family.lengths(dense.config)
        for stack in dense.stacks:
            part = recipe.at(stack.name)
            if part.moe.universal_experts and not part.router.has_slots:
                raise UpcycleError(
                    f"moe.universal_experts needs a router that fills slots, spherical or soft; "
                    f"{part.router.name} sends tokens to experts of one width"
                )
            if _moe_layer.chosen_layers(part, stack):
                _refuse_mixed(family.model_type, stack, part)
                part.router.check(part.moe.num_experts, part.moe.top_k, lengths[stack.name])
            elif stack.name in recipe.parts and stack.total > stack.count:
                raise UpcycleError(
                    f"[{stack.name}] has keys for experts, and moe.layers chooses no block of that stage; "
                    f"take it out, or choose other layers"
                )
        if recipe.moe.pooling == "mean" and not family.class_tokens:
            raise UpcycleError(
                f"moe.pooling = mean is for heads on a class token, in vit and deit; {family.model_type} "
                f"has none; leave its head as it is: --set moe.pooling=class_token"
            )
        if unknown := [name for name in recipe.parts if name not in {s.name for s in dense.stacks}]:
            named = ", ".join(s.name for s in dense.stacks)
            raise UpcycleError(
                f"[{unknown[0]}] is a stack of blocks that {family.model_type} does not have; it has {named}"
            )

    def sites(self, dense: Dense, recipe: Recipe) -> tuple[Site, ...]:
        """Return the blocks that become MoE layers, stack by stack."""
        return _moe_layer.sites(recipe, dense, self)

    def config(self, dense: Dense, recipe: Recipe, sites: tuple[Site, ...]) -> Config:
        """Return the dense config with an entry in `moe` for each stack that has MoE layers."""
        entries = []
        for stack in dense.stacks:
            if mine := [site for site in sites if site.stack == stack.name]:
                network = dense.feed_forward(mine[0].layer, stack.name)
                entries.append(upcycled_config.entry(stack, mine, recipe.at(stack.name), network))
        pooled = dense.family.class_tokens if recipe.moe.pooling == "mean" else 0
        family = dense.family
        options = family.class_options(dense.config, dense.tensors)
        return upcycled_config.config(dense.raw, family.model_type, dense.own_class, entries, pooled, options)

    def tensors(self, models: list[Dense], recipe: Recipe, sites: tuple[Site, ...]) -> dict[str, Lazy]:
        """Return every tensor by its name on disk; a name that two rules define is a bug of ours."""
        every = _moe_layer.averaged(models, recipe)
        stacks = {stack.name: stack for stack in models[0].stacks}
        parts = {name: recipe.at(name) for name in stacks}
        out = {
            name: tensor
            for name, tensor in every.items()
            if not any(stacks[site.stack].owns(name, site.layer) for site in sites)
        }
        for site in sites:
            made = _moe_layer.tensors(models, site, parts[site.stack], self, every)
            _moe_layer.add(out, stacks[site.stack].path.format(i=site.layer), made)
        return out

    def beside_router(
        self, recipe: Recipe, site: Site, norm: Mapping[str, Lazy], dtype: str
    ) -> dict[str, Lazy]:
        """Return the router's own tensors besides its weight."""
        return _router_tensors(recipe, site, norm, dtype)

    def draws(self, name: str) -> bool:
        """Return whether the tensor belongs to a router."""
        return ".router." in name

    @classmethod
    def opened(cls, config: Mapping[str, Any]) -> Self | None:
        """Return the upcycled twin of the class that config.json names."""
        dense = upcycled_config.dense_type(config)
        named = config.get("architectures")
        name = str(named[0]) if isinstance(named, list) and named else ""
        return None if dense is None else cls(model_type=PREFIX + dense, architecture=name)

    @property
    def root(self) -> str:  # type: ignore[override]
        """What the names of the base model's tensors begin with."""
        return families.find(self.model_type.removeprefix(PREFIX)).root

    @property
    def base_architecture(self) -> str:
        """The class itself, because the dense class has been chosen already."""
        return self.architecture

    def within(self, model_type: str, wrapper: Wrapper) -> tuple[str, str]:
        """Return the wrapper itself if it builds any text model, or its upcycled twin."""
        own, architecture = super().within(model_type, wrapper)
        return (own, architecture) if wrapper.free else (PREFIX + own, CLASS_PREFIX + architecture)

    @classmethod
    def dense_class(cls, architecture: str) -> str:
        """Return the name without what upcycling adds."""
        return architecture.removeprefix(CLASS_PREFIX)

    def dense_config(self, config: Mapping[str, Any]) -> Config | None:
        """Return the config without what upcycling adds."""
        return upcycled_config.dense_config(config)

    def layers(self, config: Mapping[str, Any], tensors: Mapping[str, Lazy], folder: Path) -> list[Block]:
        """Return the blocks of every stack, located by the family and the list `moe` of config.json."""
        family = families.find(self.model_type.removeprefix(PREFIX))
        whole = family.config(upcycled_config.dense_config(config))
        moe = _moe_layers(config, folder)
        out = []
        for stack in family.stacks(whole):
            for i in stack.numbers:
                if (stack.name, i) in moe:
                    out.append(_block(stack, i, tensors))
                else:
                    up = family.feed_forward(whole, i, tensors, stack.name).up
                    out.append(Block(stack=stack.name, layer=i, experts=[], router=None, up=up))
        return out

    def refuse_layout(self, config: Mapping[str, Any], *, tp_size: int, ep_size: int) -> None:
        """Refuse tensor parallelism, and expert parallelism for experts that see all tokens of an image."""
        if tp_size > 1:
            raise UpcycleError(
                "tensor parallelism (tp) is for native MoE; fsdp and ep share an upcycled model out"
            )
        if ep_size > 1 and any(entry.get("response_norm") for entry in config["moe"]):
            raise UpcycleError(
                "experts with a response norm (ConvNeXt V2) look at all tokens of an image that come to "
                "them, and expert parallelism does not say which those are; set ep to 1: fsdp shares "
                "parameters out"
            )

    def made(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Return the kind of a new tensor: a matrix, or a vector of experts, which starts at 0."""
        if self.draws(name):
            return Matrix(shape) if len(shape) > 1 else Weight(shape)
        leaf = name.rpartition(".")[2]
        if leaf in self.layout.matrices:
            return Matrix(shape)
        return Bias(shape) if leaf.endswith("bias") else Scale(shape, 0.0)

    def begins(
        self, family: Trained, dense: Dense, name: str, weight: Weight, entry: Entry
    ) -> Initial | None:
        """A router starts as the recipe says, an expert as the dense network that it is made of."""
        sources = [info.name for info in entry.lazy.sources()]
        if self.draws(name):  # a norm copied from the dense model starts as one that only normalises
            if not sources:
                return AsMade()
            if len(entry.shape) == 1:
                return Constant(float(name.endswith("weight")))
            return weight.initial(family.deviation(dense.config))  # rows that were neurons
        if name in dense.weights:
            return family.initial(dense.config, name, weight)
        own = next((source for source in sources if source in dense.weights), None)
        if own is not None and f".{self.layout.path}." in name:
            return family.initial(dense.config, own, dense.weights[own])
        return weight.initial(family.deviation(dense.config))

    def warnings(self, built: Blueprint) -> list[str]:
        """Warn if the first block of a stack becomes an MoE layer."""
        begin = {stack.name for stack in built.dense.stacks if not stack.first}
        if not any(site.layer == 0 and site.stack in begin for site in built.sites):
            return []
        return [
            "the first block is among those that become MoE, which was found to train badly (Sparse "
            "Upcycling, B.4); leave it dense, as every_other and last_half do"
        ]

    def snippet(self, config: Mapping[str, Any]) -> str:
        """Return Python code that opens the folder."""
        return (
            "import upcycle  # makes the architecture known to transformers' Auto classes\n\n"
            'model = upcycle.open("path/to/this/folder")\n'
        )


target = Upcycled


def of(dense: Dense, recipe: Recipe) -> Upcycled:
    """Return the upcycled twin of the dense class."""
    return Upcycled(model_type=PREFIX + dense.family.model_type, architecture=CLASS_PREFIX + dense.own_class)


def _block(stack: Stack, i: int, tensors: Mapping[str, Lazy]) -> Block:
    """Return a block with experts."""
    prefix = stack.path.format(i=i) + "."
    below = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    experts = Stacked().read(below)
    if not experts:
        raise KeyError(prefix + "experts.down_proj")
    others = {
        f"experts{n.removeprefix('universal')}": t for n, t in below.items() if n.startswith("universal.")
    }
    return Block(
        stack=stack.name,
        layer=i,
        experts=experts,
        router=below["router.weight"],
        up=experts[0].up,
        universal=Stacked().read(others) if others else (),
    )


def _moe_layers(config: Mapping[str, Any], folder: Path) -> set[tuple[str, int]]:
    """Return the blocks with experts, by stack and number, that config.json lists."""
    entries = config["moe"]
    whole = isinstance(entries, list) and all(
        isinstance(e, dict)
        and isinstance(e.get("stack"), str)
        and isinstance(e.get("layers"), list)
        and all(type(i) is int for i in e["layers"])
        for e in entries
    )
    if not whole:
        raise UpcycleError(f"{folder}/config.json: `moe` is not the list that upcycle writes")
    return {(e["stack"], i) for e in entries for i in e["layers"]}


def _router_tensors(recipe: Recipe, site: Site, norm: Mapping[str, Lazy], dtype: str) -> dict[str, Lazy]:
    """Return the tensors of a router besides its weight, by their names below the layer.

    `norm` has weight and bias of the norm before the network, if there is one.
    """
    out: dict[str, Lazy] = {}
    for name, extra in recipe.router.extra(site.all_experts, site.hidden).items():
        if extra.inherited is not None:
            if extra.inherited not in norm:
                raise UpcycleError(
                    "router.query_norm = inherited needs a LayerNorm with weight and bias before the "
                    "network, and this model has none; set router.query_norm = fresh"
                )
            out[f"router.{name}"] = norm[extra.inherited]
        elif extra.std:
            rows, columns = extra.shape
            out[f"router.{name}"] = Drawn(
                (rows, columns), dtype, "normal", extra.std, site.key("router", name)
            )
        else:
            out[f"router.{name}"] = Fill(extra.shape, dtype, extra.value)
    return out


def _refuse_mixed(model_type: str, stack: Stack, recipe: Recipe) -> None:
    """Refuse a router that compares or mixes the tokens of a row, if a row can have several images."""
    if stack.joined and not recipe.router.causal:
        raise UpcycleError(
            f"router {recipe.router.name} compares or mixes the tokens of a row, and a row of {model_type} "
            f"has all images of a batch; use top_k or sigmoid (for a vision tower, under [vision.router])"
        )
