"""A Mixture of Experts as a source: a checkpoint of a native architecture, checked to be complete and sound.

It has the blocks of a dense family, with experts in place of some networks. The native says how experts,
router and config are spelled, and the family says everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, ClassVar

from upcycle import families, targets
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.dense.admission import has_experts, refuse_unsound
from upcycle.dense.due import refuse_other_shapes, refuse_surplus
from upcycle.dense.leaving_out import dropped, kept
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError, shown
from upcycle.families import Config, Stack, Weights
from upcycle.families._checked import check
from upcycle.families._decoder import Decoder
from upcycle.families._weights import below
from upcycle.targets import natives
from upcycle.targets.native import Growing, Native
from upcycle.tensors.computed import Fill
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy, Stored

_LAYERS = "model.layers."
_MOST_EXPERTS = 1 << 16  # in all layers together


class MixtureFamily(Decoder):
    """A dense family whose blocks have experts; `family_of` makes one for each native."""

    native: ClassVar[Native]

    @property
    def growing(self) -> Growing:
        """The spelling of the architecture, which is needed to read it."""
        return _growing(self.native)

    def tidied(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return config.json with the keys that the hub's configs have, in place of other names for them."""
        other = {key: name for key, name in self.growing.other_names.items() if raw.get(key) is not None}
        for key, name in other.items():
            if raw.get(name, raw[key]) != raw[key]:
                raise UpcycleError(
                    f"config.json of a {self.model_type} model: {key} = {shown(raw[key])} and {name} = "
                    f"{shown(raw[name])} mean the same; keep the one that is right"
                )
        named = {name: raw[key] for key, name in other.items()}
        return {key: value for key, value in raw.items() if key not in other} | named

    def config(self, raw: Mapping[str, Any]) -> Config:
        check(self.model_type, raw)
        raw, assumed = self.tidied(raw), self.growing.assumed
        given = {**assumed, **{k: v for k, v in raw.items() if v is not None}}
        counts = (self.native.num_experts_field, self.native.top_k_field, self.native.width_field)
        for key in (*counts, *(key for key, value in assumed.items() if type(value) is int)):
            if type(given.get(key)) is not int or given[key] < 1:
                raise UpcycleError(
                    f"config.json of a {self.model_type} model: {key} = {shown(given.get(key))}; it must be "
                    f"a whole number of 1 or more"
                )
        if not isinstance(kept := given.get("mlp_only_layers", ()), (list, tuple)):
            raise UpcycleError(
                f"config.json of a {self.model_type} model: mlp_only_layers = {shown(kept)}; it must be a "
                f"list of numbers of layers"
            )
        for key, value in self.growing.only.items():
            if given.get(key, value) != value:
                raise UpcycleError(
                    f"config.json of a {self.model_type} model: {key} = {shown(given[key])}; [grow] takes "
                    f"{key} = {shown(value)} alone"
                )
        own = {key: given[key] for key in (*counts, *assumed) if key in given}
        config = {**own, **super().config({**assumed, **raw})}
        if (total := config["num_hidden_layers"] * config[counts[0]]) > _MOST_EXPERTS:
            raise UpcycleError(
                f"config.json of a {self.model_type} model: {total:,} experts in all layers together; "
                f"{_MOST_EXPERTS:,} are taken at most"
            )
        if config[counts[1]] > config[counts[0]]:
            raise UpcycleError(
                f"config.json of a {self.model_type} model: {counts[1]} = {config[counts[1]]}, and there are "
                f"{config[counts[0]]} experts; a token cannot use more than there are"
            )
        return config

    def moe_layers(self, config: Config) -> frozenset[int]:
        """Return the layers that have experts."""
        if self.growing.moe_layers is None:
            return frozenset(range(config["num_hidden_layers"]))
        return self.growing.moe_layers(config)

    def weights(self, config: Config) -> Weights:
        (stack,) = super().stacks(config)
        sparse = self.moe_layers(config)
        dense = super().weights(config)
        replaced = {name for i in sparse for name in dense if stack.owns(name, i)}
        out: Weights = {name: weight for name, weight in dense.items() if name not in replaced}
        layer = self._layer(config)
        for i in sorted(sparse):
            out |= below(f"{_LAYERS}{i}.", layer)
        return out

    def _layer(self, config: Config) -> Weights:
        """Return the tensors of a layer that has experts, besides attention and norms."""
        native, hidden = self.native, config["hidden_size"]
        count, shared = config[native.num_experts_field], self.growing.shared_width(config)
        experts = [_network(hidden, config[native.width_field])] * count
        made = {**native.layout.write(experts), native.router: Fill((count, hidden), "F32", 0.0)}
        made |= native.extra(count, "F32") if native.extra else {}
        if native.shared and shared:
            made |= native.shared.write(_network(hidden, shared))
            if native.shared.gate:
                made[native.shared.gate] = Fill((1, hidden), "F32", 0.0)
        return {name: native.made(name, tensor.shape) for name, tensor in made.items()}

    def stacks(self, config: Config) -> tuple[Stack, ...]:
        (stack,) = super().stacks(config)
        return (replace(stack, width=config[self.native.width_field]),)

    def parts_ways(self, config: Config, native: str) -> str | None:
        return None  # the class stays the same

    def warnings(self, native: str) -> list[str]:
        return []


