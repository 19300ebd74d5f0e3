"""The result of `verify`: checks, and the differences that were measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was checked; `holds` is None if nothing was promised."""

    name: str
    holds: bool | None
    detail: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest |logit difference| between dense and MoE, and the largest |logit| of the dense model."""

    max_difference: float
    scale: float
    tokens: int
    images: int | None = None  # set if the input is images
    source_difference: float | None = None  # difference to the source as stored, if the MoE is rounded

    @property
    def relative(self) -> float:
        """The difference relative to the scale."""
        return relative_to(self.max_difference, self.scale)


def relative_to(difference: float, scale: float) -> float:
    """Return `difference` / `scale`; for a scale of zero, zero or infinity."""
    if scale:
        return difference / scale
    return math.inf if difference else 0.0


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The result of `verify`."""

    coverage: bool
    bit_identical: bool
    preserves_function: bool
    logits: dict[str, Difference]  # by input: random, text
    checks: list[Check]

    @property
    def holds(self) -> bool:
        """True if everything that the recipe promises holds."""
        return all(check.holds is not False for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return the proof as JSON has it."""
        return {"holds": self.holds, **asdict(self)}


def unfit(why: str) -> Proof:
    """Return the proof for a folder that different readers would read differently."""
    check = Check(name="files", holds=False, detail=why)
    return Proof(coverage=False, bit_identical=False, preserves_function=False, logits={}, checks=[check])


def skipped(name: str, why: str) -> Check:
    """Return a check that could not be made."""
    return Check(name=name, holds=False, detail=f"not checked: {why}")


def reason(error: Exception) -> str:
    """Return the first line that an error of another library says, or its kind if it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
