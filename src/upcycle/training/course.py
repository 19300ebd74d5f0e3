"""The course of a run: its stages one after another, each with its first step and the run that it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from upcycle.training.run import Run


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One stage of a course; a run without stages is a single one without a name."""

    run: Run  # with the length, the data, the schedule and what is trained of this stage
    first: int  # steps before it
    name: str | None = None
    anew: bool = False  # as `Stage.anew`

    @property
    def steps(self) -> int:
        """Its number of steps."""
        return self.run.train.total_steps

    @property
    def end(self) -> int:
        """The number of steps of the run when it is done."""
        return self.first + self.steps

    def rate(self, step: int) -> float:
        """Return the learning rate of update `step` of the run; the schedule begins with the stage."""
        return self.run.schedule.at(step - self.first, self.steps)


@dataclass(frozen=True)
class Course:
    """All stages of a run in order."""

    run: Run

    @cached_property
    def legs(self) -> tuple[Leg, ...]:
        """The stages, at least one."""
        return tuple(self._legs()) or (Leg(run=self.run, first=0),)

    @property
    def isolates(self) -> bool:
        """True if some stage keeps the documents of a row apart."""
        return any(leg.run.data.isolate for leg in self.legs)

    def at(self, step: int) -> Leg:
        """Return the stage of update `step` (0, 1, ...); after the last one, the last stage."""
        return next((leg for leg in self.legs if step < leg.end), self.legs[-1])

    def after(self, steps: int) -> Leg:
        """Return the stage of the last of `steps` updates, whose state a checkpoint holds."""
        return self.at(max(0, steps - 1))

    def _legs(self) -> Iterator[Leg]:
        first = 0
        for stage in self.run.stage:
            own = stage.train
            train = replace(
                self.run.train,
                steps=own.steps,
                tokens=own.tokens,
                examples=own.examples,
                only=self.run.train.only if own.only is None else own.only,
                freeze=self.run.train.freeze if own.freeze is None else own.freeze,
            )
            run = replace(
                self.run,
                stage=(),
                train=train,
                data=stage.data or self.run.data,
                schedule=stage.schedule or self.run.schedule,
                router=stage.router or self.run.router,
            )
            yield Leg(run=run, first=first, name=stage.name, anew=bool(stage.anew))
            first += train.total_steps
