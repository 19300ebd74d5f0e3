"""The scaling law of upcycling: losses of a dense model, of an MoE made from it, and of one from scratch.

The source is Liew, Kato and Takase, "Scaling Laws for Upcycling Mixture-of-Experts Language Models" (ICML
2025, arXiv 2502.03009), with the constants of Table 2. N is the number of parameters of the dense model, D1
the number of tokens of its training and D2 that of the MoE's. Losses are nats per token on SlimPajama's
Common Crawl.
"""

from __future__ import annotations

import itertools
import math

from upcycle.advice.experts import GROWN, Experts
from upcycle.advice.situation import Situation
from upcycle.advice.statements import Choice, Statement
from upcycle.system.wording import rounded

SOURCE = "Liew et al. 2025 (arXiv 2502.03009), Table 2"
IRREDUCIBLE = 0.165

# The range of the fit. The upper ends are the paper's: models of up to 7 B parameters and a corpus of 368 B
# tokens. We read the parameters as the MoE's total, which is the stricter reading. The smallest runs are not
# known to us, so the lower ends are our own.
LARGEST = 7e9  # parameters of the MoE
SMALLEST = 0.1e9  # parameters of the dense model
TOKENS = (1e9, 368e9)  # of each of the two stages
EXPERTS, TOP_K = 8, 2
SETTING = Experts(count=EXPERTS, top_k=TOP_K, granularity=1, layers=1, routers=("top_k",))
NEEDS_DENSE_TOKENS = "it needs --dense-tokens, the tokens that the dense model was trained on"


def dense(n: float, d: float) -> float:
    """Return the loss of a dense model of `n` parameters after `d` tokens, in nats per token."""
    return 8.83 * d**-0.088 + 12.3 * n**-0.116 + IRREDUCIBLE


def from_scratch(n: float, d: float) -> float:
    """Return the loss of an MoE of 8 experts, top-2, after `d` tokens from random weights.

    Its shape is that of the MoE made from a dense model of `n` parameters.
    """
    return 32.0 * d**-0.161 + 7.05 * n**-0.080 + IRREDUCIBLE


def upcycled(n: float, d1: float, d2: float) -> float:
    """Return the loss after `d2` tokens of the MoE made from a dense model of `n` parameters and `d1` tokens.

    The form is A D1^-a1 D2^(-a2 + a3 ln D1) + B N^-b + E. The more tokens the dense model has seen, the more
    slowly the MoE learns (a3). Liew and Kato (arXiv 2510.06548) found the same form for other ways to reuse a
    model.
    """
    return 16.3 * d1**-0.043 * d2 ** (-0.085 + 7.98e-4 * math.log(d1)) + 8.53 * n**-0.112 + IRREDUCIBLE


def overtaken(n: float, d1: float) -> float | None:
    """Return the tokens after which an MoE from scratch is ahead of an upcycled one.

    The result is None if that point is not inside the fitted range of tokens.
    """

    def behind(d: float) -> float:
        return from_scratch(n, d) - upcycled(n, d1, d)

    low, high = TOKENS
    steps = [low * (high / low) ** (i / 256) for i in range(257)]
    for start, stop in itertools.pairwise(steps):
        if behind(start) > 0 >= behind(stop):
            while stop / start > 1 + 1e-9:
                middle = math.sqrt(start * stop)
                start, stop = (middle, stop) if behind(middle) > 0 else (start, middle)
            return stop
    return None


def outside(situation: Situation) -> list[str]:
    """Return the reasons why the law does not cover a situation; the list is empty if it does."""
    asked, plan, recipe = situation.asked, situation.plan, situation.built.recipe
    low, high = TOKENS
    if situation.kind != "decoder":
        return [f"fitted on decoder language models, and this is a model of the kind {situation.kind}"]
    if situation.grows:
        return [GROWN]
    found = SETTING.unlike(situation)
    if getattr(recipe.router, "capacity_factor", None) is not None:
        found.append("fitted on experts that take all tokens, and router.capacity_factor is set")
    if not situation.copies:
        found.append(f"fitted on copied experts, and init.name = {recipe.init.name} makes others")
    if plan.total_parameters > LARGEST:
        found.append(f"{rounded(plan.total_parameters)} parameters, fitted on up to {rounded(LARGEST)}")
    if plan.dense_parameters < SMALLEST:
        found.append(
            f"a dense model of {rounded(plan.dense_parameters)} parameters; below {rounded(SMALLEST)} it is "
            f"not trusted here"
        )
    if asked.dense_tokens is None:
        found.append(NEEDS_DENSE_TOKENS)
    for what, tokens in (("training", asked.tokens), ("dense training", asked.dense_tokens)):
        if tokens is not None and not low <= tokens <= high:
            found.append(f"{what} of {rounded(tokens)} tokens, taken for {rounded(low)} to {rounded(high)}")
    return found


def losses(situation: Situation) -> dict[Choice, float]:
    """Return the losses that the law gives for the budget, in nats per token.

    They are those of `upcycling`, `from scratch` and `dense continuation` at the same FLOPs. A choice that
    the law does not reach is left out. Outside its range the result is empty.
    """
    d1 = situation.asked.dense_tokens
    if d1 is None or outside(situation):
        return {}
    n, d2 = situation.plan.dense_parameters, situation.asked.tokens
    found: dict[Choice, float] = {"upcycling": upcycled(n, d1, d2), "from scratch": from_scratch(n, d2)}
    if (total := d1 + situation.dense_tokens_for_the_same) <= TOKENS[1]:
        found["dense continuation"] = dense(n, total)
    return found


def statements(situation: Situation) -> list[Statement]:
    """Return the losses and the crossover that the law gives, or the reasons why it does not apply."""
    topic = "scaling law"
    if reasons := outside(situation):
        said = "not applied: nothing is known from it about this input"
        return [Statement(topic=topic, said=said, source=SOURCE, inside=False, why="; ".join(reasons))]
    asked, found, n = situation.asked, losses(situation), situation.plan.dense_parameters
    assert asked.dense_tokens is not None
    sizes = f"{rounded(n)} and {rounded(situation.plan.total_parameters)} parameters"
    why = f"{EXPERTS} experts top-{TOP_K}, {sizes}"
    tokens, same = rounded(asked.tokens), rounded(situation.dense_tokens_for_the_same)
    sentences: dict[Choice, str] = {
        "upcycling": f"copied experts end at {{:.3f}} nats per token after {tokens} tokens",
        "from scratch": f"the same MoE from scratch ends at {{:.3f}} after {tokens} tokens",
        "dense continuation": f"the dense model ends at {{:.3f}} after {same} tokens more, the same FLOPs",
    }
    out = [
        Statement(
            topic=topic, said=sentences[what].format(loss), value=loss, unit="nats per token", source=SOURCE,
            inside=True, why=why,
        )
        for what, loss in found.items()
    ]  # fmt: skip
    if "dense continuation" not in found:
        total = asked.dense_tokens + situation.dense_tokens_for_the_same
        out.append(
            Statement(
                topic=topic, said="not applied to dense continuation at the same FLOPs", source=SOURCE,
                inside=False, why=f"{rounded(total)} tokens in all, taken for up to {rounded(TOKENS[1])}",
            )
        )  # fmt: skip
    point = overtaken(n, asked.dense_tokens)
    said = "from scratch does not overtake copied experts inside the fitted range"
    if point is not None:
        said = f"from scratch overtakes copied experts after {rounded(point)} tokens"
    out.append(
        Statement(topic=topic, said=said, value=point, unit="tokens", source=SOURCE, inside=True, why=why)
    )
    return out
