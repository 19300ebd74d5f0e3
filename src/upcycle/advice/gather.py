"""`upcycle advise`: every statement on a model and a budget, and the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upcycle.advice import drop_ratio, duration, inference, layout, published, scaling_law
from upcycle.advice.situation import Asked, Situation
from upcycle.advice.statements import Statement
from upcycle.advice.verdict import Verdict, verdict
from upcycle.blueprints.blueprint import blueprint
from upcycle.blueprints.cost import Plan
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.hub import peek
from upcycle.recipe import Recipe

SPEAKERS = (scaling_law, published, drop_ratio, duration, layout, inference)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What a person should know before spending."""

    asked: Asked
    plan: Plan
    statements: tuple[Statement, ...]
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """The advice as JSON has it."""
        return {
            "source": self.plan.source,
            "moe": self.plan.made,
            "asked": asdict(self.asked),
            "statements": [asdict(statement) for statement in self.statements],
            "verdict": asdict(self.verdict),
        }


def advise(source: str | Path | Checkpoint, recipe: Recipe, asked: Asked) -> Advice:
    """Dense continuation, upcycling or from scratch, for the MoE that `recipe` makes of `source`.

    Reads headers only. Raises `UpcycleError` where source, recipe and question do not fit.
    """
    opened = source if isinstance(source, Checkpoint) else peek(source)
    situation = Situation(asked=asked, built=blueprint(opened, recipe))
    found = tuple(statement for speaker in SPEAKERS for statement in speaker.statements(situation))
    return Advice(asked=asked, plan=situation.plan, statements=found, verdict=verdict(situation))
