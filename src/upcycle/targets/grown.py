"""Growth: a Mixture of Experts with more experts than its source has (Expert Upcycling, arXiv 2604.19835).

The experts e = 0, 1, ..., E - 1 of a layer come first, and copies follow. Without noise all are the source's;
with it, an expert and its copy may have noise of opposite signs (`_opposite`). A copy has the row of the
router of its expert, so a token scores all m copies of an expert alike. A softmax over m E scores gives each
of them a share of 1 / m, and so does a softmax over the chosen ones. So a token that takes the m k best ones
takes all copies of its k best experts, with weights that sum to the weight that each had, whether the weights
are renormalised or not. With fewer than m k, it takes copies of one expert in place of other experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle.dense.mixtures import Mixture
from upcycle.errors import UpcycleError
from upcycle.families import Config, Family, Weights
from upcycle.families._training import Trained
from upcycle.families._weights import Initial, Weight
from upcycle.init import Growth, Site
from upcycle.targets import _moe_layer
from upcycle.targets._parents import even, growth
from upcycle.targets._with_experts import WithExperts
from upcycle.targets.native import Native
from upcycle.tensors.computed import Drawn, Fill, Noise
from upcycle.tensors.entries import Entry
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Concat, Take
from upcycle.tensors.positions import Given, Order

if TYPE_CHECKING:
    from upcycle.blueprints.blueprint import Blueprint
    from upcycle.dense.source import Dense
    from upcycle.recipe import Grow, Recipe


@dataclass(frozen=True, kw_only=True)
class Grown(WithExperts):
    """The architecture of the source with more experts in each layer."""

    summary: str = "the class of a source that has experts, with more of them"
    kind: ClassVar[str] = "grown"
    needs: ClassVar[str] = "[grow], a source with experts"

    native: Native
    model_type: str
    architecture: str

    @property
    def wide_router(self) -> Mapping[str, tuple[str, ...]]:  # type: ignore[override]
        return self.native.wide_router

    def admit(self, dense: Dense, recipe: Recipe) -> None:
        """Accept it: `_growing.resolved` has refused what does not fit."""

    def sites(self, dense: Dense, recipe: Recipe) -> tuple[Site, ...]:
        """Return the layers that have experts: those that grow, and dense ones if they get experts."""
        source, grow = _parts(dense, recipe)
        layers = range(source.config["num_hidden_layers"])
        chosen = sorted(source.moe_layers) if not grow.dense_layers else list(layers)
        _moe_layer.refuse_too_many_experts(recipe, {"layers": (recipe, len(chosen))})
        return tuple(_site(source, recipe, layer) for layer in chosen)

    def config(self, dense: Dense, recipe: Recipe, sites: tuple[Site, ...]) -> Config:
        """Return config.json of the source with the new numbers of experts."""
        source, grow = _parts(dense, recipe)
        native = self.native
        out = {
            **dense.raw,
            "architectures": [self.architecture],
            native.num_experts_field: recipe.moe.num_experts,
            native.top_k_field: recipe.moe.top_k,
        }
        if native.shared is not None:
            out |= native.shared.config(sites[0].shared_width, 0)
        if grow.dense_layers and native.dense_layers is not None:
            changed = native.dense_layers(source.config, frozenset(site.layer for site in sites))
            assert isinstance(changed, dict), "a layer of every kind can have experts"
            out |= changed
        return out

    def tensors(self, models: list[Dense], recipe: Recipe, sites: tuple[Site, ...]) -> dict[str, Lazy]:
        """Return every tensor by its name on disk."""
        source, grow = _parts(models[0], recipe)
        out = dict(source.tensors)
        (stack,) = source.stacks
        for site in sites:
            prefix = f"model.layers.{site.layer}"
            if site.growth is not None:
                for name in self.native.layout.write(source.experts[site.layer]):
                    del out[f"{prefix}.{name}"]
                grown = _layer(source, site, site.growth, grow)
                out |= {f"{prefix}.{name}": tensor for name, tensor in grown.items()}
            else:
                for name in [
                    name for name in source.layers[site.layer] if stack.owns(f"{prefix}.{name}", site.layer)
                ]:
                    del out[f"{prefix}.{name}"]
                made = _moe_layer.tensors([source], site, recipe, self.native, source.tensors)
                _moe_layer.add(out, prefix, made)
        return out

    def weights(self, dense: Dense, config: Config, entries: Mapping[str, Entry]) -> Weights:
        """Return what the family of the source says about a model of that config."""
        listed_ = dense.family.weights(dense.family.config(config))
        return {name: listed_[name] for name in entries if name in listed_}

    def made(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Ask the architecture."""
        return self.native.made(name, shape)

    def begins(
        self, family: Trained, dense: Dense, name: str, weight: Weight, entry: Entry
    ) -> Initial | None:
        """Ask the architecture."""
        return self.native.begins(family, dense, name, weight, entry)

    def in_memory(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Ask the architecture."""
        return self.native.in_memory(entries)

    def on_disk(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Ask the architecture."""
        return self.native.on_disk(entries)

    def tokenizer(self, family: Family) -> str:
        """Return the rule of the architecture."""
        return self.native.reader

    def kernel(self, lengths: Iterable[int], itemsize: int) -> Config:
        """Ask the architecture."""
        return self.native.kernel(lengths, itemsize)

    def warnings(self, built: Blueprint) -> list[str]:
        """Say what becomes of the function, and what routers do with copies."""
        source, grow = _parts(built.dense, built.recipe)
        moe, said = built.recipe.moe, []
        grown = [site.growth for site in built.sites if site.growth]
        if not all(layer.exact for layer in grown):
            said.append(_why_not(source, grow, grown, moe.num_experts, moe.top_k))
        elif any(layer.cancels for layer in grown) and not built.preserves_function:
            said.append(
                "noise of opposite signs cancels up to the rounding of weights, which is too much here to "
                "promise the function; dtype = float32 keeps it"
            )
        if moe.num_experts > source.num_experts and not (grow.noise or grow.router_noise):
            said.append(
                "an expert and its copies are alike, and so are their rows of the router: those that tokens "
                "take together have the same gradients, and training never tells them apart; grow.noise = "
                "0.1 does"
            )
        return said

    def origin(self, recipe: Recipe) -> str:
        """Return how the experts were made more."""
        assert recipe.grow is not None
        chosen = "every expert copied" if recipe.grow.choose == "all" else "the most used experts copied"
        return f"grown to {recipe.moe.num_experts} experts, {chosen}"

    @classmethod
    def way(cls, recipe: Mapping[str, Any]) -> str:
        """Return its name, because no initialisation is asked for the experts."""
        return cls.kind

    @classmethod
    def made_by(cls, recipe: Mapping[str, Any]) -> str:
        """Return the end of a sentence that says how a model of a recorded recipe was made."""
        return f", grown to {recipe['moe']['num_experts']} experts"

    @classmethod
    def moments(cls, recipe: Recipe) -> Recipe:
        """Return the recipe that copies the moments of experts and rows as it copies these, without noise.

        Raises `UpcycleError` if something is new that has no moments.
        """
        assert recipe.grow is not None
        if recipe.grow.shared_width or recipe.grow.dense_layers:
            raise UpcycleError(
                "optimizer.carry_state = true: grow.shared_width and grow.dense_layers make parts of tensors "
                "anew, which have no moments; set it to false"
            )
        grow = dataclasses.replace(recipe.grow, noise=0.0, router_noise=0.0)
        return dataclasses.replace(recipe, grow=grow, dtype="source")

    def snippet(self, config: Mapping[str, Any]) -> str:
        """Return Python code that opens the folder."""
        return self.native.snippet(config)


target = Grown


def of(dense: Dense, recipe: Recipe) -> Grown:
    """Return the class of the source with more experts. Raises `UpcycleError` if the recipe does not grow."""
    if not isinstance(dense, Mixture):
        raise UpcycleError(
            "moe.target = grown is what a section [grow] makes; add it, or take the target out"
        )
    native = dense.native
    return Grown(native=native, model_type=native.model_type, architecture=native.architecture)


def _parts(dense: Dense, recipe: Recipe) -> tuple[Mixture, Grow]:
    assert isinstance(dense, Mixture)
    assert recipe.grow is not None
    return dense, recipe.grow


def _site(source: Mixture, recipe: Recipe, layer: int) -> Site:
    """Return one layer with experts."""
    moe, router, grows = recipe.moe, recipe.router, layer in source.moe_layers
    hidden = source.config["hidden_size"]
    width = source.config[source.native.width_field]
    shared = source.shared_width if recipe.grow is None else recipe.grow.shared_width or source.shared_width
    site = Site(
        layer=layer,
        blocks=source.config["num_hidden_layers"],
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        granularity=1 if grows else moe.granularity,
        dense_width=width if grows else source.config["intermediate_size"],
        hidden=hidden,
        dense_hidden=hidden,
        shared_width=shared,
        seed=recipe.seed,
        grouped_router=router.start.groups,
        uniform_router=not grows and router.start.uniform(router.std),
        gate_sum=1.0 if grows or not router.rescale else router.gate_sum(moe.num_experts, moe.top_k),
        growth=growth(source, recipe, layer) if grows else None,
    )
    if not grows:
        router.start.check(moe.num_experts, moe.granularity)
        recipe.init.check(site)
        if shared > site.dense_width:
            raise UpcycleError(
                f"grow.dense_layers: the shared expert has {shared} neurons, and a dense layer "
                f"has {site.dense_width} to start it from; leave these layers dense"
            )
    return site


def _layer(source: Mixture, site: Site, growth: Growth, grow: Grow) -> dict[str, Lazy]:
    """Return the experts, the router and what has a number for each expert, by their names in the layer."""
    native, layer, old = source.native, source.layers[site.layer], source.experts[site.layer]
    copies = Given(growth.parents[len(old) :])
    experts = [old[p] for p in growth.parents]
    if grow.noise:
        noises = _opposite(growth.parents) if grow.noise_on == "down" else _free(growth.parents)
        for e, (stream, sign) in noises.items():
            experts[e] = _noisy(experts[e], site, grow, stream, sign)
    out = native.layout.write(experts)
    router = layer[native.router]
    out[native.router] = router
    for name in (native.router, *(native.extra(1, "F32") if native.extra else ())):
        more: Lazy = Take(layer[name], 0, copies)
        if name == native.router and grow.router_noise and len(copies):
            everywhere = Order(site.key("grown rows"), len(copies), 0, len(copies), sort=True)
            more = Noise(more, 0, grow.router_noise, True, everywhere, site.key("router", "noise"))
        out[name] = Concat((layer[name], more), 0) if len(copies) else layer[name]
    if native.shared is not None and site.shared_width > source.shared_width:
        out |= native.shared.write(_widened(native.shared.read(layer), source, site))
    return out


def _widened(shared: FeedForward, source: Mixture, site: Site) -> FeedForward:
    """Return the shared expert with more neurons, which read like new ones and have no output yet."""
    count, hidden, dtype = site.shared_width - source.shared_width, site.hidden, shared.down.dtype
    std = source.family.deviation(source.config)

    def more(name: str, axis: int, matrix: Lazy) -> Lazy:
        if name == "down":
            return Concat((matrix, Fill((hidden, count), dtype, 0.0)), axis)
        return Concat((matrix, Drawn((count, hidden), dtype, "normal", std, site.key("shared", name))), axis)

    return shared.map(more)


def _opposite(parents: tuple[int, ...]) -> dict[int, tuple[int, float]]:
    """Return the experts that get noise, each with the number of its stream and its sign.

    The copies of an expert, itself included, form pairs of one stream and opposite signs, from the last copy
    backwards. If their number is odd, the source's own expert is left alone.
    """
    out: dict[int, tuple[int, float]] = {}
    for parent in sorted(set(parents)):
        same = [e for e, p in enumerate(parents) if p == parent][::-1]
        for plus, minus in zip(same[::2], same[1::2], strict=False):
            out |= {plus: (plus, 1.0), minus: (plus, -1.0)}
    return out


def _free(parents: tuple[int, ...]) -> dict[int, tuple[int, float]]:
    """Return the same for noise that is independent in each copy; the source's own experts get none."""
    return {e: (e, 1.0) for e in range(len(set(parents)), len(parents))}


def _noisy(expert: FeedForward, site: Site, grow: Grow, stream: int, sign: float) -> FeedForward:
    """Return an expert with noise on its matrices, or on the last one alone."""
    neurons = Order(site.key("grown neurons", stream), expert.width, 0, expert.width, sort=True)

    def noisy(name: str, axis: int, matrix: Lazy) -> Lazy:
        if name != "down" and grow.noise_on == "down":
            return matrix
        return Noise(matrix, axis, sign * grow.noise, True, neurons, site.key(name, "noise", stream))

    return expert.map(noisy)


def _why_not(source: Mixture, grow: Grow, layers: Iterable[Growth], count: int, top_k: int) -> str:
    """Say why the function is not kept, and which key alone would keep it, if one would."""
    old, kept = source.num_experts, source.top_k
    whole = kept * count // old
    if not all(even(layer.parents) for layer in layers):
        keeps = count % old == 0 and top_k == whole and not grow.noisy
        return (
            "experts have different numbers of copies, so a token weighs them otherwise than before: the "
            f"function is not kept{'; grow.choose = all keeps it' if keeps else ''}"
        )
    if top_k != whole:
        return (
            f"a token takes {top_k} experts, and all copies of the {kept} that it took would be {whole}: "
            f"copies of one expert take the places of others, so the function is not kept"
            f"{'' if grow.noisy else f'; grow.top_k = {whole} keeps it'}"
        )
    return (
        "copies have noise, so the function is kept only roughly; grow.noise_on = down without "
        "grow.router_noise keeps it"
    )
