"""The layouts of the experts of a layer: their names on disk, and how they are stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from upcycle.families import Config
from upcycle.tensors.feed_forward import FeedForward
from upcycle.tensors.lazy import Lazy
from upcycle.tensors.moved import Concat, Pick, Slice, Stack, Transposed

if TYPE_CHECKING:
    from upcycle.init import Site
    from upcycle.nn.routers import Router
    from upcycle.recipe import Recipe


class Layout(Protocol):
    """The names under which the experts of a layer are stored."""

    @property
    def first(self) -> str:
        """The first matrix of a network: gate, or up if it has no gate."""

    def write(self, experts: list[FeedForward]) -> dict[str, Lazy]:
        """Return the experts by their names on disk, below the layer's prefix."""

    def read(self, tensors: Mapping[str, Lazy]) -> list[FeedForward]:
        """Return the experts among the tensors of a layer, given by their names below its prefix."""

    def fuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return the tensors of a layer with its experts in the form that transformers holds in memory."""

    def unfuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return the tensors of a layer by their names on disk, given as `fuse` returns them."""


class MoeNames(Protocol):
    """The names of the tensors of one MoE layer, which a target with experts provides."""

    @property
    def model_type(self) -> str:
        """The `model_type` of config.json."""

    @property
    def layout(self) -> Layout:
        """Where the experts are stored."""

    @property
    def router(self) -> str:
        """The name of the router weight [E, H] below the layer's prefix."""

    @property
    def shared(self) -> Shared | None:
        """The shared expert, if the architecture has one."""

    def routing(self, router: Router) -> Router:
        """Return the router that the result computes, for the one in the recipe."""

    def beside_router(
        self, recipe: Recipe, site: Site, norm: Mapping[str, Lazy], dtype: str
    ) -> dict[str, Lazy]:
        """Return the tensors of a layer besides router weight and experts, by name below the layer's prefix.

        `norm` has weight and bias of the norm before the network, if there is one.
        """


@dataclass(frozen=True, kw_only=True)
class PerExpert:
    """One tensor per matrix and expert, below the layer's prefix."""

    first: ClassVar[str] = "gate"
    path: str  # contains {e}
    gate: str
    up: str
    down: str
    in_memory: str = "mlp.experts"  # the module that holds them, below the layer

    def write(self, experts: list[FeedForward]) -> dict[str, Lazy]:
        """Return the experts by their names on disk."""
        return {
            f"{self.path.format(e=e)}.{getattr(self, name)}.weight": matrix
            for e, expert in enumerate(experts)
            for name, matrix in expert.matrices().items()
        }

    def read(self, tensors: Mapping[str, Lazy]) -> list[FeedForward]:
        """Return the experts among the tensors of a layer, given by their names below its prefix."""
        out: list[FeedForward] = []
        while f"{self.path.format(e=len(out))}.{self.gate}.weight" in tensors:
            path = self.path.format(e=len(out))
            out.append(
                FeedForward(
                    gate=tensors[f"{path}.{self.gate}.weight"],
                    up=tensors[f"{path}.{self.up}.weight"],
                    down=tensors[f"{path}.{self.down}.weight"],
                )
            )
        return out

    def fuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return a layer's tensors with its experts as transformers holds them: [E, 2I, H] and [E, H, I]."""
        experts = self.read(tensors)
        if not experts:
            return dict(tensors)
        head = self.path.partition("{e}")[0]
        rest = {name: t for name, t in tensors.items() if not name.startswith(head)}
        return rest | self._held.write(experts)

    def unfuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return a layer's tensors with one for each matrix and expert, given as `fuse` returns them."""
        held = {self._held.gate_up, self._held.down}
        rest = {name: t for name, t in tensors.items() if name not in held}
        return rest | self.write(self._held.read(tensors))

    @property
    def _held(self) -> Fused:
        return Fused(gate_up=f"{self.in_memory}.gate_up_proj", down=f"{self.in_memory}.down_proj")


