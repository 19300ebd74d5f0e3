"""The run file of `upcycle train`: the model, the data, the length of training and the output folder.

Each table of the TOML file is a frozen dataclass, and is read like a recipe: an unknown key, a wrong type or
an unknown choice is an error. `[moe]`, `[init]` and part of `[router]` are those of the recipe.
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
from upcycle.data.readings import Reading
from upcycle.errors import UpcycleError, shown
from upcycle.nn.balance import Balance
from upcycle.recipe import Recipe
from upcycle.settings import AtLeast, Settings, Within, families, parted, table_at
from upcycle.tasks import Task
from upcycle.training import optimizers, schedules, stages
from upcycle.training.identity import ROWS_BEFORE_TOKENS, identity_of
from upcycle.training.optimizers import Optimizer
from upcycle.training.schedules import Schedule
from upcycle.training.sections import Eval, Log, Parallel, Saving, Spikes, Teacher
from upcycle.training.stages import Stage

MOST_ROWS = 1 << 20  # limit for a global batch; no published run comes near these
MOST_TOKENS = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Settings):
    """The length of a run, its batches and its precision. A step is one update of the weights."""

    section: ClassVar[str] = "train"

    steps: Annotated[int, AtLeast(1)] | None = None  # number of updates of the weights
    # instead of steps: as many whole steps as cover them; a row counts as sequence_length tokens, which are
    # those of the encoder if there are an encoder and a decoder
    tokens: Annotated[int, AtLeast(1)] | None = None
    # instead of steps, if rows are not tokens: images, pairs of texts
    examples: Annotated[int, AtLeast(1)] | None = None
    # tokens of the global batch: all ranks, all accumulation steps; counted as `tokens`
    batch_tokens: Annotated[int, AtLeast(1)] = 65_536
    batch_size: Annotated[int, AtLeast(1)] | None = None  # rows of the global batch, instead of batch_tokens
    # rows of one forward pass on one rank; None: as many as fit
    micro_batch: Annotated[int, AtLeast(1)] | None = None
    sequence_length: Annotated[int, AtLeast(1)] = 1024  # tokens per row of text
    # factor on the learning rate from block to block towards the input; see `layer_decay.py`
    layer_decay: Annotated[float, Within("(0, 1]")] = 1.0
    # drop path rate of the last block, see `drop_path.py`; None: as in config.json
    drop_path: Annotated[float, Within("[0, 1)")] | None = None
    # all dropout of the model, in attention, networks, experts and heads; None: as in config.json, which it
    # does not change
    dropout: Annotated[float, Within("[0, 1)")] | None = None
    # dropout after the experts' activation; None: as `dropout`, or as in config.json
    expert_dropout: Annotated[float, Within("[0, 1)")] | None = None
    expert_output_dropout: Annotated[float, Within("[0, 1)")] = 0.0  # dropout on the experts' output
    # what is trained: router, experts, experts[0,2-3], anchors (experts that are the source's own network),
    # shared_expert, network (without experts), attention, norms, embeddings, head, or patterns of parameter
    # names (*.layers.0.*); none: everything
    only: tuple[str, ...] | None = None
    freeze: tuple[str, ...] | None = None  # what is not trained, in the same words; it goes over `only`
    clip_grad_norm: Annotated[float, AtLeast(0)] = 1.0  # largest norm of the gradient; 0: no clipping
    # precision of the arithmetic; auto: mixed on an accelerator and float32 on a CPU, or what the run has had
    # if it goes on
    precision: Literal["auto", "float32", "mixed", "bfloat16"] = "auto"
    # whether to recompute blocks in the backward pass, to save memory; selective: all of a block but its
    # matrix products and attention
    activation_checkpointing: bool | Literal["selective"] = False
    compile: bool = False  # whether to use torch.compile
    # how experts run, in transformers' names, or expert_by_expert; None: grouped_mm, and on a CPU
    # expert_by_expert, whose results are the same; eager if rows are no multiple of 16 bytes
    experts_implementation: str | None = None
    # how attention is computed, in transformers' names; None: what transformers takes, most often sdpa
    attn_implementation: (
        Literal[
            "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"
        ]
        | None
    ) = None
    seed: int | None = None  # None: the seed of the run
    eval_every: Annotated[int, AtLeast(0)] = 100  # steps between evaluations on the held-out part; 0: none
    eval_tokens: Annotated[int, AtLeast(1)] = 262_144  # held-out tokens, at most
    # held-out rows, instead of eval_tokens
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
        """The number of rows in the global batch."""
        return self.batch_size or self.batch_tokens // self.sequence_length

    @property
    def eval_rows(self) -> int:
        """The maximum number of held-out rows to evaluate on."""
        return self.eval_examples or max(1, self.eval_tokens // self.sequence_length)

    @property
    def total_steps(self) -> int:
        """The number of steps of the whole run."""
        if self.steps is not None:
            return self.steps
        if self.examples is not None:
            return math.ceil(self.examples / self.rows)
        return math.ceil((self.tokens or 0) / self.batch_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """One training run. `recipe` is None if the dense model itself is trained."""

    source: str  # the dense checkpoint: a folder, or a hub id (owner/name, owner/name@revision)
    out: str  # folder of the run: run.json, metrics.jsonl, checkpoints; it must hold no run yet
    from_scratch: bool = False  # whether to use only the source's shape, with random weights
    seed: int = 0  # seed of all random numbers
    drop: tuple[str, ...] = ()  # tensors of the source to leave out, as names or patterns such as v_head.*
    recipe: Recipe | None = None
    task: Task | None = None  # None: the one that the source's class is made for
    teacher: Teacher | None = None
    data: Data
    train: Train
    schedule: Schedule
    stage: tuple[Stage, ...] = ()  # the parts of the run; none: it is one
    router: Balance = dataclasses.field(default_factory=Balance)
    optimizer: Optimizer = dataclasses.field(default_factory=optimizers.usual)
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    log: Log = dataclasses.field(default_factory=Log)
    checkpoint: Saving = dataclasses.field(default_factory=Saving)
    spikes: Spikes = dataclasses.field(default_factory=Spikes)
    eval: Eval = dataclasses.field(default_factory=Eval)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe is not None:
            object.__setattr__(self, "drop", self.recipe.drop)
        if "roll_back" in (self.spikes.act, self.spikes.nonfinite) and not self.checkpoint.every:
            raise UpcycleError(
                "spikes: roll_back goes back to the newest checkpoint, and checkpoint.every = 0 writes none; "
                "set it"
            )
        if self.teacher is not None and self.teacher.top_logits is not None:
            rolls = "roll_back" in (self.spikes.act, self.spikes.nonfinite)
            if rolls or any(stage.data is not None for stage in self.stage):
                what = "spikes with roll_back" if rolls else "a [[stage]] with data of its own"
                raise UpcycleError(
                    f"teacher.top_logits keeps logits of the rows of [data] in their order, and {what} reads "
                    f"others; take top_logits out, and the teacher runs beside the steps"
                )
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
        """Return a run from a `Run`, a nested table as in TOML, or the path of a run file.

        Raises `UpcycleError` for an invalid run.
        """
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
        if "moe" in of_experts or "grow" in of_experts:
            shared = {key: table[key] for key in recipes.OF_ANY_RUN if key in table}
            recipe = Recipe.of({**of_experts, **shared}, router=router)
        elif stray := [*of_experts, *(f"router.{key}" for key in router)]:
            raise UpcycleError(f"{stray[0]} is for a Mixture of Experts; add a [moe] section, or take it out")
        table = stages.laid_over(table)
        if table["stage"]:
            table["train"] = _together(table_at(table.get("train", {}), "train"), table["stage"])
        beside = {**dict.fromkeys(recipes.OF_EXPERTS), "moe": recipes.Moe, "successor": recipes.Successor}
        beside["grow"] = recipes.Grow
        return settings.read(cls, table, made={"recipe": recipe}, beside=beside)

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Run:
        """Read a run from the TOML file `path`, with `KEY=VALUE` overrides."""
        table = settings.override(settings.read_toml(path, "run file", LAYOUT), overrides, LAYOUT)
        _refuse_both(table)
        return cls.of(table)

    @property
    def train_seed(self) -> int:
        """The seed of data order, jitter and dropout."""
        return self.seed if self.train.seed is None else self.train.seed

    def feeding(self, task: Task, readings: tuple[Reading, ...] = ()) -> Feeding:
        """Return the data settings for a task, whose sources are read on from `readings`."""
        cache = Path(self.data.cache) if self.data.cache else Path(self.out) / task.cache_name
        return Feeding(
            data=self.data,
            length=self.train.sequence_length,
            seed=self.train_seed,
            cache=cache,
            readings=readings,
        )

    def as_table(self) -> dict[str, Any]:
        """Return the run as a nested table that `Run.of` accepts."""
        table = super().as_table() | {"schedule": schedules.as_recorded(self.schedule)}
        table = optimizers.as_recorded(table, self.optimizer)
        for later in ("stage", "drop"):  # keys that older records do not have
            if not table[later]:
                del table[later]
        for later in ("spikes", "eval"):  # sections that older records do not have
            if getattr(self, later) == type(getattr(self, later))():
                del table[later]
        recipe = table.pop("recipe", {})
        table["router"] |= recipe.pop("router", {})
        return _with_lists(table | {key: value for key, value in recipe.items() if key not in table})

    def identity(self) -> dict[str, Any]:
        """Return the settings that must match between a checkpoint and the run that resumes from it."""
        return identity_of(self.as_table())


def _refuse_both(table: Mapping[str, Any]) -> None:
    """Raise `UpcycleError` for a run file with a number of rows and one of tokens, of which rows decide.

    What is laid over a file with one of them takes its place. Tables of records have both, because they have
    the defaults.
    """
    train = table_at(table.get("train", {}), "train")
    for rows, tokens in ROWS_BEFORE_TOKENS.items():
        if rows in train and tokens in train:
            raise UpcycleError(
                f"train.{rows} = {train[rows]} and train.{tokens} = {train[tokens]}; give one of them"
            )


def _together(train: Mapping[str, Any], parts: list[Any]) -> dict[str, Any]:
    """Return [train] with the length of all stages together.

    Raises `UpcycleError` if it gives another one.
    """
    shared = {key: value for key, value in train.items() if key not in stages.LENGTH}
    steps = 0
    for number, stage in enumerate(parts):
        own = settings.read(
            stages.StageTrain, table_at(stage.get("train", {}), "stage.train"), f"stage[{number}].train"
        )
        if len(own.length) != 1:
            raise UpcycleError(
                f"stage {stage['name']}: each [[stage]] has one of train.steps, train.tokens and "
                f"train.examples"
            )
        steps += settings.read(Train, {**shared, **own.length}, "train").total_steps
    if len(shared) < len(train) and settings.read(Train, train, "train").total_steps != steps:
        given = next(key for key in stages.LENGTH if key in train)
        raise UpcycleError(
            f"train.{given} = {train[given]} and the stages are {steps:,} steps together; each [[stage]] has "
            f"its own length, so leave train.{given} out"
        )
    return {**shared, "steps": steps}


_RIVALS = {
    f"train.{one}": f"train.{other}"
    for pair in ROWS_BEFORE_TOKENS.items()
    for one, other in (pair, pair[::-1])
}
LAYOUT = dataclasses.replace(recipes.LAYOUT, named={**recipes.LAYOUT.named, **families(Run)}, rivals=_RIVALS)


def train_of(table: Mapping[str, Any]) -> Train:
    """Return [train] from a table of `Run.as_table`, of this version or an earlier one."""
    return settings.read(Train, optimizers.today(table)["train"], "train")


def _with_lists(value: Any) -> Any:
    """Return a table with lists in place of tuples, as JSON reads it back."""
    if isinstance(value, dict):
        return {k: _with_lists(v) for k, v in value.items()}
    return [_with_lists(v) for v in value] if isinstance(value, tuple) else value
