"""The run file of `upcycle train`: what is trained, on what, how long, and where it goes.

Frozen dataclasses, one a table of the TOML file, read as a recipe is: an unknown key, a wrong type and a
choice that does not exist are errors. `[moe]`, `[init]` and part of `[router]` are the recipe's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from upcycle import recipe as recipes
from upcycle import settings
from upcycle.data.corpus import Data
from upcycle.data.feeding import Feeding
from upcycle.errors import UpcycleError, shown
from upcycle.nn.balance import Balance
from upcycle.recipe import Recipe
from upcycle.settings import Above, AtLeast, Settings, Within, families, parted, table_at
from upcycle.tasks import Task
from upcycle.training import optimizers, schedules
from upcycle.training.optimizers import Optimizer
from upcycle.training.schedules import Schedule

MOST_ROWS = 1 << 20  # of a global batch; no published run comes near them
MOST_TOKENS = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Settings):
    """How long, in which portions, with which arithmetic. A step is one update of the weights."""

    section: ClassVar[str] = "train"

    steps: Annotated[int, AtLeast(1)] | None = None  # updates of the weights
    tokens: Annotated[int, AtLeast(1)] | None = None  # instead of steps: as many whole steps as cover them
    # instead of steps, where rows are not tokens: images, pairs of texts
    examples: Annotated[int, AtLeast(1)] | None = None
    # of the global batch: all ranks, all accumulation steps
    batch_tokens: Annotated[int, AtLeast(1)] = 65_536
    batch_size: Annotated[int, AtLeast(1)] | None = None  # rows of the global batch, instead of batch_tokens
    # rows of one forward pass on one rank; None: as many as fit
    micro_batch: Annotated[int, AtLeast(1)] | None = None
    sequence_length: Annotated[int, AtLeast(1)] = 1024  # tokens of a row of text
    # of the rate, from block to block towards the input; see `layer_decay.py`
    layer_decay: Annotated[float, Within("(0, 1]")] = 1.0
    # rate of the last block, see `drop_path.py`; None: what config.json says
    drop_path: Annotated[float, Within("[0, 1)")] | None = None
    # after the experts' activation; None: what config.json says
    expert_dropout: Annotated[float, Within("[0, 1)")] | None = None
    expert_output_dropout: Annotated[float, Within("[0, 1)")] = 0.0  # of what experts give
    clip_grad_norm: Annotated[float, AtLeast(0)] = 1.0  # 0: no clipping
    # of the arithmetic; auto: mixed on an accelerator, float32 on a CPU
    precision: Literal["auto", "float32", "mixed", "bfloat16"] = "auto"
    # whether blocks are computed again in the backward pass, to save memory
    activation_checkpointing: bool = False
    compile: bool = False  # whether torch.compile is used
    experts_implementation: str | None = None  # None: what benchmarks/train_step.py found fastest
    seed: int | None = None  # None: the seed of the run
    eval_every: Annotated[int, AtLeast(0)] = 100  # steps between losses on the held-out part; 0: none
    eval_tokens: Annotated[int, AtLeast(1)] = 262_144  # of the held-out part, at most
    # rows of the held-out part, instead of eval_tokens
    eval_examples: Annotated[int, AtLeast(1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if [self.steps, self.tokens, self.examples].count(None) != 2:
            raise UpcycleError("give one of train.steps, train.tokens and train.examples")
        if self.tokens is not None and self.batch_size is not None:
            raise UpcycleError("train.tokens goes with train.batch_tokens; with batch_size, give examples")
        if self.rows > MOST_ROWS or (self.batch_size is None and self.batch_tokens > MOST_TOKENS):
            raise UpcycleError(
                f"train.batch_size = {self.batch_size or self.rows} and train.batch_tokens = "
                f"{self.batch_tokens}: a global batch has {MOST_ROWS:,} rows and "
                f"{MOST_TOKENS:,} tokens at most"
            )
        if self.batch_size is None and self.batch_tokens % self.sequence_length:
            raise UpcycleError(
                f"train.batch_tokens = {self.batch_tokens} is no multiple of train.sequence_length = "
                f"{self.sequence_length}; a batch is made of whole rows"
            )

    @property
    def rows(self) -> int:
        """Rows of the global batch."""
        return self.batch_size or self.batch_tokens // self.sequence_length

    @property
    def eval_rows(self) -> int:
        """Held-out rows that losses are compared on, at most."""
        return self.eval_examples or max(1, self.eval_tokens // self.sequence_length)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        if self.steps is not None:
            return self.steps
        if self.examples is not None:
            return math.ceil(self.examples / self.rows)
        return math.ceil((self.tokens or 0) / self.batch_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel(Settings):
    """How many ranks share what; fsdp x tp is the world, ep divides it."""

    section: ClassVar[str] = "parallel"

    fsdp: int | None = None  # None: what tp leaves of the world
    tp: int = 1  # ranks that share the matrices of a layer
    ep: int = 1  # ranks that share the experts of a layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log(Settings):
    """Where numbers go besides metrics.jsonl."""

    section: ClassVar[str] = "log"

    every: Annotated[int, AtLeast(1)] = 10  # steps between lines, where no progress bar can be shown
    sinks: tuple[Literal["wandb", "trackio"], ...] = ()  # wandb and trackio, if they are installed
    project: str = "upcycle"  # that sinks file the run under
    name: str | None = None  # None: the name of the run's folder
    peak_flops: Annotated[float, Above(0)] | None = None  # of one device, for MFU; None: known for some GPUs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving(Settings):
    """When checkpoints are written; the last one of a run always is."""

    section: ClassVar[str] = "checkpoint"

    every: Annotated[int, AtLeast(0)] = 500  # steps; 0: only the last
    keep: Annotated[int, AtLeast(1)] = 2  # checkpoints that stay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """One training run. `recipe` is None where the dense model itself is trained on."""

    source: str  # the dense checkpoint: a folder, or a hub id (owner/name, owner/name@revision)
    out: str  # folder of the run: run.json, metrics.jsonl, checkpoints; it must hold no run yet
    from_scratch: bool = False  # whether to take the source's shape alone, with random weights
    seed: int = 0  # of every random number
    recipe: Recipe | None = None
    task: Task | None = None  # None: what the source's class is made for
    data: Data
    train: Train
    schedule: Schedule
    router: Balance = dataclasses.field(default_factory=Balance)
    optimizer: Optimizer = dataclasses.field(default_factory=optimizers.usual)
    parallel: Parallel = Parallel()
    log: Log = Log()
    checkpoint: Saving = Saving()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer.carry_state and self.from_scratch:
            raise UpcycleError("optimizer.carry_state = true needs weights to go with; from_scratch has none")
        if self.optimizer.carry_state and self.task is not None and self.task.classes:
            raise UpcycleError(
                "optimizer.carry_state = true has moments of the head that task.classes replaces"
            )
        if self.optimizer.carry_state and self.recipe and self.recipe.init.name not in ("copy", "noise"):
            raise UpcycleError(
                f"optimizer.carry_state = true tiles the dense moments to experts that are its copies; "
                f"init.name = {self.recipe.init.name} makes other neurons; use copy or noise"
            )

    @classmethod
    def of(cls, given: Run | Mapping[str, Any] | str | Path, /) -> Run:
        """A run from what there is: a nested table as TOML has it, a run file by its path, or a run."""
        if isinstance(given, Run):
            return given
        if isinstance(given, (str, Path)):
            return cls.load(given)
        if not isinstance(given, Mapping):
            raise UpcycleError(
                f"{shown(given)} is no run; give a Run, a table as a run file has it, or the path of one"
            )
        table = schedules.today(optimizers.today(given))
        if table.get("moe") is False:
            del table["moe"]
        of_experts = {k: table.pop(k) for k in recipes.OF_EXPERTS if k in table}
        table["router"], router = parted(table_at(table.get("router", {}), "router"), Balance)
        recipe = None
        if "moe" in of_experts:
            seed = {"seed": table["seed"]} if "seed" in table else {}
            recipe = Recipe.of({**of_experts, **seed}, router=router)
        elif stray := [*of_experts, *(f"router.{key}" for key in router)]:
            raise UpcycleError(f"{stray[0]} is for a Mixture of Experts; add a [moe] section, or take it out")
        beside = {**dict.fromkeys(recipes.OF_EXPERTS), "moe": recipes.Moe, "successor": recipes.Successor}
        return settings.read(cls, table, made={"recipe": recipe}, beside=beside)

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Run:
        """The run in the TOML file `path`, with `KEY=VALUE` overrides."""
        return cls.of(settings.override(settings.read_toml(path, "run file", LAYOUT), overrides, LAYOUT))

    @property
    def train_seed(self) -> int:
        """The seed of data order, jitter and dropout."""
        return self.seed if self.train.seed is None else self.train.seed

    def feeding(self, task: Task) -> Feeding:
        """What the run feeds a task with."""
        cache = Path(self.data.cache) if self.data.cache else Path(self.out) / task.cache_name
        return Feeding(data=self.data, length=self.train.sequence_length, seed=self.train_seed, cache=cache)

    def as_table(self) -> dict[str, Any]:
        """The run as a nested table: what `Run.of` takes."""
        table = super().as_table() | {"schedule": schedules.as_recorded(self.schedule)}
        table = optimizers.as_recorded(table, self.optimizer)
        recipe = table.pop("recipe", {})
        table["router"] |= recipe.pop("router", {})
        return _with_lists(table | {key: value for key, value in recipe.items() if key not in table})

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run that goes on from it."""
        free = ("parallel", "log", "checkpoint", "out")
        table = {k: v for k, v in self.as_table().items() if k not in free}
        train = {k: v for k, v in table["train"].items() if k not in ("micro_batch", "compile")}
        return table | {"train": train}


LAYOUT = dataclasses.replace(recipes.LAYOUT, named={**recipes.LAYOUT.named, **families(Run)})


def train_of(table: Mapping[str, Any]) -> Train:
    """[train] of the table that `Run.as_table` made of a run, by this version or an earlier one."""
    return settings.read(Train, optimizers.today(table)["train"], "train")


def _with_lists(value: Any) -> Any:
    """A table as JSON gives it back: lists, and no tuples."""
    if isinstance(value, dict):
        return {k: _with_lists(v) for k, v in value.items()}
    return [_with_lists(v) for v in value] if isinstance(value, tuple) else value
