"""The run file of `upcycle train`: what is trained, on what, how long, and where it goes.

Frozen dataclasses, one a table of the TOML file, read as a recipe is: an unknown key, a wrong type and a
choice that does not exist are errors. `[moe]`, `[init]` and part of `[router]` are the recipe's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upcycle import recipe as recipes
from upcycle.data.corpus import Data
from upcycle.data.feeding import Feeding
from upcycle.errors import UpcycleError, shown
from upcycle.recipe import Recipe
from upcycle.training.schedule import Schedule

if TYPE_CHECKING:
    from upcycle.tasks import Task


MOST_ROWS = 1 << 20  # of a global batch; no published run comes near them
MOST_TOKENS = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """How long, in which portions, with which arithmetic. A step is one update of the weights."""

    steps: int | None = None  # updates of the weights
    tokens: int | None = None  # instead of steps: as many whole steps as cover them
    examples: int | None = None  # instead of steps, where rows are not tokens: images, pairs of texts
    batch_tokens: int = 65_536  # of the global batch: all ranks, all accumulation steps
    batch_size: int | None = None  # rows of the global batch, instead of batch_tokens
    micro_batch: int | None = None  # rows of one forward pass on one rank; None: as many as fit
    sequence_length: int = 1024  # tokens of a row of text
    weight_decay: float = 0.1  # of matrices; see `optimizer.decays`
    layer_decay: float = 1.0  # of the rate, from block to block towards the input; see `layer_decay.py`
    drop_path: float | None = None  # rate of the last block, see `drop_path.py`; None: what config.json says
    expert_dropout: float | None = None  # after the experts' activation; None: what config.json says
    expert_output_dropout: float = 0.0  # of what experts give
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    eps: float = 1e-8  # of AdamW
    clip_grad_norm: float = 1.0  # 0: no clipping
    # of the arithmetic; auto: mixed on an accelerator, float32 on a CPU
    precision: Literal["auto", "float32", "mixed", "bfloat16"] = "auto"
    # whether blocks are computed again in the backward pass, to save memory
    activation_checkpointing: bool = False
    compile: bool = False  # whether torch.compile is used
    experts_implementation: str | None = None  # None: what benchmarks/train_step.py found fastest
    seed: int | None = None  # None: the seed of the run
    eval_every: int = 100  # steps between losses on the held-out part; 0: none
    eval_tokens: int = 262_144  # of the held-out part, at most
    eval_examples: int | None = None  # rows of the held-out part, instead of eval_tokens

    def __post_init__(self) -> None:
        if [self.steps, self.tokens, self.examples].count(None) != 2:
            raise UpcycleError("give one of train.steps, train.tokens and train.examples")
        if self.tokens is not None and self.batch_size is not None:
            raise UpcycleError("train.tokens goes with train.batch_tokens; with batch_size, give examples")
        for name in (
            "steps", "tokens", "examples", "batch_tokens", "batch_size", "micro_batch", "sequence_length",
            "eval_tokens", "eval_examples",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < 1:
                raise UpcycleError(f"train.{name} = {value}; it must be 1 or more")
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
        for name in ("weight_decay", "eps", "clip_grad_norm", "eval_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UpcycleError(f"train.{name} = {getattr(self, name)}; it must be a number of 0 or more")
        for name in ("beta1", "beta2", "drop_path", "expert_dropout", "expert_output_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise UpcycleError(f"train.{name} = {getattr(self, name)}; it must be in [0, 1)")
        if not 0 < self.layer_decay <= 1:
            raise UpcycleError(
                f"train.layer_decay = {self.layer_decay}; it must be in (0, 1]; 1 is one rate for all"
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
class Balance:
    """What keeps the experts in use: the losses on the router, its bias, and noise. See `routing.py`."""

    # each layer by itself, or all layers pooled as in transformers
    balance_loss: Literal["per_layer", "pooled"] = "per_layer"
    balance_loss_coef: float = 0.01  # of the loss that keeps experts equally busy
    # shares of the whole batch (exact, one more forward pass with accumulation), or of what went before
    # (buffered)
    balance_counts: Literal["exact", "buffered"] = "exact"
    z_loss_coef: float = 0.0  # of the loss on the size of the logits
    # of the bias on the choice of experts, which takes the place of a loss; 0: no bias
    bias_update_rate: float = 0.0
    jitter: float = 0.0  # tokens are multiplied by 1 +- this before the router, in training
    importance_loss_coef: float = 0.0  # of V-MoE's loss on the weights of experts
    load_loss_coef: float = 0.0  # of V-MoE's loss on the load of experts
    layers: Literal["mean", "sum"] = "mean"  # how the layers' losses are put together

    def __post_init__(self) -> None:
        for name in (
            "balance_loss_coef", "z_loss_coef", "bias_update_rate", "importance_loss_coef", "load_loss_coef",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise UpcycleError(f"router.{name} = {getattr(self, name)}; it must be a number of 0 or more")
        if not 0 <= self.jitter < 1:
            raise UpcycleError(f"router.jitter = {self.jitter}; it must be in [0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The state that the optimizer starts from."""

    carry_state: bool = (
        False  # moments that `upcycle export --optimizer` left in the source, tiled to experts
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """How many ranks share what; fsdp x tp is the world, ep divides it."""

    fsdp: int | None = None  # None: what tp leaves of the world
    tp: int = 1  # ranks that share the matrices of a layer
    ep: int = 1  # ranks that share the experts of a layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """Where numbers go besides metrics.jsonl."""

    every: int = 10  # steps between lines, where no progress bar can be shown
    sinks: tuple[str, ...] = ()  # wandb and trackio, if they are installed
    project: str = "upcycle"  # that sinks file the run under
    name: str | None = None  # None: the name of the run's folder
    peak_flops: float | None = None  # of one device, for MFU; None: known for some GPUs

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UpcycleError(f"log.every = {self.every}; it must be 1 or more")
        if wrong := [s for s in self.sinks if s not in ("wandb", "trackio")]:
            raise UpcycleError(f"log.sinks has {wrong[0]!r}; allowed: wandb, trackio")
        if self.peak_flops is not None and not 0 < self.peak_flops < math.inf:
            raise UpcycleError(f"log.peak_flops = {self.peak_flops}; it must be a number above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """When checkpoints are written; the last one of a run always is."""

    every: int = 500  # steps; 0: only the last
    keep: int = 2  # checkpoints that stay

    def __post_init__(self) -> None:
        if self.every < 0 or self.keep < 1:
            raise UpcycleError("checkpoint.every must be 0 or more, checkpoint.keep 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
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
    router: Balance = Balance()
    optimizer: Optimizer = Optimizer()
    parallel: Parallel = Parallel()
    log: Log = Log()
    checkpoint: Saving = Saving()

    def __post_init__(self) -> None:
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
        data = {k: dict(v) if isinstance(v, Mapping) else v for k, v in given.items()}
        if data.get("moe") is False:
            del data["moe"]
        router = data.pop("router", {})
        if not isinstance(router, dict):
            raise UpcycleError(f"[router] must be a section with keys, not {router!r}")
        for_recipe = {k: router.pop(k) for k in [*router] if k not in recipes.OF_TRAINING}
        made: dict[str, Any] = {"recipe": None, "task": None}
        if "task" in data:
            from upcycle import tasks

            if not isinstance(data["task"], dict):
                raise UpcycleError(f"[task] must be a section with keys, not {data['task']!r}")
            made["task"] = tasks.read(data.pop("task"))
        if "moe" in data:
            sections: dict[str, Any] = {k: data.pop(k) for k in recipes.OF_EXPERTS if k in data}
            made["recipe"] = Recipe.of(sections, router=for_recipe, seed=data.get("seed", 0))
        elif stray := [k for k in recipes.OF_EXPERTS if k in data] + [f"router.{k}" for k in for_recipe]:
            raise UpcycleError(f"{stray[0]} is for a Mixture of Experts; add a [moe] section, or take it out")
        beside = {"moe": recipes.Moe, "successor": recipes.Successor}
        others = dict.fromkeys(("task", "init", "dtype", "base", *recipes.STACKS))
        run: Run = recipes.read(cls, {**data, "router": router}, "", made, {**beside, **others})
        return run

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Run:
        """The run in the TOML file `path`, with `KEY=VALUE` overrides."""
        return cls.of(recipes.override(recipes.read_toml(path, "run file"), overrides))

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
        table = dataclasses.asdict(self)
        table |= {"recipe": None, "task": None}
        if self.task is not None:
            from upcycle import tasks

            table["task"] = tasks.as_table(self.task)
        if self.recipe is not None:
            full = self.recipe.as_table()
            table["router"] |= full.pop("router")
            table |= {k: v for k, v in full.items() if k != "seed"}
        return _without_none(table)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run that goes on from it."""
        free = ("parallel", "log", "checkpoint", "out")
        table = {k: v for k, v in self.as_table().items() if k not in free}
        train = {k: v for k, v in table["train"].items() if k not in ("micro_batch", "compile")}
        return table | {"train": train}


def _without_none(value: Any) -> Any:
    """TOML has no null: a key that is None is left out."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value
