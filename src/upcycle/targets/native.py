"""A native target: an MoE architecture that transformers has. `natives/` has one file for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from upcycle.checkpoints import dtypes
from upcycle.errors import UpcycleError, listed
from upcycle.families import Config, Family
from upcycle.families._decoder import Decoder
from upcycle.families._training import Trained
from upcycle.families._weights import AsMade, Initial, Matrix, Weight
from upcycle.families._wrappers import Wrapper
from upcycle.init import Site
from upcycle.nn import kernels, routers
from upcycle.nn.routers import Router
from upcycle.targets import Block, _moe_layer, _small_scores, natives
from upcycle.targets._clients import Clients, reasons
from upcycle.targets._layouts import Fused, Layout, Shared
from upcycle.targets._with_experts import WithExperts
from upcycle.tensors.entries import Entry
from upcycle.tensors.lazy import Lazy

if TYPE_CHECKING:
    from upcycle.blueprints.blueprint import Blueprint
    from upcycle.dense.source import Dense
    from upcycle.recipe import Recipe

COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "tie_word_embeddings",
    "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache",
)  # fmt: skip

TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, kw_only=True)
class Growing:
    """The facts that are needed to read a checkpoint of an architecture, besides its names."""

    like: str  # the dense family that has its blocks outside the experts
    assumed: Mapping[str, Any]  # what transformers assumes for keys missing from config.json
    other_names: Mapping[str, str] = field(default_factory=dict)  # keys that transformers writes instead
    # the layers that have experts, by a config with `assumed` in place; None: all of them
    moe_layers: Callable[[Config], frozenset[int]] | None = None
    only: Mapping[str, Any] = field(default_factory=dict)  # values of config.json without which it is refused
    shared_width: Callable[[Config], int] = lambda _: 0  # neurons of the shared expert; 0 if there is none
    held: Fused | None = None  # its experts under the names in which transformers holds them
    held_router: str = ""  # the router, likewise


@dataclass(frozen=True, kw_only=True)
class Native(WithExperts):
    """An MoE architecture: where its tensors and its settings go."""

    model_type: str
    architecture: str  # the transformers class
    summary: str
    base: str = ""  # the class without a head, if its name does not follow from `architecture`
    layout: Layout
    router: str  # name of the router weight [E, H] below the layer's prefix
    blocks: str = "model.layers."  # what the names of the layers begin with
    part: str = "mlp"  # a network that stays dense, by its name in a layer
    network: Mapping[str, str] = field(default_factory=lambda: dict(Decoder.network))  # its matrices
    fields: tuple[str, ...]  # config fields besides COMMON that the dense config gives
    num_experts_field: str = "num_experts"
    top_k_field: str = "num_experts_per_tok"
    width_field: str = "intermediate_size"
    scores: str = "top_k"  # our router whose weights are those of the class
    least_experts: int = 1  # with fewer in a layer, the class cannot be run
    renormalizes: Literal["always", "optional"]  # optional: set by `norm_topk_prob`
    added: float = 0.0  # what its class adds to the sum of a token's sigmoids before it divides by it
    shared: Shared | None = None
    dense_layers: Callable[[Config, frozenset[int]], Config | str] | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    extra: Callable[[int, str], dict[str, Lazy]] | None = None  # (E, dtype) -> more tensors of an MoE layer
    wide_router: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    growing: Growing | None = None  # how a checkpoint of it is read; None: it cannot be a source
    reader: str = ""  # how transformers opens its tokenizer; see `Family.tokenizer`
    # rewrites what the hub's configs spell differently
    finish: Callable[[Config], Config] = lambda config: config
    clients: Clients = field(default_factory=dict)  # what other programs do not compute, or not open

    @property
    def base_architecture(self) -> str:
        """The class without a head."""
        return self.base or super().base_architecture

    def admit(self, dense: Dense, recipe: Recipe) -> None:
        """Raise `UpcycleError` if the architecture does not fit.

        It must compute the same function as the dense model and be able to route as the recipe asks.
        """
        family, name = dense.family, self.model_type
        if reason := family.refusal(dense.config, name):
            raise UpcycleError(
                f"this {family.model_type} checkpoint cannot become {name} exactly: {reason}; "
                f"moe.target = upcycled takes it"
            )
        if recipe.moe.universal_experts:
            raise UpcycleError(f"moe.universal_experts is for moe.target = upcycled; {name} has none")
        if recipe.moe.pooling != "class_token":
            raise UpcycleError(f"moe.pooling is for moe.target = upcycled; {name} has no images")
        if recipe.parts:
            table = next(iter(recipe.parts))
            raise UpcycleError(f"[{table}] is for moe.target = upcycled; {name} has one stack of blocks")
        if own := recipe.router.beyond_native():
            raise UpcycleError(
                f"{name} routes as transformers does and cannot keep {', '.join(own)}; use moe.target = "
                f"upcycled"
            )
        if recipe.moe.num_experts < self.least_experts:
            raise UpcycleError(
                f"{name} adds up the {self.least_experts} best scores of a group of experts, so it takes "
                f"{self.least_experts} experts or more; moe.num_experts is {recipe.moe.num_experts}"
            )
        if self.renormalizes == "always" and not recipe.router.normalize:
            raise UpcycleError(f"{name} always renormalises; router.normalize = false cannot be kept")

    def routing(self, router: Router) -> Router:
        """Return our router whose weights are those of the class, with the keys that all routers have."""
        if router.name == self.scores:
            return router
        return routers.find(self.scores)(**{key: getattr(router, key) for key in Router.common})

    def divides_exactly(self, site: Site, router: Router) -> bool:
        """Return whether what is `added` to the sum of a token's scores hardly ever shows."""
        return not self.added or _small_scores.are_rare(site, router, self.added)

    def layer_names(self) -> Native:
        """Return itself."""
        return self

    def within(self, model_type: str, wrapper: Wrapper) -> tuple[str, str]:
        """Return the wrapper itself if it builds any text model, or its twin for this one."""
        if wrapper.free:
            return super().within(model_type, wrapper)
        if (twin := wrapper.twins.get(self.model_type)) is not None:
            return twin
        held = ", ".join([*wrapper.twins, "upcycled"])
        raise UpcycleError(
            f"a {model_type} of transformers cannot hold a {self.model_type}; moe.target can be {held}, and "
            f"moe.part_only (--part-only text) takes the text model out of it"
        )

    def sites(self, dense: Dense, recipe: Recipe) -> tuple[Site, ...]:
        """Return the layers that become MoE layers."""
        return _moe_layer.sites(recipe, dense, self)

    def config(self, dense: Dense, recipe: Recipe, sites: tuple[Site, ...]) -> Config:
        """Return config.json in this architecture's spelling, without its dtype."""
        given = dense.family.native_config(dense.config, self.model_type)
        out: Config = {"architectures": [self.architecture], "model_type": self.model_type}
        out |= {name: given[name] for name in (*COMMON, *self.fields) if name in given}
        # A token that config.json does not name is no token of the MoE, whatever its class assumes.
        out |= {name: None for name in TOKENS if name in out and name not in dense.raw}
        out |= {
            self.num_experts_field: recipe.moe.num_experts,
            self.top_k_field: recipe.moe.top_k,
            self.width_field: sites[0].width,
            "router_aux_loss_coef": 0.001,
            "output_router_logits": False,
        }
        if self.renormalizes == "optional":
            out["norm_topk_prob"] = recipe.router.normalize
        if self.shared:
            out |= self.shared.config(sites[0].shared_width, recipe.moe.shared_experts)
        out = self.finish(out | _rope(given["rope_parameters"]) | dict(self.constants))
        return out | self._which_layers(dense, recipe, frozenset(site.layer for site in sites))

    def _which_layers(self, dense: Dense, recipe: Recipe, layers: frozenset[int]) -> Config:
        """Return the keys of config.json that say which layers have experts."""
        if self.dense_layers is not None:
            chosen = self.dense_layers(dense.config, layers)
            if isinstance(chosen, str):
                raise UpcycleError(f"moe.layers = {recipe.moe.layers}: {chosen}")
            return chosen
        if len(layers) != dense.config["num_hidden_layers"]:
            able = natives.with_dense_layers()
            can = [name for name in fitting(dense.family, dense.config) if name in able]
            raise UpcycleError(
                f"{self.model_type} has experts in every layer and cannot keep dense ones; use moe.layers = "
                f"all, or moe.target = {' or '.join([*can, 'upcycled'])}"
            )
        return {}

    def tensors(self, models: list[Dense], recipe: Recipe, sites: tuple[Site, ...]) -> dict[str, Lazy]:
        """Return every tensor by its name on disk; a name that two rules define is a bug of ours."""
        family, config = models[0].family, models[0].config
        every = _moe_layer.averaged(models, recipe)
        out = family.backbone(config, self.model_type, every)
        moe = {site.layer: site for site in sites}
        for layer in models[0].stacks[0].numbers:
            if layer in moe:
                made = _moe_layer.tensors(models, moe[layer], recipe, self, every)
            else:
                network = family.feed_forward(config, layer, every)
                made = {
                    f"{self.part}.{self.network[name]}.weight": m for name, m in network.matrices().items()
                }
            _moe_layer.add(out, f"{self.blocks}{layer}", made)
        return out

    def beside_router(
        self, recipe: Recipe, site: Site, norm: Mapping[str, Lazy], dtype: str
    ) -> dict[str, Lazy]:
        """Return the tensors of a layer besides router weight and experts."""
        return self.extra(site.num_experts, dtype) if self.extra else {}

    @classmethod
    def listed(cls) -> list[dict[str, str]]:
        """Return a row for every architecture."""
        found = (natives.find(name) for name in natives.names())
        return [
            {
                "name": native.model_type,
                "summary": native.summary,
                "needs": "experts in every layer" if native.dense_layers is None else "nothing",
            }
            for native in found
        ]

    @classmethod
    def opened(cls, config: Mapping[str, Any]) -> Self | None:
        """Return the architecture that config.json names."""
        name = config.get("model_type")
        found = natives.find(str(name)) if name in natives.names() else None
        return found if isinstance(found, cls) and found.holds_experts(config) else None

    def layers(self, config: Mapping[str, Any], tensors: Mapping[str, Lazy], folder: Path) -> list[Block]:
        """Return the blocks by the numbers in the names of their tensors."""
        by_layer: dict[int, dict[str, Lazy]] = {}
        for name, tensor in tensors.items():
            if name.startswith(self.blocks):
                layer, _, rest = name.removeprefix(self.blocks).partition(".")
                if not (layer.isascii() and layer.isdecimal()):
                    raise UpcycleError(f"{folder} holds {name!r}: {layer!r} is no number of a layer")
                by_layer.setdefault(int(layer), {})[rest] = tensor
        if not by_layer:
            raise UpcycleError(f"{folder} has no tensors of layers ({self.blocks}N. ...)")
        return [self._block(number, layer) for number, layer in sorted(by_layer.items()) if self.has(layer)]

    def has(self, tensors: Mapping[str, Lazy]) -> bool:
        """Return whether a layer, of which these are the tensors, has a network."""
        return True

    def holds_experts(self, config: Mapping[str, Any]) -> bool:
        """Return whether a model of this class and config.json has experts; the same class may have none."""
        return config.get(self.num_experts_field) != 0

    def _block(self, number: int, tensors: Mapping[str, Lazy]) -> Block:
        """Return one block, given its tensors by their names in it."""
        experts = self.layout.read(tensors)
        router = tensors[self.router] if experts else None
        up = experts[0].up if experts else tensors[f"{self.part}.{self.network[self.layout.first]}.weight"]
        return Block(stack="layers", layer=number, experts=experts, router=router, up=up)

    def made(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Return the kind of a new tensor: a matrix, or a constant of the architecture."""
        return Weight(shape) if self._is_constant(name, shape) else Matrix(shape)

    def begins(
        self, family: Trained, dense: Dense, name: str, weight: Weight, entry: Entry
    ) -> Initial | None:
        """Constants of the architecture keep their values; its matrices start as the family's do."""
        if name in dense.weights:
            return family.initial(dense.config, name, weight)
        if self._is_constant(name, weight.shape):
            return None if any(True for _ in entry.lazy.sources()) else AsMade()
        return weight.initial(family.deviation(dense.config))

    def _is_constant(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether the architecture, not the dense model, defines the tensor."""
        extra = self.extra(1, "F32") if self.extra else {}
        return len(shape) == 1 or name.endswith(tuple(extra))

    def in_memory(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return `entries` with each layer's experts in the two tensors in which transformers holds them.

        With the names on disk, the loader would read every expert on every rank and stack them afterwards.
        """
        return self._by_layer(entries, self.layout.fuse)

    def on_disk(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Return `entries` with each layer's experts as they are on disk; the inverse of `in_memory`."""
        return self._by_layer(entries, self.layout.unfuse)

    def _by_layer(
        self, entries: Mapping[str, Entry], moved: Callable[[Mapping[str, Lazy]], dict[str, Lazy]]
    ) -> dict[str, Entry]:
        """Return `entries` with those of each layer `moved`.

        A tensor that is made of tensors of several types has the narrowest type that holds all their values.
        """
        layers: dict[str, dict[str, Entry]] = {}
        out: dict[str, Entry] = {}
        for name, entry in entries.items():
            if name.startswith(self.blocks):
                number, _, rest = name.removeprefix(self.blocks).partition(".")
                layers.setdefault(f"{self.blocks}{number}", {})[rest] = entry
            else:
                out[name] = entry
        for prefix, layer in layers.items():
            lazies = moved({name: entry.lazy for name, entry in layer.items()})
            common = dtypes.common({entry.dtype for name, entry in layer.items() if name not in lazies})
            for name, lazy in lazies.items():
                dtype = layer[name].dtype if name in layer else common
                out[f"{prefix}.{name}"] = Entry(lazy, dtype)
        return out

    def keeps_narrow_bits(self, family: Family) -> bool:
        """Return whether no weight is rescaled on its way into this architecture."""
        return family.exact_when_narrow

    def tokenizer(self, family: Family) -> str:
        """Return the rule of this architecture."""
        return self.reader

    def norm_identity(self, family: Family) -> float:
        """Return 1, because norms of native MoE classes multiply by their weight."""
        return 1.0

    def kernel(self, lengths: Iterable[int], itemsize: int) -> Config:
        """Return the setting that runs experts one by one if grouped products cannot take their rows.

        Grouped products are transformers' own choice.
        """
        if kernels.take_groups(lengths, itemsize):
            return {}
        return {kernels.KEY: kernels.ONE_BY_ONE}

    def warnings(self, built: Blueprint) -> list[str]:
        """Warn about unrequested shared experts, clients that compute something else, and left-out keys."""
        out = []
        if built.recipe.moe.shared_experts == 0 and built.shared_width:
            out.append(
                f"{self.model_type} cannot be without a shared expert: one of {built.shared_width} "
                f"neurons is there with a zero down projection, and training may use it"
            )
        config = built.target.own_config(built.config)
        within, can_untie = built.target.is_around, built.dense.can_untie
        found = reasons(self.clients, config, self.model_type, within=within, can_untie=can_untie)
        for client, why in found.items():
            out.append(f"{client} {why}: it will not reproduce this model's function")
        if unknown := built.dense.unknown_keys:
            out.append(
                f"config.json has keys that a {built.dense.family.model_type} of transformers does not read; "
                f"left out: {listed(list(unknown), 5)}"
            )
        return out

    def snippet(self, config: Mapping[str, Any]) -> str:
        """Return Python code that opens the folder."""
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        )


target = Native


def fitting(family: Family, config: Config) -> list[str]:
    """Return the native targets of a family that compute the same as this config, the default first."""
    return [name for name in family.natives if family.refusal(config, name) is None]


def of(dense: Dense, recipe: Recipe) -> Native:
    """Return the architecture that `moe.target` names; `native` is the first that fits the config.

    A router that no decoder can have is refused first, because moe.target = upcycled does not take it either.
    """
    _moe_layer.refuse_look_ahead(dense, recipe)
    family, asked = dense.family, recipe.moe.target
    if not family.natives:
        raise UpcycleError(
            f"{family.model_type} has no exact native MoE: {family.no_native}; use moe.target = upcycled"
        )
    fits = fitting(family, dense.config)
    name = next(iter(fits), family.natives[0]) if asked == "native" else asked
    if name not in family.natives:
        if (reason := family.inexact.get(name)) is not None:
            raise UpcycleError(f"{family.model_type} -> {name} does not compute the same: {reason}")
        allowed = ", ".join([*family.natives, "upcycled"])
        raise UpcycleError(f"{family.model_type} cannot become {name!r} exactly; moe.target can be {allowed}")
    return natives.find(name)


def _rope(rope: Mapping[str, Any]) -> Config:
    """Return rotary settings in both spellings; transformers 5 reads the first, older ones the others."""
    out: Config = {"rope_parameters": dict(rope), "rope_theta": rope["rope_theta"]}
    if (share := rope.get("partial_rotary_factor")) is not None:
        out["partial_rotary_factor"] = share
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    return out if rope["rope_type"] == "default" else {**out, "rope_scaling": scaling}
