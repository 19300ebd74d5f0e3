"""The recipe that follows from the advice.

It is the recipe that was asked about, unless sources cover this input and show that upcycling pays with other
settings. Experts, top-k, layers, router and initialisation then come from those sources. Copies give way to
drop if the source on its ratio covers the input as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from upcycle import settings
from upcycle.advice import drop_ratio, own_runs, recipe_file
from upcycle.advice.comparison import passed
from upcycle.advice.reading import readings
from upcycle.advice.situation import Kind, Situation
from upcycle.advice.verdict import Verdict, verdict
from upcycle.blueprints.making import blueprint
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.hub import peek
from upcycle.errors import UpcycleError
from upcycle.init import Init
from upcycle.init.drop import Drop
from upcycle.recipe import OF_THE_MODEL, Recipe, RecipeLike

# The settings of the published runs in which upcycling was better than dense continuation.
PUBLISHED: Mapping[Kind, Mapping[str, Any]] = {
    "decoder": {"moe": {"num_experts": 8, "top_k": 2}},
    "encoder-decoder": {
        "moe": {"num_experts": 32, "top_k": 2, "layers": "every_other"},
        "router": {"name": "expert_choice", "capacity_factor": 2.0, "normalize": False, "rescale": False},
        "decoder": {"router": {"name": "top_k", "capacity_factor": 2.0, "rounding": "flaxformer"}},
    },
    "vision transformer": {
        "moe": {"num_experts": 32, "layers": "last_half"},
        "router": {"name": "expert_choice", "capacity_factor": 2.0},
    },
}
PLACE = {"upcycling": "ahead of", "dense continuation": "behind", None: "level with"}
SLICES = {"init.name": "shuffle_slice"}
GROUPS = {"init.name": "virtual_group", "router.init": "grouped"}
USE = (
    "Use: upcycle convert SOURCE OUT --recipe FILE. In a run file these tables stand beside source, out and "
    "[train]."
)


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A recipe that passes `plan` on the source, and the reasons for it.

    A reason that is indented is a part of a command.
    """

    recipe: Recipe
    reasons: tuple[str, ...]

    @property
    def toml(self) -> str:
        """The text of a recipe file."""
        return recipe_file.text(self.recipe, (*self.reasons, USE))

    def as_dict(self) -> dict[str, Any]:
        """Return the recommendation as JSON has it."""
        return {"table": self.recipe.as_table(), "toml": self.toml, "reasons": list(self.reasons)}


def recommended(situation: Situation, source: Checkpoint) -> Recommendation:
    """Return the recipe that follows from the advice on `situation`, an MoE made of `source`.

    Only headers are read.
    """
    asked = situation.built.recipe
    best, found = _best(situation, source)
    if found.choice == "upcycling":
        best = _initialised(best, source)
    differences = _differences(asked, best.built.recipe)
    reasons = [found.sentence]
    if found.choice not in (None, "upcycling"):
        reasons.append(f"The advice is {found.choice}. This is the recipe to compare it with.")
    elif found.choice is None:
        why = found.unsettled or "no source shows that upcycling pays here"
        reasons.append(f"{why[0].upper()}{why[1:]}, so this is the recipe that was asked about.")
    if differences:
        reasons.append(f"Changed from what was asked: {'; '.join(differences)}.")
    reasons += _equal_flops(best, source)
    return Recommendation(recipe=best.built.recipe, reasons=tuple(reasons))


def _best(situation: Situation, source: Checkpoint) -> tuple[Situation, Verdict]:
    """Return the situation asked about, or the first other one in which upcycling is shown to pay."""
    found = verdict(situation)
    for recipe in () if found.sure == "fitted law" else _others(situation, found):
        other = _with(situation, recipe, source)
        if other and (better := verdict(other)).choice == "upcycling":
            return other, better
    return situation, found


def _others(situation: Situation, found: Verdict) -> Iterator[RecipeLike]:
    """Yield recipes that sources may say more for than for the one that was asked about."""
    asked = situation.built.recipe
    if found.choice is None:
        yield from _whole(situation)
    if found.choice in (None, "dense continuation") and (keys := _narrower(situation, SLICES)):
        yield _put(asked, keys)