@dataclass(frozen=True, kw_only=True)
class PlainPerExpert:
    """One tensor per matrix and expert, of networks without a gate, below the layer's prefix."""

    first: ClassVar[str] = "up"
    path: str  # what the names begin with, without the number of the expert

    def write(self, experts: list[FeedForward]) -> dict[str, Lazy]:
        """Return the experts by their names on disk."""
        return {
            f"{self.path}.{e}.{name}_proj.weight": matrix
            for e, expert in enumerate(experts)
            for name, matrix in expert.matrices().items()
        }

    def read(self, tensors: Mapping[str, Lazy]) -> list[FeedForward]:
        """Return the experts among the tensors of a layer, given by their names below its prefix."""
        out: list[FeedForward] = []
        while (up := tensors.get(f"{self.path}.{len(out)}.up_proj.weight")) is not None:
            out.append(FeedForward(up=up, down=tensors[f"{self.path}.{len(out)}.down_proj.weight"]))
        return out

    def fuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return a layer's tensors with its experts as transformers holds them: [E, I, H] and [E, H, I]."""
        experts = self.read(tensors)
        if not experts:
            return dict(tensors)
        rest = {name: t for name, t in tensors.items() if not name.startswith(f"{self.path}.")}
        return rest | {
            f"{self.path}.up_proj": Stack(tuple(x.up for x in experts)),
            f"{self.path}.down_proj": Stack(tuple(x.down for x in experts)),
        }

    def unfuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return a layer's tensors with one for each matrix and expert, given as `fuse` returns them."""
        rest = dict(tensors)
        up, down = (rest.pop(f"{self.path}.{name}_proj", None) for name in ("up", "down"))
        if up is None or down is None:
            return rest
        return rest | self.write(_plain_experts(up, down))


