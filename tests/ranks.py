"""What ranks do in `test_parallel.py` and `test_upcycled_parallel.py`: load, take a step, stop and go on."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

import upcycle
from upcycle import Recipe, UpcycleError, loading, tasks
from upcycle.data.corruption import IGNORED
from upcycle.training import (
    agreement,
    chunked_entropy,
    held_out,
    kept_logits,
    metrics,
    optimizer,
    optimizers,
    saving,
    start,
    step,
    teacher,
    together,
)
from upcycle.training import gradients as grads
from upcycle.training.loop import train
from upcycle.training.parallel import ranks
from upcycle.training.routing import Routers
from upcycle.training.run import Run
from upcycle.training.sections import Parallel
from upcycle.training.trainee import Trainee

Layout = dict[str, int]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def digests(model: torch.nn.Module) -> dict[str, str]:
    return {name: digest(whole(p)) for name, p in model.named_parameters()}


def loads(cases: list[tuple[str, dict[str, Any]]], layouts: list[Layout]) -> list[dict[str, Any]]:
    """`upcycle.load` of every case at every layout: digests of the parameters, bytes held, experts' elements
    read and what one rank would read of all of them."""
    read = [0]
    original = loading.write_part

    def counted(entry: Any, part: Any, memory: torch.Tensor) -> None:
        original(entry, part, memory)
        if len(entry.shape) == 3:
            read[0] += memory.numel()

    loading.write_part = counted
    out = []
    for source, table in cases:
        for layout in layouts:
            read[0] = 0
            sizes = {f"{name}_size": size for name, size in layout.items()}
            model = upcycle.load(source, Recipe.of(table), distributed_config=sizes)
            experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
            held = sum(grads.local(p).nbytes for p in model.parameters())
            total = sum(p.numel() * p.element_size() for p in model.parameters())
            out.append({"digests": digests(model), "held": held / total, "read": read[0], "experts": experts})
    return out


def optimizers_here() -> list[str]:
    """The optimizers whose libraries are installed."""
    lacks = set() if importlib.util.find_spec("torchao") else {"adamw_8bit"}
    return [name for name in optimizers.names() if name not in lacks]


def run_of(source: str, parallel: Layout, changes: dict[str, Any]) -> Run:
    table: dict[str, Any] = {
        "source": source,
        "out": "unused",
        "moe": {"num_experts": 4, "top_k": 2},
        "init": {"name": "drop", "ratio": 0.5},
        # exact, because most tests compare a batch in parts with the whole
        "router": {
            "balance_loss_coef": 0.1,
            "z_loss_coef": 0.01,
            "std": 0.5,
            "balance_counts": "exact",
        },
        "data": {"sources": [{"path": "unused.txt"}]},
        "train": {"steps": 1, "batch_tokens": 64, "sequence_length": 16, "clip_grad_norm": 0.0},
        "schedule": {"name": "constant", "peak": 1e-3},
        "parallel": parallel,
    }
    for section, values in changes.items():
        if section == "init":
            table.pop(section)  # another one has other keys
        table[section] = {**table.get(section, {}), **values} if isinstance(values, dict) else values
    return Run.of(table)


def experts_of(run: Run) -> list[int]:
    return [run.recipe.moe.num_experts] if run.recipe else []


def score_of(trainee: Trainee, batch: dict[str, torch.Tensor]) -> held_out.Score:
    """The score of a model on held-out rows, of which `batch` has those of all ranks."""
    mine = held_out.HeldOut.of(batch, trainee.ranks, held_out.whole(trainee))
    return held_out.score(trainee, mine)


def trainee_of(run: Run, here: Any, precision: str = "float32") -> Trainee:
    begun = start.start_of(run)
    model = start.model_of(begun, run, here, precision)
    routers = Routers.of(model)
    return Trainee(
        model=model,
        task=run.task or tasks.of(begun.subject.architecture),
        start=begun,
        optimizer=optimizer.make(model, run.optimizer, start.scales(begun, run, model, routers)),
        routers=routers,
        run=run,
        ranks=here,
        precision=precision,
        teacher=teacher.teaching(run, begun, None, None, here, precision=precision, steps=1),
    )


def rows_of(run: Run, vocabulary: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (run.train.rows, run.train.sequence_length + 1)
    return torch.randint(0, vocabulary, size, generator=generator)


def batch_of(run: Run, task: tasks.Task) -> tasks.Batch:
    """The rows of a step, for the task at hand: of text or chats, or images of 12 x 12 and three classes."""
    if task.name == "causal_lm":
        rows = rows_of(run)
        return {"rows": rows, "positions": positions_of(rows)} if run.data.isolate else {"rows": rows}
    if task.name == "sft":
        return chats_of(run)
    generator = torch.Generator().manual_seed(0)
    size = (run.train.rows, 12, 12, 3)
    pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return {"pixels": pixels, "labels": torch.randint(0, 3, size[:1], generator=generator)}


def positions_of(rows: torch.Tensor) -> torch.Tensor:
    """Positions of documents that begin at random places, at another of each row."""
    begins = torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    begins[:, 0] = True
    place = torch.arange(rows.shape[1]).expand_as(rows)
    return place - torch.where(begins, place, 0).cummax(-1).values


def chats_of(run: Run) -> tasks.Batch:
    """Rows of chats: each has other answers than the last, and more padding."""
    rows, place = rows_of(run), torch.arange(run.train.sequence_length)
    number = torch.arange(len(rows))[:, None]
    real = place < len(place) - 2 * number
    answers = real & (place >= 3 + 2 * number)
    return {
        "ids": torch.where(real, rows[:, :-1], 0),
        "labels": torch.where(answers, rows[:, 1:], IGNORED),
        "mask": real.long(),
    }


def gradients(
    source: str, cases: list[tuple[Layout, dict[str, Any]]], scored: bool = False
) -> list[dict[str, Any]]:
    """The gradients of a step for each layout and change of the run, and what the step reports.

    With `scored`, the model is scored before the step, and few logits are already worth chunks.
    """
    if scored:
        chunked_entropy.WORTH = 0
    out = []
    for layout, changes in cases:
        run = run_of(source, layout, changes)
        with ranks(run.parallel, experts=experts_of(run)) as here:
            trainee = trainee_of(run, here)
            kept: dict[str, torch.Tensor] = {}

            def keep(*_: Any, kept: Any = kept, trainee: Any = trainee) -> None:
                kept.update({n: whole(p.grad) for n, p in trainee.model.named_parameters()})

            trainee.optimizer.register_step_pre_hook(keep)
            batch = batch_of(run, trainee.task)
            share = run.train.rows // here.dp_size
            mine = {name: t[here.dp_rank * share :][:share] for name, t in batch.items()}
            if scored:
                score_of(trainee, batch)
                question = trainee.task.question(mine, trainee.start.subject, training=True)
                assert trainee._in_chunks(question) == (trainee.teacher is None or here.layout.tp == 1)
            outcome = step.train_step(trainee, mine, 0, 1e-3)
            out.append(
                {
                    "gradients": kept,
                    "loss": outcome.loss,
                    "divergence": outcome.divergence,
                    "norm": outcome.grad_norm,
                    "balance": outcome.balance_loss,
                    "z": outcome.z_loss,
                    "router_norms": list(outcome.router_grad_norms),
                    "counts": torch.stack([tally.counts for tally in outcome.tallies]),
                    "held_out": score_of(trainee, {name: t[:3] for name, t in batch.items()}).loss,
                }
            )
    return out


def routed(source: str, cases: list[tuple[Layout, dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the routers of a step in mixed precision read, and what they are before it, at each layout.

    With the gradients that reach them and the norms of all, and their biases after the step.
    """
    out = []
    for layout, changes in cases:
        run = run_of(source, layout, changes)
        with ranks(run.parallel, experts=experts_of(run)) as every:
            here = every.computing_in("mixed")
            trainee = trainee_of(run, here, "mixed")
            assert trainee.routers is not None
            pairs = [*zip(trainee.routers.names, trainee.routers.modules, strict=True)]
            held = {f"{n}.{k}": p for n, router in pairs for k, p in router.named_parameters()}
            with torch.no_grad():  # values that bfloat16 does not have
                for number, parameter in enumerate(held.values()):
                    generator = torch.Generator().manual_seed(number)
                    drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
                    grads.local(parameter).copy_(_part(drawn, parameter))
            before = {name: whole(p) for name, p in held.items()}
            read: dict[str, torch.Tensor] = {}

            def look(router: Any, _: Any, read: Any = read, pairs: Any = pairs) -> None:
                (name,) = (n for n, other in pairs if other is router)
                read.update({f"{name}.{k}": p.detach().clone() for k, p in router.named_parameters()})

            for _, router in pairs:
                router.register_forward_pre_hook(look)
            kept: dict[str, torch.Tensor] = {}

            def keep(*_: Any, kept: Any = kept, trainee: Any = trainee) -> None:
                found = {n: p.grad for n, p in trainee.model.named_parameters() if p.grad is not None}
                kept.update({name: whole(gradient) for name, gradient in found.items()})

            trainee.optimizer.register_step_pre_hook(keep)
            batch = batch_of(run, trainee.task)
            share = run.train.rows // here.dp_size
            mine = {name: t[here.dp_rank * share :][:share] for name, t in batch.items()}
            score_of(trainee, batch)  # without a backward pass, after which FSDP would free them
            outcome = step.train_step(trainee, mine, 0, 1e-3)
            after = {name: whole(p) for name, p in trainee.model.named_parameters() if name in held}
            out.append({"before": before, "read": read, "gradients": kept, "after": after})
            out[-1] |= {"norm": outcome.grad_norm, "loss": outcome.loss}
    return out


