"""The share of an expert that is drawn anew for a budget: r of Drop-Upcycling (arXiv 2502.19261)."""

from __future__ import annotations

from upcycle.advice.experts import GROWN
from upcycle.advice.situation import Situation
from upcycle.advice.statements import Statement
from upcycle.system.wording import rounded

SHORT = 100e9  # up to so many tokens nothing should be drawn anew
LONG = 200e9  # from so many tokens on r = 0.5 was best: "hundreds of billions of tokens or more"
BEST = 0.5

PAPER = "Drop-Upcycling (arXiv 2502.19261)"
COMPARED = (0.152e9, 1.56e9)  # dense parameters of the models on which it tried more than one r
COMPARED_AT = 500e9  # tokens of each of these runs
AGAINST = "FineRMoE (arXiv 2603.13364), Table 1"
REFUTED = (0.49e9, 1.54e9)  # dense parameters of the models that drop harmed
REFUTED_AT = 50e9  # tokens of each of these runs
SAME = 1.1  # a budget counts as the same up to so many times more or fewer tokens


def advised(tokens: float) -> float | None:
    """Return the share of neurons to draw anew for a budget in tokens.

    0 is a plain copy. None means that nothing is known about this budget.
    """
    if tokens <= SHORT:
        return 0.0
    return BEST if tokens >= LONG else None


def intact(ratio: float, indices: str) -> float:
    """Return the share of an expert's neurons that is left whole.

    `shared` indices are drawn once for all three matrices, as the paper's text says. `independent` ones are
    drawn for each matrix by itself, as its code does.
    """
    return 1 - ratio if indices == "shared" else (1 - ratio) ** 3


def best(situation: Situation) -> Statement:
    """Return the ratio for the budget, and whether its source covers the input."""
    tokens, size = situation.asked.tokens, situation.plan.dense_parameters
    ratio = advised(tokens)
    inside: bool | None
    if situation.kind != "decoder":
        said, source, inside = "no ratio is published for this kind of model", PAPER, False
        why, ratio = f"found on decoder language models, this is {situation.kind}", None
    elif situation.grows:
        said, source, inside = "no ratio is published for experts that are copied", PAPER, False
        why, ratio = GROWN, None
    elif ratio is None:
        said, source, inside = "which ratio is best is not known for this budget", PAPER, False
        why = f"nothing is published between {rounded(SHORT)} and {rounded(LONG)} tokens"
    elif ratio:
        said = f"r = {ratio:g} was best of those tried, with independent indices"
        source, (inside, why) = PAPER, _covered(size, COMPARED, tokens, COMPARED_AT)
    else:
        said = f"r = 0, a copy: drop ended far below the dense model after {rounded(REFUTED_AT)} tokens"
        source, (covered, why) = AGAINST, _covered(size, REFUTED, tokens, REFUTED_AT)
        inside = None if covered else False
        why += "; what was read of the source does not say its r and indices" if covered else ""
    return Statement(
        topic="drop ratio", said=said, value=ratio, unit="r", source=source, inside=inside, why=why
    )


def in_place_of_copies(situation: Situation) -> Statement | None:
    """Return the ratio for experts that would be copies; None unless its source covers the input."""
    found = best(situation)
    return found if found.inside and found.value and situation.copies else None


def statements(situation: Situation) -> list[Statement]:
    """Return the ratio for the budget and, if the recipe drops, the share that it leaves whole."""
    out = [best(situation)]
    init = situation.built.recipe.init
    asked, indices = getattr(init, "ratio", None), getattr(init, "indices", None)
    if init.name == "drop" and asked is not None and indices is not None:
        left = intact(asked, indices)
        out.append(
            Statement(
                topic="drop ratio",
                said=f"r = {asked:g} with {indices} indices leaves {left:.1%} of an expert's neurons whole",
                value=left, unit="of the neurons", source="1 - r shared, (1 - r)^3 independent", inside=True,
                why="counted",
            )
        )  # fmt: skip
    return out


def _covered(size: float, sizes: tuple[float, float], tokens: float, run_at: float) -> tuple[bool, str]:
    if not sizes[0] <= size <= sizes[1]:
        return (
            False,
            f"{rounded(size)} dense parameters, found on {rounded(sizes[0])} and {rounded(sizes[1])}",
        )
    if not run_at / SAME <= tokens <= run_at * SAME:
        return False, f"{rounded(tokens)} tokens, found at {rounded(run_at)}"
    return True, f"{rounded(size)} dense parameters, {rounded(tokens)} tokens"
