"""The sections of a run file that say how a run is laid out, watched, saved, taught and scored."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from upcycle.errors import UpcycleError
from upcycle.settings import Above, AtLeast, Settings, Within
from upcycle.sharding.layout import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher(Settings):
    """A dense model that the run learns from besides the data: distillation (Hinton et al. 2015).

    The loss is (1 - weight) x cross-entropy + weight x temperature^2 x KL(teacher || model), and both models'
    logits are divided by the temperature in KL. It is for causal_lm and sft, and the score has no part of it.
    """

    section: ClassVar[str] = "teacher"

    source: str  # a dense checkpoint with the same vocabulary: a folder, or a hub id
    weight: Annotated[float, Within("(0, 1]")] = 0.5  # share of the teacher in the loss
    temperature: Annotated[float, Above(0)] = 1.0  # divides the logits of both models
    # number of the teacher's largest logits per token that are kept on disk before the first step, so that it
    # is not in memory beside the model; all other words are one; None: it runs beside each step
    top_logits: Annotated[int, AtLeast(1)] | None = None
    cache: str | None = None  # folder of kept logits, which several runs can share; None: RUN/teacher
    drop: tuple[str, ...] = ()  # tensors of the teacher to leave out, as names or patterns such as v_head.*

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache is not None and self.top_logits is None:
            raise UpcycleError(
                "teacher.cache is a folder of kept logits; set teacher.top_logits, or take it out"
            )

    def as_table(self) -> dict[str, Any]:
        """Return the settings as a nested table; older records have no `drop`."""
        table = super().as_table()
        if not self.drop:
            del table["drop"]
        return table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel(Settings):
    """The parallel layout: replicate x fsdp x tp is the number of ranks, and ep divides fsdp x tp."""

    section: ClassVar[str] = "parallel"

    # copies of the whole model (HSDP), so that only gradients go from one to another
    replicate: int = 1
    fsdp: int | None = None  # ranks that shard a copy; None: the number of ranks divided by the others
    tp: int = 1  # ranks that share the matrices of a layer
    ep: int = 1  # ranks that share the experts of a layer

    def layout(self, world: int) -> Layout:
        """Return the layout in a world of so many processes; `Layout.refuse` says whether it fits."""
        given = max(1, self.replicate) * max(1, self.tp)
        fsdp = max(1, world // given) if self.fsdp is None else self.fsdp
        return Layout(replicate=self.replicate, fsdp=fsdp, tp=self.tp, ep=self.ep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log(Settings):
    """The outputs for metrics besides metrics.jsonl."""

    section: ClassVar[str] = "log"

    every: Annotated[int, AtLeast(1)] = 10  # steps between lines if no progress bar can be shown
    # steps between pictures of the experts' load in the sinks; 0: none
    pictures: Annotated[int, AtLeast(0)] = 100
    sinks: tuple[Literal["wandb", "trackio"], ...] = ()  # wandb and trackio, if they are installed
    project: str = "upcycle"  # project name for the sinks
    name: str | None = None  # run name for the sinks; None: the name of the run's folder
    peak_flops: Annotated[float, Above(0)] | None = None  # FLOP/s of a device, for MFU; None: known GPUs'
    # a warning appears if ten steps are slower than this share of the median of the hundred before; 0: none
    slow: Annotated[float, Within("[0, 1)")] = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Settings):
    """Tasks of lm-evaluation-harness that the model is scored on while it is trained.

    Before each score a checkpoint is written. Processes that share the model all work on the same rows.
    """

    section: ClassVar[str] = "eval"

    tasks: tuple[str, ...] = ()  # names, as in `upcycle eval --tasks`
    every: Annotated[int, AtLeast(1)] = 1000  # steps between scores; after the last step there is one
    task_files: str | None = None  # folder with TASK.jsonl files; none: data from the hub
    num_fewshot: Annotated[int, AtLeast(0)] | None = (
        None  # examples before each question; none: the task's own
    )
    limit: Annotated[int, AtLeast(0)] = 0  # questions of a task at most; 0: all
    batch_size: Annotated[int, AtLeast(0)] = 0  # rows of a forward pass; 0: as many as fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spikes(Settings):
    """The way to deal with steps whose loss or gradient stands out, or is not finite; see `spikes.py`.

    `skip` leaves out the update of such a step. `roll_back` goes back to the newest checkpoint and passes the
    batch (PaLM, Chowdhery et al. 2022, section 5.1).
    """

    section: ClassVar[str] = "spikes"

    act: Literal["warn", "skip", "roll_back"] = "warn"  # at a step that stands out
    nonfinite: Literal["stop", "skip", "roll_back"] = "stop"  # at a step whose loss or gradient is not finite
    sigma: Annotated[float, Above(0)] = 6.0  # standard deviations above the mean of the last steps
    window: Annotated[int, AtLeast(4)] = 128  # steps that the mean is over; half of them must be known
    most: Annotated[int, AtLeast(1)] = (
        10  # skipped steps in a row, or returns to one checkpoint; then it stops
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving(Settings):
    """When checkpoints are written. The last one of a run always is, and one before each score on tasks."""

    section: ClassVar[str] = "checkpoint"

    # steps between checkpoints; 0: only the last, and those before scores on tasks
    every: Annotated[int, AtLeast(0)] = 500
    keep: Annotated[int, AtLeast(1)] = 2  # number of checkpoints to keep
    # whether the steps go on while a copy of the tensors is written, which takes memory of the host
    asynchronous: bool = False
