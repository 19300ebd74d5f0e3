"""The stages of a run: parts with a length, data and a rate of their own, and with what is trained in them.

`[[stage]]` tables of a run file hold what differs from the run. A stage goes on where the one before ended,
and its schedule begins anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from upcycle.data.corpus import Data
from upcycle.errors import UpcycleError
from upcycle.nn.balance import Balance
from upcycle.settings import AtLeast, Settings, table_at
from upcycle.training.schedules import Schedule

# Keys that are refused if another one is 0; a stage that sets that one to 0 has no way to take them out.
_OF_ANOTHER = {"warmup_from": "warmup", "bias_update_steps": "bias_update_rate"}
LENGTH = ("steps", "tokens", "examples")  # keys of a length, of which a run or a stage has one


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTrain(Settings):
    """The keys of [train] that a stage has for itself."""

    section: ClassVar[str] = "stage.train"

    steps: Annotated[int, AtLeast(1)] | None = None  # number of updates of the weights in this stage
    tokens: Annotated[int, AtLeast(1)] | None = None  # instead of steps: as many whole steps as cover them
    examples: Annotated[int, AtLeast(1)] | None = None  # instead of steps, if rows are not tokens
    only: tuple[str, ...] | None = None  # as train.only; none: that of the run
    freeze: tuple[str, ...] | None = None  # as train.freeze; none: that of the run

    @property
    def length(self) -> dict[str, int]:
        """The key of the length that is given, with its value."""
        return {key: value for key in LENGTH if (value := getattr(self, key)) is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Settings):
    """One stage of a run, in the order of the file. Its tables hold what differs from the run's."""

    section: ClassVar[str] = "stage"

    name: str = ""  # its name in metrics.jsonl; none: its number, from 1
    train: StageTrain  # its length, and what is trained in it
    data: Data | None = None  # as [data]; a list of sources takes the place of the run's
    # whether sources that earlier stages have read under another [data] are read from their first rows again;
    # None: no, each goes on where it was left, or what the run has had if it goes on
    anew: bool | None = None
    schedule: Schedule | None = None  # as [schedule]; it begins anew with the stage
    router: Balance | None = None  # as the keys of [router] that only a run reads


def laid_over(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of a run with its stages laid over it, so that the tables of a stage are whole."""
    given = run.get("stage", ())
    if not isinstance(given, (list, tuple)):
        raise UpcycleError("[[stage]] must be a list of sections; write each of them as [[stage]]")
    stages = [_whole(table_at(stage, "stage"), number, run) for number, stage in enumerate(given, start=1)]
    names = [stage["name"] for stage in stages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UpcycleError(f"two stages are called {twice[0]}; give each [[stage]] a name of its own")
    return {**run, "stage": stages}


def _whole(stage: Mapping[str, Any], number: int, run: Mapping[str, Any]) -> dict[str, Any]:
    out = {"name": str(number), **stage}
    for key in ("data", "schedule", "router"):
        if key in stage:
            own, base = table_at(stage[key], f"stage.{key}"), table_at(run.get(key, {}), key)
            if key == "schedule" and own.get("name", usual := base.get("name", Schedule.usual)) != usual:
                base = {k: v for k, v in base.items() if k in Schedule.common}
            base = {k: v for k, v in base.items() if own.get(_OF_ANOTHER.get(k, "")) != 0}
            out[key] = {**base, **own}
    return out
