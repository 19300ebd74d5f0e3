"""Routers. Each file here is one: its keys in a recipe, its tensors and its forward pass.

A file `NAME.py` defines a frozen dataclass derived from `Router` and binds it to the module name `router`;
its fields are the keys of `[router] name = "NAME"`. torch is imported inside functions, because a conversion
reads keys and tensors without it. Letters: G groups of N tokens, H hidden, E experts.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from upcycle import settings
from upcycle.errors import UpcycleError
from upcycle.nn import router_starts
from upcycle.nn.router_starts import RouterStart
from upcycle.settings import AtLeast, Named

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.nn.routing import Routing, Tokens
    from upcycle.tensors.feed_forward import FeedForward
    from upcycle.tensors.lazy import Lazy

Rounding = Literal["vmoe", "flaxformer", "exact"]


@dataclass(frozen=True)
class Extra:
    """An extra tensor of a router and its start: `value` everywhere or, for a matrix, N(0, std^2).

    `inherited` names the part of the dense block's norm before the network that it starts from, if there is a
    dense model.
    """

    shape: tuple[int, ...]
    value: float = 0.0
    std: float = 0.0
    inherited: Literal["weight", "bias"] | None = None


@dataclass(frozen=True, kw_only=True)
class Router(Named, abc.ABC):
    """The base of all routers: how a router starts, and the questions that every router answers.

    Shared keys: `init` and `std` set the weight's start. `normalize` makes a token's weights sum to one.
    `rescale` multiplies the experts by a compensating factor if the weights do not sum to one. `group` is the
    number of tokens that compete for places (0: those of a row, which is an image or a text).
    """

    section: ClassVar[str] = "router"
    package: ClassVar[str] = __name__
    usual: ClassVar[str | None] = "top_k"
    common: ClassVar[tuple[str, ...]] = ("init", "std", "normalize", "rescale")

    summary: ClassVar[str]
    needs: ClassVar[str] = "moe.target = upcycled"
    looks_ahead: ClassVar[str] = ""  # why a token's output depends on later tokens, if it does
    balanced: ClassVar[bool] = False
    has_slots: ClassVar[bool] = False  # whether experts see mixtures of tokens, equally many each
    untrained: ClassVar[tuple[str, ...]] = ()  # tensors of `extra` that get no gradient
    linear: ClassVar[bool] = True  # whether a token's scores rise with its products with the weight's rows
    shares_one: ClassVar[bool] = False  # whether `normalize` divides one among the K experts of a token
    even: ClassVar[bool] = False  # whether chosen experts start with equal weights, whatever the scores

    # how the weight starts: a name that `upcycle list` prints, such as normal or zeros, which scores all
    # experts alike; or a table [router.init] with a name and its keys
    init: str | RouterStart = "normal"
    std: Annotated[float, AtLeast(0)] = 0.02  # standard deviation of the weight
    normalize: bool = True  # whether a token's weights are made to sum to one
    rescale: bool = True  # whether experts are scaled to compensate if weights do not sum to one
    # number of tokens that compete for places; 0: those of a row (an image, a text)
    group: Annotated[int, AtLeast(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.init, RouterStart):
            if self.init == router_starts.find(
                self.init.name
            ):  # a table with nothing but a name is that name
                object.__setattr__(self, "init", self.init.name)
        elif self.init is not None:  # None: other keys of the router decide
            router_starts.find(self.init)

    @property
    def start(self) -> RouterStart:
        """The initialisation of the weight."""
        return self.init if isinstance(self.init, RouterStart) else router_starts.find(self.init)

    def as_built(self) -> dict[str, Any]:
        """Return the settings as a model needs them: how the weight started is a name, without its keys."""
        return self.as_table() | {"init": self.start.name}

    @property
    def causal(self) -> bool:
        """Return whether no token's output depends on later tokens."""
        return not self.looks_ahead

    @property
    def not_in_a_decoder(self) -> str:
        """The reason why a router that is not causal cannot be used in a causal stack."""
        why = self.looks_ahead or "with batch_priority a later token can take an earlier one's place"
        return f"{why}, so that a model would read what it should predict; use top_k without batch_priority"

    def share(self, num_experts: int, top_k: int) -> float | None:
        """Return the fraction of a group that an expert has places for; None means all of it."""
        return None

    def competes(self, num_experts: int, top_k: int) -> bool:
        """Return whether a token's output depends on the others of its group: places, or slots, are few."""
        return self.has_slots or self.share(num_experts, top_k) is not None

    def check(self, num_experts: int, top_k: int, length: int) -> None:
        """Raise `UpcycleError` if an expert has no place in a group of `length` tokens."""
        share, group = self.share(num_experts, top_k), self.group or length
        rounding: Rounding = self.as_table().get("rounding", "exact")
        if share is not None and not capacity(group, share, rounding, minimum=0):
            raise UpcycleError(
                f"router.capacity_factor is too small: an expert's part of {group} tokens is "
                f"{group * share:.2g}, less than one; raise it, or take fewer experts"
            )

    def rows(self, num_experts: int) -> int:
        """Return the number of rows of the weight, one for each expert or slot."""
        return num_experts

    def extra(self, num_experts: int, hidden: int) -> dict[str, Extra]:
        """Return the extra tensors by name."""
        return {}

    def from_neurons(self, network: FeedForward, activation: str) -> dict[str, Lazy]:
        """Return the tensors, by name, that start as neurons of the dense network, one for each expert.

        `network` has these neurons alone. Raises `UpcycleError` if the router cannot compute as they do.
        """
        return {}

    @abc.abstractmethod
    def gate_sum(self, num_experts: int, top_k: int) -> float:
        """Return the average sum of a token's weights under a uniform router."""

    def sums_to_one(self, num_experts: int, top_k: int) -> bool:
        """Return whether a token's weights sum to one if it reaches an expert, for any router weight."""
        return self.normalize

    @abc.abstractmethod
    def reaches_all(self, num_experts: int, top_k: int) -> bool:
        """Return whether every token reaches an expert, for any router weight."""

    @abc.abstractmethod
    def experts_per_token(self, num_experts: int, top_k: int, length: int) -> float:
        """Return a token's average compute, as a number of experts, in groups of `length` tokens."""

    @abc.abstractmethod
    def route(self, tokens: Tokens) -> Routing:
        """Decide which tokens go to which experts. Computes in the type of the tokens, float32 or wider."""

    def loss_coefs(self) -> dict[str, float]:
        """Return the factors for this router's own losses, by their names in `Routing.losses`.

        A training run weights `importance` and `load` itself, with its own keys (`losses_of_run`).
        """
        return {}

    def losses_of_run(self) -> tuple[str, ...]:
        """Return which of the losses that a run weights (`Balance.coefficients`) it returns in training."""
        return ()

    def beyond_native(self) -> list[str]:
        """Return the keys set here that no MoE class of transformers supports, or another router's name."""
        if self.name != "top_k":
            return [f"router.name = {self.name}"]
        fields = [f for f in dataclasses.fields(self) if f.name not in self.common]
        return [f"router.{f.name}" for f in fields if getattr(self, f.name) != f.default]