def _part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that this rank has of another one."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements).to_local()


def updated(source: str, cases: list[tuple[Layout, dict[str, Any]]], steps: int = 1) -> list[dict[str, Any]]:
    """Rate, weight decay and value of every parameter after steps, for each layout and change of the run."""
    out = []
    for layout, changes in cases:
        run = run_of(source, layout, changes)
        with ranks(run.parallel, experts=experts_of(run)) as here:
            trainee = trainee_of(run, here)
            batch = batch_of(run, trainee.task)
            share = run.train.rows // here.dp_size
            mine = {name: t[here.dp_rank * share :][:share] for name, t in batch.items()}
            for number in range(steps):
                step.train_step(trainee, mine, number, 1e-3)
            names = {parameter: name for name, parameter in trainee.model.named_parameters()}
            rates = {
                names[p]: (group["lr"], group["weight_decay"])
                for group in trainee.optimizer.param_groups
                for p in group["params"]
            }
            out.append({"rates": rates, "values": {name: whole(p) for p, name in names.items()}})
    return out


def refused(source: str, cases: list[tuple[Layout, dict[str, Any]]]) -> list[str]:
    """What the errors say for each layout and change of the run."""
    out = []
    for layout, changes in cases:
        run = run_of(source, layout, changes)
        with ranks(run.parallel, experts=experts_of(run)) as here:
            try:
                trainee_of(run, here)
                out.append("")
            except UpcycleError as error:
                out.append(str(error))
    return out