def _network(hidden: int, width: int) -> FeedForward:
    """Return a network of zeros, for its names and shapes."""
    wide = Fill((width, hidden), "F32", 0.0)
    return FeedForward(gate=wide, up=wide, down=Fill((hidden, width), "F32", 0.0))


@cache
def family_of(model_type: str) -> MixtureFamily:
    """Return the family of the checkpoints of a native architecture that can grow."""
    native = natives.find(model_type)
    like = families.find(_growing(native).like)
    own = {
        "native": native,
        "model_type": native.model_type,
        "architectures": (native.architecture,),
        "summary": native.summary,
        "natives": (),
        "no_native": "it has experts already",
        "tokenizer": native.reader,
    }
    found: MixtureFamily = type(f"{type(like).__name__}Mixture", (MixtureFamily, type(like)), own)()
    return found


def _growing(native: Native) -> Growing:
    assert native.growing is not None
    return native.growing


@dataclass(frozen=True, kw_only=True)
class Mixture(Dense):
    """A Mixture of Experts of a native architecture. Its tensors have the names that `convert` writes."""

    family: MixtureFamily

    @property
    def native(self) -> Native:
        """Its architecture."""
        return self.family.native

    @property
    def num_experts(self) -> int:
        """The number of experts in each layer that has any."""
        return int(self.config[self.native.num_experts_field])

    @property
    def top_k(self) -> int:
        """The number of experts per token."""
        return int(self.config[self.native.top_k_field])

    @property
    def shared_width(self) -> int:
        """The number of neurons of the shared expert; 0 if there is none."""
        return self.family.growing.shared_width(self.config)

    @property
    def renormalizes(self) -> bool:
        """True if the weights of a token's experts sum to one."""
        return self.native.renormalizes == "always" or bool(self.config["norm_topk_prob"])

    @cached_property
    def moe_layers(self) -> frozenset[int]:
        """The layers that have experts."""
        return self.family.moe_layers(self.config)

    @cached_property
    def tensors(self) -> dict[str, Lazy]:
        out: dict[str, Lazy] = {}
        layers: dict[int, dict[str, Lazy]] = {}
        for name, info in self._kept():
            number, _, rest = name.removeprefix(_LAYERS).partition(".")
            if name.startswith(_LAYERS) and number.isascii() and number.isdecimal():
                layers.setdefault(int(number), {})[rest] = Stored(self.checkpoint, info)
            else:
                out[name] = Stored(self.checkpoint, info)
        for i, layer in layers.items():
            out |= {
                f"{_LAYERS}{i}.{name}": tensor for name, tensor in _as_written(self.native, layer).items()
            }
        return out

    @cached_property
    def layers(self) -> dict[int, dict[str, Lazy]]:
        """The tensors of each layer by their names below it."""
        out: dict[int, dict[str, Lazy]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith(_LAYERS):
                number, _, rest = name.removeprefix(_LAYERS).partition(".")
                out.setdefault(int(number), {})[rest] = tensor
        return out

    @cached_property
    def experts(self) -> dict[int, list[FeedForward]]:
        """The experts of each layer that has any."""
        return {i: self.native.layout.read(self.layers[i]) for i in sorted(self.moe_layers)}

    def feed_forward(self, layer: int, stack: str = "layers") -> FeedForward:
        """Return the network of a block that has no experts, or the first expert of one that has."""
        if layer in self.moe_layers:
            return self.experts[layer][0]
        return super().feed_forward(layer, stack)

    def comparable(self, layer: int, stack: str = "layers") -> FeedForward | None:
        """Return the network of a block that has no experts."""
        return None if layer in self.moe_layers else self.feed_forward(layer, stack)

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """No keys: config.json of the result has all that the source's has."""
        return ()

    @property
    def idle(self) -> int:
        """The weights of the experts that a token does not meet."""
        each = 3 * self.config["hidden_size"] * self.config[self.native.width_field]
        return int((self.num_experts - self.top_k) * each * len(self.moe_layers))

    @property
    def called(self) -> str:
        return "MoE"


def _as_written(native: Native, layer: dict[str, Lazy]) -> dict[str, Lazy]:
    """Return the tensors of a layer under the names that `convert` writes, whichever form they have."""
    growing = _growing(native)
    held = growing.held
    if held is None or held.gate_up not in layer or held.down not in layer:
        return layer
    both, down = layer[held.gate_up], layer[held.down]
    if len(both.shape) != 3 or both.shape[1] % 2 or len(down.shape) != 3 or down.shape[0] != both.shape[0]:
        return layer
    rest = {name: tensor for name, tensor in layer.items() if name not in (held.gate_up, held.down)}
    if growing.held_router in rest:
        rest[native.router] = rest.pop(growing.held_router)
    return rest | native.layout.write(held.read(layer))


def admit(checkpoint: Checkpoint, *, drop: tuple[str, ...] = ()) -> Mixture:
    """Return the Mixture of Experts in a checkpoint, which can grow.

    `drop` has names and patterns of stored tensors to leave out. Raises `UpcycleError`, with the reason, for
    anything that is not exactly such a model.
    """
    raw, where = checkpoint.config, checkpoint.folder
    known = ", ".join(natives.growing())
    if not has_experts(raw):
        raise UpcycleError(
            f"[grow] makes more experts of those that a source has ({known}), and {where} is "
            f"{shown(raw.get('model_type'))} without experts; take the section out"
        )
    native = targets.opened(raw)
    if not isinstance(native, Native) or native.growing is None:
        raise UpcycleError(
            f"{where} is a {shown(raw.get('model_type'))}, which [grow] does not know; it knows {known}"
        )
    family = family_of(native.model_type)
    without = dropped(checkpoint, drop)
    refuse_unsound(checkpoint, kept(checkpoint, without), family, raw)
    config = family.config(raw)
    if (raw.get("architectures") or [native.architecture])[0] != native.architecture:
        raise UpcycleError(
            f"{where} is a {shown(raw['architectures'][0])}; [grow] takes a {native.architecture} alone"
        )
    left_out = _spared(family, config, checkpoint.tensors) | without
    found = Mixture(checkpoint=checkpoint, family=family, config=config, left_out=left_out)
    _check_tensors(found)
    return found


def _spared(family: MixtureFamily, config: Config, stored: Iterable[str]) -> dict[str, str]:
    """Return the stored tensors that the model does not have and that may be left out, with the reason."""
    out = {name: why for name in stored if (why := family.ignored(name)) is not None}
    assert family.tied is not None
    head, table = family.tied
    if config["tie_word_embeddings"] and head in stored:
        out[head] = f"tied to {table} by the config"
    return out


def _check_tensors(found: Mixture) -> None:
    """Compare the headers with what the config promises."""
    where, expected = found.checkpoint.folder, found.family.shapes(found.config)
    refuse_other_shapes(where, expected, {name: (name, t.shape) for name, t in found.tensors.items()})
    surplus = [name for name in found.tensors if name not in expected]
    refuse_surplus(found.checkpoint, surplus, found.family.model_type)
