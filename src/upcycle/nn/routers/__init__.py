"""Ways to route. One file here is one router: its keys in a recipe, its tensors, its forward pass.

A file `NAME.py` defines a frozen dataclass deriving from `Router`, bound to the module name `router`; its
fields are the keys of `[router] name = "NAME"`. torch is imported where it is used, not at the top: a
conversion reads the keys and the tensors without it. Letters: G groups of N tokens, H hidden, E experts.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from upcycle import settings
from upcycle.errors import UpcycleError
from upcycle.nn import router_starts
from upcycle.nn.router_starts import RouterStart
from upcycle.settings import AtLeast, Named

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.nn.routing import Routing, Tokens

Rounding = Literal["vmoe", "flaxformer", "exact"]


@dataclass(frozen=True)
class Extra:
    """A tensor of a router beside its weight, and what it starts with: `value` everywhere or, of a matrix,
    N(0, std^2). `inherited`: where there is a dense model, that part of the block's norm before the network.
    """

    shape: tuple[int, ...]
    value: float = 0.0
    std: float = 0.0
    inherited: Literal["weight", "bias"] | None = None


@dataclass(frozen=True, kw_only=True)
class Router(Named, abc.ABC):
    """How a router starts, and what every router can be asked. Shared keys:

    `init` and `std` of the weight; `normalize`: whether a token's weights are made to sum to one;
    `rescale`: where they are not, whether experts are multiplied by what makes up for it; `group`: how many
    tokens compete with each other for places (0: those of a row, that is an image or a text).
    """

    section: ClassVar[str] = "router"
    package: ClassVar[str] = __name__
    usual: ClassVar[str | None] = "top_k"
    common: ClassVar[tuple[str, ...]] = ("init", "std", "normalize", "rescale")

    summary: ClassVar[str]
    needs: ClassVar[str] = "moe.target = upcycled"
    looks_ahead: ClassVar[str] = ""  # why a token's output depends on later ones, where it does
    balanced: ClassVar[bool] = False
    has_slots: ClassVar[bool] = False  # whether experts see mixtures of tokens, as many each
    untrained: ClassVar[tuple[str, ...]] = ()  # tensors of `extra` that no gradient reaches

    # how the weight starts: normal, uniform, orthogonal, grouped, or zeros, which scores all experts alike
    init: str = "normal"
    std: Annotated[float, AtLeast(0)] = 0.02  # standard deviation of the weight
    normalize: bool = True  # whether a token's weights are made to sum to one
    rescale: bool = True  # where they are not, whether experts are multiplied by what makes up for it
    # tokens that compete with each other for places; 0: those of a row (an image, a text)
    group: Annotated[int, AtLeast(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init is not None:  # in some routers other keys say it
            router_starts.find(self.init)

    @property
    def start(self) -> RouterStart:
        """How the weight starts."""
        return router_starts.find(self.init)

    @property
    def causal(self) -> bool:
        """Whether no token's output depends on later tokens."""
        return not self.looks_ahead

    @property
    def not_in_a_decoder(self) -> str:
        """Why a router that is not causal may not stand in a causal stack."""
        why = self.looks_ahead or "with batch_priority a later token can take an earlier one's place"
        return f"{why}, so that a model would read what it should predict; use top_k without batch_priority"

    def share(self, num_experts: int, top_k: int) -> float | None:
        """The part of a group that an expert has places for; None: all of it."""
        return None

    def check(self, num_experts: int, top_k: int, length: int) -> None:
        """Raise where an expert has no place in a group of `length` tokens."""
        share, group = self.share(num_experts, top_k), self.group or length
        if share is not None and round(group * share, 9) <= 0.5:
            raise UpcycleError(
                f"router.capacity_factor is too small: an expert's part of {group} tokens is "
                f"{group * share:.2g}, less than one; raise it, or take fewer experts"
            )

    def rows(self, num_experts: int) -> int:
        """Rows of the weight, one for each expert or slot."""
        return num_experts

    def extra(self, num_experts: int, hidden: int) -> dict[str, Extra]:
        """More tensors by name."""
        return {}

    @abc.abstractmethod
    def gate_sum(self, num_experts: int, top_k: int) -> float:
        """What a token's weights sum to under a uniform router, on average."""

    def sums_to_one(self, num_experts: int, top_k: int) -> bool:
        """Whether the weights of a token that reaches an expert sum to one, whatever the router says."""
        return self.normalize

    @abc.abstractmethod
    def reaches_all(self, num_experts: int, top_k: int) -> bool:
        """Whether every token reaches an expert, whatever the router says."""

    @abc.abstractmethod
    def experts_per_token(self, num_experts: int, top_k: int, length: int) -> float:
        """How many experts a token is worth in arithmetic, on average, in groups of `length` tokens."""

    @abc.abstractmethod
    def route(self, tokens: Tokens) -> Routing:
        """Say which tokens go to which experts; arithmetic in the type of the tokens, float32 at least."""

    def loss_coefs(self) -> dict[str, float]:
        """What a run multiplies this router's own losses by, by their names in `Routing.losses`.

        A run weighs `importance` and `load` itself, by keys of its own.
        """
        return {}

    def beyond_native(self) -> list[str]:
        """The keys set here that no MoE class of transformers heeds, besides a router of another name."""
        if self.name != "top_k":
            return [f"router.name = {self.name}"]
        fields = [f for f in dataclasses.fields(self) if f.name not in self.common]
        return [f"router.{f.name}" for f in fields if getattr(self, f.name) != f.default]


def capacity(tokens: int, share: float, rounding: Rounding, *, minimum: int = 1) -> int:
    """Tokens that an expert takes of a group of `tokens`, where its fair part is `tokens` x `share`.

    `vmoe`: up, then up to a multiple of 4; `flaxformer`: to the nearest, at least 4; `exact`: to the nearest,
    at least `minimum`. Never more than there are.
    """
    fair = round(tokens * share, 9)  # 0.1 x 30 is 3
    if rounding == "vmoe":
        wanted = -(-math.ceil(fair) // 4) * 4
    else:
        wanted = max(round(fair), 4 if rounding == "flaxformer" else minimum)
    return min(tokens, wanted)


def places(length: int, padding: Tensor | None, share: float, rounding: Rounding) -> list[int]:
    """`capacity` of each group, of its tokens without padding; one number stands for all where none has any.

    Padding counts for nothing, or what a text computes would depend on how long its neighbours are.
    """
    real = [length] if padding is None else (~padding).sum(1).tolist()
    return [capacity(tokens, share, rounding) for tokens in real]


def read(table: Mapping[str, object], where: str = "router") -> Router:
    """The router of a table with `name` and its keys."""
    return settings.read(Router, table, where)


def find(name: str) -> type[Router]:
    """The router called `name`."""
    return Router.find(name)


def names() -> list[str]:
    """The names of all routers."""
    return Router.names()
