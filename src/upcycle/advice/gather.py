"""`upcycle advise`: every statement on a model and a budget, the verdict, and the recipe that follows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upcycle.advice import drop_ratio, duration, inference, layout, published, scaling_law
from upcycle.advice.recommended import Recommendation, recommended
from upcycle.advice.situation import Budget, Situation
from upcycle.advice.statements import Statement
from upcycle.advice.verdict import Verdict, verdict
from upcycle.blueprints.cost import Plan
from upcycle.blueprints.making import blueprint
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.hub import peek
from upcycle.recipe import Recipe

SPEAKERS = (scaling_law, published, drop_ratio, duration, layout, inference)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The facts that a person should know before spending: statements, the verdict, and a recipe."""

    asked: Budget
    plan: Plan
    statements: tuple[Statement, ...]
    verdict: Verdict
    recommended: Recommendation

    def holding(self) -> tuple[Statement, ...]:
        """Return the statements that may be used here: those that cover the input, then those whose source
        does not tell how far it reaches."""
        covering = [one for one in self.statements if one.inside]
        return (*covering, *(one for one in self.statements if one.inside is None))

    def outside(self) -> tuple[Statement, ...]:
        """Return the statements whose source does not cover the input."""
        return tuple(one for one in self.statements if one.inside is False)

    def as_dict(self) -> dict[str, Any]:
        """Return the advice as JSON has it."""
        return {
            "source": self.plan.source,
            "moe": self.plan.made,
            "asked": asdict(self.asked),
            "statements": [asdict(statement) for statement in self.statements],
            "verdict": asdict(self.verdict),
            "recommended": self.recommended.as_dict(),
        }


def advise(source: str | Path | Checkpoint, recipe: Recipe, asked: Budget) -> Advice:
    """Compare dense continuation, upcycling and training from scratch for the MoE of `recipe` and `source`.

    Only headers are read. Raises `UpcycleError` if source, recipe and question do not fit.
    """
    situation = Situation(asked=asked, built=blueprint(source, recipe, opener=peek))
    return Advice(
        asked=asked,
        plan=situation.plan,
        statements=tuple(one for speaker in SPEAKERS for one in speaker.statements(situation)),
        verdict=verdict(situation),
        recommended=recommended(situation, situation.built.source),
    )
