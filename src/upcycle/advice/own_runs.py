"""The measurements of our own runs: upcycling beside dense continuation, at equal FLOPs.

A small dense model was trained at a constant rate. It, and a Mixture of Experts made from it, went on for a
share of what it had cost, and the rate fell to zero in the last quarter. In MoE Jetpack, the experts come
from a larger dense model that was trained as long. A test compares the table with the results that the
experiments recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from upcycle.advice.comparison import Better, Comparison
from upcycle.advice.experts import Experts
from upcycle.advice.situation import Kind


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to upcycle: its initialisation, its experts, and both in words."""

    init: str
    experts: Experts
    said: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A script below experiments/, and the dense model that its variants start from and are compared with."""

    name: str
    kind: Kind
    size: float  # parameters of the dense model that went on
    model: str
    unit: str  # in which the training of a start is counted
    tokens_per_parameter: float  # of one such unit, as `advise` counts tokens
    variants: Mapping[str, Variant]
    script: str = "run"
    extra: float = 0.3  # FLOPs after the start, as a share of the start's
    against: str | None = None  # the dense model that went on, if the experts come from another

    @property
    def source(self) -> str:
        """What is said to be the source of a statement."""
        return f"upcycle's own runs (experiments/{self.name})"


_COPIES = Experts(count=8, top_k=2, granularity=1, layers=1, routers=("top_k",))
_HALVES = Experts(count=16, top_k=2, granularity=2, layers=1, routers=("top_k",))
_QUARTERS = Experts(count=32, top_k=4, granularity=4, layers=1, routers=("top_k",))

CODE = Experiment(
    name="code",
    kind="decoder",
    size=312e3,
    model="a Llama of 312 k parameters",
    unit="tokens per parameter",
    tokens_per_parameter=1,
    variants={
        "virtual_group": Variant(
            init="virtual_group",
            experts=_HALVES,
            said="16 experts of half the width, top-2, at the dense FLOPs a token",
        ),
        "virtual_group_4": Variant(
            init="virtual_group",
            experts=_QUARTERS,
            said="32 experts of a quarter of the width, top-4, at the dense FLOPs a token",
        ),
        "copy": Variant(init="copy", experts=_COPIES, said="8 copies, top-2"),
        "copy_every_other": Variant(
            init="copy",
            experts=replace(_COPIES, layers=0.5),
            said="8 copies in every other layer, top-2",
        ),
        "drop_0.5": Variant(init="drop", experts=_COPIES, said="8 experts, top-2, half of each redrawn"),
    },
)


def _choosing(factor: int, layers: float, routers: tuple[str, ...], said: str) -> Variant:
    """Return copies that choose their tokens, each as many as make `factor` experts a token on average."""
    experts = Experts(count=8, top_k=factor, granularity=1, layers=layers, routers=routers)
    return Variant(init="copy", experts=experts, said=f"8 copies, Expert Choice with C = {factor}{said}")


VISION = Experiment(
    name="vision",
    kind="vision transformer",
    size=124e3,
    model="a ViT of 124 k parameters",
    unit="epochs of CIFAR-10",
    tokens_per_parameter=50_000 * 17 / 124e3,
    variants={
        **{f"expert_choice_{c}": _choosing(c, 0.5, ("expert_choice",), " in the last half") for c in (1, 2)},
        "virtual_group": Variant(
            init="virtual_group",
            experts=replace(_HALVES, layers=0.5),
            said="16 experts of half the width in the last half, top-2, at the dense FLOPs an image",
        ),
    },
)

JETPACK = Experiment(
    name="vision",
    script="jetpack",
    kind="vision transformer",
    size=VISION.size,
    model="a ViT of 469 k parameters",
    unit=VISION.unit,
    tokens_per_parameter=VISION.tokens_per_parameter,
    extra=0.4,
    against="a dense model of the same FLOPs, trained as long",
    variants={
        "importance": Variant(
            init="importance",
            experts=Experts(count=8, granularity=2, layers=0.5, routers=("spherical",), universal=16),
            said="cut into a SpheroMoE of 8 + 16 experts in the last half of a ViT of 124 k",
        ),
    },
)

ENCODER = Experiment(
    name="encoder",
    kind="encoder-decoder",
    size=236e3,
    model="a T5 of 236 k parameters",
    unit="tokens per parameter in its encoder",
    tokens_per_parameter=157 / 128,  # a row has 29 in the decoder as well
    variants={
        f"expert_choice_{c}": _choosing(
            c, 1 / 3, ("expert_choice", "expert_choice"), " in every other block of the encoder"
        )
        for c in (1, 2)
    },
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The held-out loss of a variant less that of dense continuation, in nats: mean and standard error of
    three seeds. `ahead` is the share of the start's FLOPs from which it stays below; None: it does not.

    Gaps of less than two standard errors are called level. `besides` is what else is to be known.
    """

    of: Experiment
    start: float  # what the dense model had seen, in the unit of the experiment
    variant: str
    less_dense: float
    error: float
    ahead: float | None
    besides: str = ""

    @property
    def better(self) -> Better:
        """What ends ahead; None if they are level."""
        if abs(self.less_dense) < 2 * self.error:
            return None
        return "dense continuation" if self.ahead is None else "upcycling"

    @property
    def said(self) -> str:
        """How the two stand, in words."""
        if self.better is None:
            return "level at the end"
        return "behind to the end" if self.ahead is None else f"ahead from {self.ahead:.0%} on"


