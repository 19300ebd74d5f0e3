"""`metrics.jsonl`: one line per training step. It is in the folder of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from upcycle.records.reader import DamagedError, Document, Record, sometimes


@dataclass(frozen=True, kw_only=True)
class LayerMetrics(Record):
    """The router statistics of one layer of E experts in a step; shares are between 0 and 1."""

    layer: int
    stack: str = sometimes("layers")
    load: tuple[float, ...]  # [E], each expert's share of the slots
    entropy: float  # entropy of the load, divided by log E
    busiest: float = 0.0  # the largest load
    idlest: float = 0.0  # the smallest load
    dead: int  # number of experts that got no token
    collapsed: bool  # True if the busiest experts got nearly all tokens
    left_behind: float  # share of the tokens that reached no expert
    router_grad_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepMetrics(Document):
    """The metrics of a step. Losses are in nats; `seconds` and rates are for this step alone."""

    FILE: ClassVar[str] = "metrics.jsonl"

    format: int = sometimes(Document.FORMAT)
    step: int
    stage: str | None = sometimes()  # name of the stage, in a run of several
    tokens: int  # tokens since the run began
    loss: float
    lr: float | None = None
    grad_norm: float | None = None
    divergence: float | None = sometimes()  # KL(teacher || model) per target, if there is a teacher
    balance_loss: float | None = sometimes()
    z_loss: float | None = sometimes()
    router_losses: Mapping[str, float] | None = sometimes()  # additional losses of the router, by name
    layers: tuple[LayerMetrics, ...] = sometimes(())
    seconds: float | None = None
    tokens_per_s: float | None = None
    active_flops_per_s: float | None = None
    mfu: float | None = None  # model FLOPs utilisation, 0 to 1, all scores; if the device's peak is known
    peak_memory: int | None = None  # bytes
    skipped: str | None = sometimes()  # why the weights were not updated: it stands out, or is not finite
    scores: Mapping[str, float] | None = sometimes()  # of tasks, by task and metric
    held_out_loss: float | None = sometimes()
    held_out_accuracy: float | None = sometimes()
    held_out_start: float | None = sometimes()  # held-out loss before the first step
    held_out_accuracy_start: float | None = sometimes()

    @classmethod
    def of_line(cls, line: bytes, file: str) -> Self:
        """Read the step in one line. Raises `DamagedError`; `file` is the name of the file in the error."""
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DamagedError(file, f"it is not valid JSON ({error})") from None
        return cls.of(found, file)