def capacity(tokens: int, share: float, rounding: Rounding, *, minimum: int = 1) -> int:
    """Return how many tokens of a group of `tokens` an expert takes; its fair share is `tokens` x `share`.

    `vmoe` rounds up, then up to a multiple of 4. `flaxformer` rounds to the nearest, at least 4. `exact`
    rounds to the nearest, at least `minimum`. The result is never more than `tokens`.
    """
    fair = round(tokens * share, 9)  # rounded to 9 digits, so that 0.1 x 30 is 3
    if rounding == "vmoe":
        wanted = -(-math.ceil(fair) // 4) * 4
    else:
        wanted = max(round(fair), 4 if rounding == "flaxformer" else minimum)
    return min(tokens, wanted)


def places(length: int, padding: Tensor | None, share: float, rounding: Rounding) -> int | Tensor:
    """Return the `capacity` of each group, [G], from its tokens without padding; one number without a mask.

    Padding does not count: otherwise the result for a text would depend on the length of its neighbours.
    """
    return (
        capacity(length, share, rounding)
        if padding is None
        else capacities((~padding).sum(1), share, rounding)
    )


def capacities(tokens: Tensor, share: float, rounding: Rounding) -> Tensor:
    """Return the `capacity` of groups of `tokens` [G] tokens, computed where these are."""
    import torch

    fair = (tokens.double() * share).round(decimals=9)
    if rounding == "vmoe":
        wanted = (fair.ceil() / 4).ceil() * 4
    else:
        wanted = fair.round().clamp(min=4 if rounding == "flaxformer" else 1)
    return torch.minimum(tokens, wanted.to(tokens.dtype))


def read(table: Mapping[str, object], where: str = "router") -> Router:
    """Return the router that a table with `name` and its keys describes."""
    return settings.read(Router, table, where)


def find(name: str) -> type[Router]:
    """Return the router called `name`."""
    return Router.find(name)


def names() -> list[str]:
    """Return the names of all routers."""
    return Router.names()