def trains(jobs: list[tuple[dict[str, Any], bool]]) -> list[dict[str, Any]]:
    """`upcycle train` of each table, resumed or not: how it ended."""
    results = []
    for table, resume in jobs:
        result = train(Run.of(table), resume=resume)
        results.append({"steps": result.steps, "loss": result.loss, "held_out": result.held_out_loss})
    return results


def examined(table: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """`upcycle train` of a table with tasks, and what the model at its end writes after some prompts."""
    from upcycle.evaluation import exam

    wrote: list[str] = []

    class Writes(exam.HarnessExaminer):
        def score(self, model: Any, run: Run, subject: Any, here: Any) -> Any:
            scores = super().score(model, run, subject, here)
            words = exam.corpus.tokenizer(run.data, subject.folder)
            language = exam.LanguageModel.of(model, words, subject, batch_size=2)
            shared = exam.replace(language, shared=here.world > 1)
            wrote[:] = shared.generate(prompts, most=4, until=("\n",))
            model.train()
            return scores

    def slowly(log: metrics.Metrics, *args: Any) -> None:
        time.sleep(0.5)  # the others could read the folder in between
        added(log, *args)

    added = metrics.Metrics.scored
    with mock.patch.object(metrics.Metrics, "scored", slowly):
        train(Run.of(table), examiner=Writes())
    lines = metrics.read(Path(table["out"]))
    return {
        "losses": [line.loss for line in lines], "scores": [dict(line.scores or {}) for line in lines],
        "wrote": wrote,
    }  # fmt: skip


def does_first_alone(folder: str, refuses: int | None) -> str:
    """What `together.first_alone` says of work that rank `refuses` cannot do."""
    seen = Path(folder) / "fetched"

    def work() -> None:
        if rank() == refuses:
            raise UpcycleError("no")
        if rank() == 0:
            time.sleep(0.3)
            seen.touch()
        assert seen.exists()

    with ranks(Parallel()) as here:
        try:
            together.first_alone(work, here)
        except UpcycleError as error:
            return str(error)
    return ""


def tokenizers_of_the_hub(table: dict[str, Any], caches: str) -> tuple[str, bool]:
    """What a run says where each rank has a cache of the hub of its own, and whether another rank says it."""
    with mock.patch.object(huggingface_hub.constants, "HF_HUB_CACHE", str(Path(caches) / str(rank()))):
        try:
            train(Run.of(table))
        except UpcycleError as error:
            dist.barrier()
            return str(error), error.elsewhere
    return "", False


def ends_alone() -> tuple[str, bool]:
    """What a rank says when rank 1 ends where no other hears of it, and whether another rank says it."""
    try:
        with ranks(Parallel()) as here:
            if rank() == 1:
                raise UpcycleError("no")
            here.barrier()
    except UpcycleError as error:
        return str(error), error.elsewhere
    return "", False


def refused_apart(cases: list[tuple[dict[str, Any], str]]) -> list[tuple[str, bool]]:
    """What runs say where each rank stands in a folder of its own, and whether another rank says it."""
    agreement._PATIENCE, kept_logits._ATTEMPTS = 0.0, 1
    out, home = [], os.getcwd()
    for table, folder in cases:
        os.chdir(Path(folder) / str(rank()))
        try:
            train(Run.of(table))
            out.append(("", False))
        except UpcycleError as error:
            out.append((str(error), error.elsewhere))
        os.chdir(home)
    dist.barrier()  # the store in which a sentence is noted ends with rank 0; torchrun's does not
    return out


def begun_apart(table: dict[str, Any], file: str, contents: list[str]) -> str:
    """What is said of a start if each rank finds something else at one path, as on disks of their own."""
    run = Run.of(table)
    for turn, content in enumerate(contents):
        if turn == rank():
            Path(file).write_text(content)
            mine = agreement.start_here(run, len(contents))
        dist.barrier()
    with ranks(run.parallel, experts=mine.expert_counts, heads=mine.attention_heads) as here:
        try:
            agreement.agreed(mine, here)
        except UpcycleError as error:
            return str(error)
    return ""


def dies_while_saving(table: dict[str, Any], step: int, said: str) -> None:
    """`upcycle train`, of which rank 1 dies when its part of a checkpoint is written; what rank 0 says."""
    hashes = saving._hashes

    def die(partial: Path, *rest: Any) -> dict[str, str]:
        if partial.name == f"step-{step}.partial" and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return hashes(partial, *rest)

    saving._hashes = die
    try:
        train(Run.of(table))
    except UpcycleError as error:
        Path(said).write_text(str(error))


def restored(table: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """The digests of parameters and the optimizer's state that a rank gets back from a checkpoint."""
    run = Run.of(table)
    with ranks(run.parallel, experts=experts_of(run)) as here:
        trainee = trainee_of(run, here)
        saving.load(Path(checkpoint), trainee.model, trainee.optimizer)
        moments = {
            f"{name} {moment}": digest(whole(tensor))
            for name, p in trainee.model.named_parameters()
            for moment, tensor in trainee.optimizer.state[p].items()
        }
        return {"parameters": digests(trainee.model), "moments": moments}


def several(calls: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    """Functions of this module by name, one after another: starting ranks takes longer than most of them."""
    return [globals()[name](*arguments) for name, arguments in calls]


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def peak_of_load(warm: str, source: str, table: dict[str, Any], layout: Layout) -> dict[str, int]:
    """How much `upcycle.load` of `source` adds to the memory of this rank at most, and what it then holds."""
    sizes = {f"{name}_size": size for name, size in layout.items()}
    upcycle.load(warm, Recipe.of(table), distributed_config=sizes)  # imports, meshes, buffers of gloo
    before, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = upcycle.load(source, Recipe.of(table), distributed_config=sizes)
    done.set()
    watcher.join()
    locals_ = [grads.local(p).nbytes for p in model.parameters()]
    whole_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"peak": most[0] - before, "held": sum(locals_), "largest": max(locals_), "whole": whole_bytes}


def rank() -> int:
    return int(os.environ["RANK"])