def _whole(situation: Situation) -> Iterator[Recipe]:
    """Yield recipes with experts of full width, as published comparisons have them."""
    asked = situation.built.recipe
    if (
        asked.successor is not None
        or asked.grow is not None
        or asked.moe.granularity > 1
        or asked.moe.expert_width
    ):
        return  # the width was chosen, and published comparisons are of whole experts
    copy = settings.read(Init, {"name": "copy"}, "init")
    if isinstance(asked.init, Drop) and drop_ratio.advised(situation.asked.tokens) == 0:
        yield replace(asked, init=copy)
    if published := PUBLISHED.get(situation.kind):
        moe = {key: getattr(asked.moe, key) for key in OF_THE_MODEL} | published["moe"]
        kept = {key: getattr(asked, key) for key in ("seed", "dtype", "drop")}
        yield Recipe.of({**published, **kept, "moe": moe})


def _initialised(situation: Situation, source: Checkpoint) -> Situation:
    """Return the situation with drop in place of copies if a source covers the input and found that best."""
    found = drop_ratio.in_place_of_copies(situation)
    if found is None:
        return situation
    drop = settings.read(Init, {"name": "drop", "ratio": found.value, "indices": "independent"}, "init")
    return _with(situation, replace(situation.built.recipe, init=drop), source) or situation


def _narrower(situation: Situation, made: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `top_k` times as many experts, `top_k` of them as wide as the dense network.

    `made` are those of their initialisation. There are none if experts are narrow already, if a token has
    one, or if the source is no decoder.
    """
    recipe = situation.built.recipe
    moe, one_router = recipe.moe, not recipe.parts and recipe.successor is None and recipe.grow is None
    plain = moe.granularity == 1 and not (moe.expert_width or moe.shared_experts or moe.universal_experts)
    if situation.kind != "decoder" or not (one_router and plain) or recipe.router.name != "top_k":
        return {}
    if moe.top_k == 1:
        return {}  # one whole expert has the dense FLOPs already
    return {"moe.num_experts": moe.num_experts * moe.top_k, "moe.granularity": moe.top_k, **made}


def _equal_flops(situation: Situation, source: Checkpoint) -> list[str]:
    """Return how to make narrower experts of the dense FLOPs; nothing if the model cannot have them.

    They are shuffled slices, with what was measured, where our own runs reach the input: virtual groups ended
    behind them or level wherever both were run. Elsewhere they are the virtual groups of He et al. (arXiv
    2410.07524).
    """
    recipe, keys = situation.built.recipe, _narrower(situation, SLICES)
    if not keys:
        return []
    other = _with(situation, _put(recipe, keys), source)
    why = "" if other is None else _measured(other)
    if not why:
        keys = _narrower(situation, GROUPS)
        if _with(situation, _put(recipe, keys), source) is None:
            return []
    ratio = situation.plan.flops_per_token / situation.plan.dense_flops_per_token
    return [
        f"A token takes {ratio:.2f} times the dense FLOPs. For equal FLOPs, with narrower experts{why}, add",
        "  " + " ".join(f"--set {key}={value}" for key, value in keys.items()),
    ]


def _measured(situation: Situation) -> str:
    """Return what our own runs found of the experts in `situation`; empty if none of them reaches it."""
    known = own_runs.COMPARISONS
    if found := readings(situation, known):
        first = found[0]
        place = PLACE[first.better] if first.shorter is None else "not always ahead of"
        said = f"{first.run.found}{first.caveat}"
        return f", which upcycle's own runs found {place} dense continuation ({said})"
    longest = passed(situation, known)
    return "" if longest is None else f", which upcycle's own runs have for smaller budgets ({longest.found})"


def _put(recipe: Recipe, keys: Mapping[str, Any]) -> dict[str, Any]:
    table = recipe.as_table()
    table["init"] = {}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        table[section] = {**table[section], name: value}
    return table


def _with(situation: Situation, recipe: RecipeLike, source: Checkpoint) -> Situation | None:
    """Return the same question about another recipe; None if the source cannot have it."""
    try:
        return Situation(asked=situation.asked, built=blueprint(source, recipe, opener=peek))
    except UpcycleError:
        return None


def _differences(asked: Recipe, given: Recipe) -> list[str]:
    """Return every key of [moe], [init] and [router] that differs, as `moe.num_experts = 8, not 16`."""
    out = []
    for section in ("moe", "init", "router"):
        before, after = getattr(asked, section).as_table(), getattr(given, section).as_table()
        for key, value in after.items():
            if key in before and before[key] != value:
                out.append(f"{section}.{key} = {value}, not {before[key]}")
            elif key not in before and section == "init":
                out.append(f"{section}.{key} = {value}")
    return out