MEASURED = (
    Measured(of=CODE, start=10, variant="virtual_group", less_dense=+0.0103, error=0.0034, ahead=None),
    Measured(of=CODE, start=10, variant="copy", less_dense=+0.0490, error=0.0059, ahead=None),
    Measured(of=CODE, start=10, variant="drop_0.5", less_dense=+0.0809, error=0.0044, ahead=None),
    Measured(of=CODE, start=40, variant="virtual_group", less_dense=-0.0271, error=0.0052, ahead=0.19),
    Measured(of=CODE, start=40, variant="virtual_group_4", less_dense=-0.0270, error=0.0011, ahead=0.18),
    Measured(of=CODE, start=40, variant="copy", less_dense=-0.0036, error=0.0010, ahead=0.28),
    Measured(of=CODE, start=40, variant="copy_every_other", less_dense=-0.0196, error=0.0016, ahead=0.11),
    Measured(of=CODE, start=40, variant="drop_0.5", less_dense=+0.0080, error=0.0070, ahead=None),
    Measured(of=CODE, start=80, variant="virtual_group", less_dense=-0.0466, error=0.0031, ahead=0.13),
    Measured(of=CODE, start=80, variant="copy", less_dense=-0.0330, error=0.0039, ahead=0.13),
    Measured(of=CODE, start=80, variant="drop_0.5", less_dense=-0.0280, error=0.0012, ahead=0.20),
    Measured(of=CODE, start=160, variant="virtual_group", less_dense=-0.0689, error=0.0048, ahead=0.11),
    Measured(of=VISION, start=70, variant="expert_choice_1", less_dense=+0.0072, error=0.0026, ahead=None),
    Measured(of=VISION, start=70, variant="expert_choice_2", less_dense=+0.0028, error=0.0026, ahead=None),
    Measured(of=VISION, start=70, variant="virtual_group", less_dense=-0.0074, error=0.0026, ahead=0.24),
    Measured(
        of=JETPACK,
        start=42,
        variant="importance",
        less_dense=-0.0595,
        error=0.0019,
        ahead=0.15,
        besides="; the larger ViT, trained on for as many seconds, ends another 0.041 nats ahead (one "
        "seed), at 3.75 times the FLOPs in use",
    ),
    Measured(of=ENCODER, start=160, variant="expert_choice_1", less_dense=-0.0005, error=0.0008, ahead=0.21),
    Measured(of=ENCODER, start=160, variant="expert_choice_2", less_dense=+0.0120, error=0.0025, ahead=None),
)


def _comparison(measured: Measured) -> Comparison:
    of, variant = measured.of, measured.of.variants[measured.variant]
    against = of.against or "dense continuation"
    seen = measured.start * of.tokens_per_parameter
    return Comparison(
        paper=of.source,
        kind=of.kind,
        inits=(variant.init,),
        sizes=(of.size, of.size),
        experts=variant.experts,
        share=(0.0, of.extra),
        ahead=measured.ahead if measured.better == "upcycling" else None,
        trained=(seen, seen),
        better=measured.better,
        against=of.against,
        found=f"{of.model} after {measured.start:g} {of.unit}, {variant.said}: "
        f"{measured.less_dense:+.4f} ± {measured.error:.4f} nats against {against} "
        f"after {of.extra:.0%} more FLOPs, {measured.said}{measured.besides}",
    )


COMPARISONS = tuple(map(_comparison, MEASURED))