@dataclass(frozen=True, kw_only=True)
class Fused:
    """All experts in two tensors: gate stacked on up [E, 2I, H], and down [E, H, I]."""

    first: ClassVar[str] = "gate"
    gate_up: str
    down: str

    def write(self, experts: list[FeedForward]) -> dict[str, Lazy]:
        """Return the experts by their names on disk."""
        return {
            self.gate_up: Stack(tuple(Concat(_gated(x), 0) for x in experts)),
            self.down: Stack(tuple(x.down for x in experts)),
        }

    def read(self, tensors: Mapping[str, Lazy]) -> list[FeedForward]:
        """Return the experts among the tensors of a layer, given by their names below its prefix."""
        if self.gate_up not in tensors:
            return []
        both, down = tensors[self.gate_up], tensors[self.down]
        count, rows, _ = both.shape
        return [
            FeedForward(
                gate=Slice(Pick(both, e), 0, 0, rows // 2),
                up=Slice(Pick(both, e), 0, rows // 2, rows),
                down=Pick(down, e),
            )
            for e in range(count)
        ]

    def fuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return the tensors of a layer unchanged, because they are stored as transformers holds them."""
        return dict(tensors)

    def unfuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return the tensors of a layer unchanged."""
        return dict(tensors)


@dataclass(frozen=True, kw_only=True)
class FusedOrEach(Fused):
    """Experts that are written fused, and read in either form: earlier versions wrote a tensor for each."""

    each: PerExpert

    def read(self, tensors: Mapping[str, Lazy]) -> list[FeedForward]:
        """Return the experts among the tensors of a layer, given by their names below its prefix."""
        return super().read(tensors) or self.each.read(tensors)


@dataclass(frozen=True, kw_only=True)
class FusedAcross(Fused):
    """All experts in two tensors of transposed matrices, [E, H, 2I] and [E, I, H]."""

    def write(self, experts: list[FeedForward]) -> dict[str, Lazy]:
        """Return the experts by their names on disk."""
        return {
            self.gate_up: Stack(tuple(Transposed(Concat(_gated(x), 0)) for x in experts)),
            self.down: Stack(tuple(Transposed(x.down) for x in experts)),
        }

    def read(self, tensors: Mapping[str, Lazy]) -> list[FeedForward]:
        """Return the experts among the tensors of a layer, given by their names below its prefix.

        `save_pretrained` of transformers writes matrices that are not transposed; a model never has both.
        """
        stored = {name: tensors[name] for name in (self.gate_up, self.down) if name in tensors}
        if len(stored) == 2:
            (_, rows, hidden), (_, outputs, inner) = (tensor.shape for tensor in stored.values())
            if (rows, hidden) == (2 * inner, outputs):
                return super().read(stored)
        return super().read({name: Transposed(tensor) for name, tensor in stored.items()})

    def fuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return a layer's tensors with its experts as transformers holds them: [E, 2I, H] and [E, H, I]."""
        experts = self.read(tensors)
        return dict(tensors) | (super().write(experts) if experts else {})

    def unfuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return a layer's tensors with transposed matrices of experts, given as `fuse` returns them."""
        experts = super().read(tensors)
        return dict(tensors) | (self.write(experts) if experts else {})


def _gated(network: FeedForward) -> tuple[Lazy, Lazy]:
    """Return gate and up of a network, which every native MoE has."""
    assert network.gate is not None
    return network.gate, network.up


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The shared expert of an architecture that has one."""

    path: str  # below the layer's prefix
    combine: Literal["gated", "sum", "average"]  # how its output is combined with the routed output
    config: Callable[[int, int], Config]  # (width, number of shared experts) -> its config fields
    gate: str | None = None  # the sigmoid gate [1, H], for `gated`
    # its size if it is built even when the recipe asks for none; full: as wide as the experts
    mandatory: Literal["narrow", "full"] | None = None
    # how many experts it is as wide as, given moe.shared_experts; None: config.json says its width
    experts_wide: Callable[[int], int] | None = None

    def write(self, network: FeedForward) -> dict[str, Lazy]:
        """Return the shared expert by its names on disk."""
        return {f"{self.path}.{name}_proj.weight": m for name, m in network.matrices().items()}

    def read(self, tensors: Mapping[str, Lazy]) -> FeedForward:
        """Return the shared expert among the tensors of a layer, given by their names below its prefix."""
        gate, up, down = (tensors[f"{self.path}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return FeedForward(gate=gate, up=up, down=down)


_GATED = Fused(gate_up="experts.gate_up_proj", down="experts.down_proj")


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """Experts in three-dimensional tensors, as `nn.Experts` holds them; disk and memory are the same."""

    first: ClassVar[str] = "gate"
    path: ClassVar[str] = "experts"  # below the layer
    matrices: ClassVar[tuple[str, ...]] = ("gate_up_proj", "up_proj", "down_proj")

    def write(self, experts: list[FeedForward]) -> dict[str, Lazy]:
        """Return the experts by names below the layer: [E, 2I, H] or [E, I, H], [E, H, I], and vectors."""
        first = experts[0]
        up = "gate_up_proj" if first.gate is not None else "up_proj"
        out: dict[str, Lazy] = {
            f"experts.{up}": Stack(tuple(_over(x.gate, x.up) for x in experts)),
            "experts.down_proj": Stack(tuple(x.down for x in experts)),
        }
        biases = [(x.gate_bias, x.up_bias, x.down_bias) for x in experts]
        if first.up_bias is not None:
            out[f"experts.{up}_bias"] = Stack(tuple(_over(gate, b) for gate, b, _ in biases if b is not None))
            out["experts.down_proj_bias"] = Stack(tuple(b for _, _, b in biases if b is not None))
        for name in first.response():
            out[f"experts.{name}"] = Stack(tuple(x.response()[name] for x in experts))
        return out

    def read(self, tensors: Mapping[str, Lazy]) -> list[FeedForward]:
        """Return the experts among the tensors of a layer, given by names below it; biases are ignored."""
        if (up := tensors.get("experts.up_proj")) is None:
            return _GATED.read(tensors)
        return _plain_experts(up, tensors["experts.down_proj"])

    def fuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return the tensors of a layer unchanged, because they are stored as they are held in memory."""
        return dict(tensors)

    def unfuse(self, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
        """Return the tensors of a layer unchanged."""
        return dict(tensors)


def _plain_experts(up: Lazy, down: Lazy) -> list[FeedForward]:
    """Return the experts of the stacks up [E, I, H] and down [E, H, I], of networks without a gate."""
    return [FeedForward(up=Pick(up, e), down=Pick(down, e)) for e in range(down.shape[0])]


def _over(gate: Lazy | None, up: Lazy) -> Lazy:
    """Stack gate on up, or return up alone for a network without a gate."""
    return up if gate is None else Concat((gate, up), 0)


@dataclass(frozen=True, kw_only=True)
class SharedExpert(Shared):
    """The dense network beside the experts, stored like a single expert."""

    def write(self, network: FeedForward) -> dict[str, Lazy]:
        """Return the shared expert by its names below the layer."""
        names = Stacked().write([network])
        return {f"{self.path}.one.{name.removeprefix('experts.')}": t for name, t in names.items()}
