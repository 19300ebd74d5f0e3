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
    decay: float = 0.25  # the share of these at the end with a falling rate
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
        "shuffle_slice": Variant(
            init="shuffle_slice",
            experts=_HALVES,
            said="16 slices of shuffled copies, of half the width, top-2, at the dense FLOPs a token",
        ),
        "shuffle_slice_every_other": Variant(
            init="shuffle_slice",
            experts=replace(_HALVES, layers=0.5),
            said="the same slices in every other layer, top-2, at the dense FLOPs a token",
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
        "virtual_group_every_other": Variant(
            init="virtual_group",
            experts=replace(_HALVES, layers=0.5),
            said="16 experts of half the width in every other layer, top-2, at the dense FLOPs a token",
        ),
        "noise": Variant(init="noise", experts=_COPIES, said="8 copies with noise, top-2"),
        "drop_0.5": Variant(init="drop", experts=_COPIES, said="8 experts, top-2, half of each redrawn"),
    },
)
TENTH = replace(CODE, script="tenth", extra=0.1)  # whose rate falls within these 10 %


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
        "shuffle_slice": Variant(
            init="shuffle_slice",
            experts=replace(_HALVES, layers=0.5),
            said="16 slices of shuffled copies in the last half, top-2, at the dense FLOPs an image",
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
NARROW = replace(
    ENCODER,
    script="narrow",
    variants={
        "shuffle_slice": Variant(
            init="shuffle_slice",
            experts=replace(_HALVES, layers=1 / 3, routers=("top_k", "top_k")),
            said="16 slices of shuffled copies in every other block of its encoder, at the dense FLOPs",
        ),
    },
)


@dataclass(frozen=True)
class Measured:
    """The held-out loss of a variant less that of dense continuation, in nats: mean and standard error of
    three seeds. It is above until `behind`, a share of the start's FLOPs, and stays below from `ahead` on;
    None: never. All this is by more than two standard errors; less is called level.

    `besides` is what else is to be known.
    """

    of: Experiment
    start: float  # what the dense model had seen, in the unit of the experiment
    variant: str
    less_dense: float
    error: float
    behind: float | None
    ahead: float | None
    besides: str = ""

    @property
    def better(self) -> Better:
        """What ends ahead; None if they are level."""
        if abs(self.less_dense) < 2 * self.error:
            return None
        return "dense continuation" if self.ahead is None else "upcycling"


_DENSE_ONES = (
    "; the larger ViT, trained on for as many seconds, ends another 0.037 ± 0.004 nats ahead, at 3.75 "
    "times the FLOPs in use; a smaller one that has spent what the larger one's training cost ends 0.097 "
    "± 0.001 nats ahead"
)
MEASURED = (
    # of, start, variant, less dense, error, behind until, ahead from
    Measured(TENTH, 40, "virtual_group", +0.0651, 0.0023, 0.10, None),
    Measured(TENTH, 40, "shuffle_slice", +0.0354, 0.0024, 0.10, None),
    Measured(TENTH, 40, "copy", +0.0303, 0.0060, 0.10, None),
    Measured(TENTH, 40, "copy_every_other", +0.0107, 0.0038, 0.10, None),
    Measured(TENTH, 80, "virtual_group", +0.0297, 0.0049, 0.10, None),
    Measured(TENTH, 80, "shuffle_slice", +0.0092, 0.0026, 0.10, None),
    Measured(TENTH, 160, "shuffle_slice", -0.0149, 0.0014, 0.06, 0.09),
    Measured(CODE, 10, "virtual_group", +0.0103, 0.0034, 0.30, None),
    Measured(CODE, 10, "shuffle_slice", +0.0039, 0.0034, 0.28, None),
    Measured(CODE, 10, "copy", +0.0490, 0.0059, 0.30, None),
    Measured(CODE, 10, "drop_0.5", +0.0809, 0.0044, 0.30, None),
    Measured(CODE, 40, "virtual_group", -0.0271, 0.0052, 0.17, 0.24),
    Measured(CODE, 40, "shuffle_slice", -0.0501, 0.0024, 0.11, 0.19),
    Measured(CODE, 40, "shuffle_slice_every_other", -0.0398, 0.0024, 0.11, 0.18),
    Measured(CODE, 40, "virtual_group_4", -0.0270, 0.0011, 0.13, 0.18),
    Measured(CODE, 40, "virtual_group_every_other", -0.0201, 0.0029, 0.15, 0.24),
    Measured(CODE, 40, "noise", -0.0061, 0.0021, 0.09, 0.28),
    Measured(CODE, 40, "copy", -0.0036, 0.0010, 0.09, 0.30),
    Measured(CODE, 40, "copy_every_other", -0.0196, 0.0016, 0.04, 0.26),
    Measured(CODE, 40, "drop_0.5", +0.0080, 0.0070, 0.26, None),
    Measured(CODE, 80, "virtual_group", -0.0466, 0.0031, 0.11, 0.17),
    Measured(CODE, 80, "shuffle_slice", -0.0676, 0.0032, 0.09, 0.15),
    Measured(CODE, 80, "copy", -0.0330, 0.0039, 0.04, 0.13),
    Measured(CODE, 80, "drop_0.5", -0.0280, 0.0012, 0.13, 0.22),
    Measured(CODE, 160, "virtual_group", -0.0689, 0.0048, 0.06, 0.11),
    Measured(CODE, 160, "shuffle_slice", -0.0865, 0.0025, 0.06, 0.11),
    Measured(CODE, 160, "copy", -0.0422, 0.0026, 0.02, 0.11),
    Measured(CODE, 160, "drop_0.5", -0.0552, 0.0034, 0.09, 0.13),
    Measured(CODE, 320, "virtual_group", -0.0881, 0.0014, 0.04, 0.09),
    Measured(CODE, 320, "shuffle_slice", -0.1053, 0.0018, 0.04, 0.07),
    Measured(CODE, 320, "copy", -0.0587, 0.0059, None, 0.04),
    Measured(CODE, 320, "drop_0.5", -0.0862, 0.0029, 0.06, 0.09),
    Measured(VISION, 70, "expert_choice_1", +0.0072, 0.0026, 0.30, None),
    Measured(VISION, 70, "expert_choice_2", +0.0028, 0.0026, 0.28, None),
    Measured(VISION, 70, "virtual_group", -0.0074, 0.0026, 0.02, 0.30),
    Measured(VISION, 70, "shuffle_slice", -0.0134, 0.0028, 0.09, 0.26),
    Measured(JETPACK, 42, "importance", -0.0595, 0.0019, 0.12, 0.17, _DENSE_ONES),
    Measured(ENCODER, 160, "expert_choice_1", -0.0005, 0.0008, 0.11, None),
    Measured(ENCODER, 160, "expert_choice_2", +0.0120, 0.0025, 0.30, None),
    Measured(NARROW, 160, "shuffle_slice", -0.0073, 0.0024, 0.02, 0.26),
)


def _comparison(measured: Measured) -> Comparison:
    of, variant = measured.of, measured.of.variants[measured.variant]
    against = of.against or "dense continuation"
    seen = measured.start * of.tokens_per_parameter
    compared = Comparison(
        paper=of.source,
        kind=of.kind,
        inits=(variant.init,),
        sizes=(of.size, of.size),
        experts=variant.experts,
        share=(0.0, of.extra),
        ahead=measured.ahead,
        behind=measured.behind,
        falling=(1 - of.decay) * of.extra,
        trained=(seen, seen),
        better=measured.better,
        against=of.against,
        found=f"{of.model} after {measured.start:g} {of.unit}, {variant.said}: "
        f"{measured.less_dense:+.4f} ± {measured.error:.4f} nats against {against} "
        f"after {of.extra:.0%} more FLOPs",
    )
    return replace(compared, found=f"{compared.found}, {compared.stood}{measured.besides}")


COMPARISONS = tuple(map(_comparison, MEASURED))
