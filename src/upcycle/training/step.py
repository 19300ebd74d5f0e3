"""One training step (forward, losses, backward, update), and the score on held-out rows.

Every loss is a mean over the global batch. A rank computes its part of the sum. FSDP2 averages gradients over
the ranks that see different rows, so each part is multiplied by their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from upcycle.errors import UpcycleError
from upcycle.hf import heads, packing
from upcycle.hf.heads import Head
from upcycle.tasks import Batch, Question, Task
from upcycle.training import chunked_entropy, distillation, fit, gradients, router_losses, routing
from upcycle.training import optimizer as optim
from upcycle.training.distillation import Losses
from upcycle.training.freezing import Kept
from upcycle.training.parallel import Ranks
from upcycle.training.routing import Kind, Routers, Tally
from upcycle.training.run import Run, Spikes
from upcycle.training.seeds import Seeds
from upcycle.training.spikes import Recent
from upcycle.training.start import Start
from upcycle.training.teacher import Teaching
from upcycle.training.transfer import Transfer


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model in training, with everything that a step needs."""

    model: PreTrainedModel
    task: Task
    start: Start
    optimizer: torch.optim.Optimizer
    routers: Routers | None
    run: Run
    ranks: Ranks
    precision: str
    kept: Kept | None = None  # experts of trained stacks that are not trained
    recent: Recent | None = None  # the last steps, against which the next ones are judged
    teacher: Teaching | None = None

    @property
    def lengths(self) -> dict[str, int]:
        """The tokens of a row in each stack of blocks."""
        return self.task.lengths(self.run.train.sequence_length, self.start.subject)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context for bfloat16 arithmetic with float32 weights, unless FSDP2 does this itself."""
        if self.precision != "mixed" or self.ranks.dp_size > 1:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, torch.bfloat16)

    def logits(self, question: Question, **options: Any) -> Tensor:
        """Return the model's logits for a question."""
        with self.autocast(), packing.told(question.inputs):
            out: Tensor = self.model(**question.inputs, **options).logits
        return out

    def entropy(self, question: Question) -> Tensor:
        """Return the cross-entropy in nats, summed over the targets of a question."""
        if not self._in_chunks(question):
            return self.task.loss(self.logits(question), question.labels)
        return self._without_logits(
            question, lambda hidden, head: chunked_entropy.cross_entropy(hidden, question.labels, head)
        )

    def losses(self, question: Question, batch: Batch) -> Losses:
        """Return the losses of a question about a batch: the cross-entropy, and the teacher's part."""
        settings = self.run.teacher
        if self.teacher is None or settings is None:
            entropy = self.entropy(question)
            return Losses(total=entropy, entropy=entropy)
        in_chunks = self._in_chunks(question)
        with self.autocast(), packing.told(question.inputs):
            lesson = self.teacher.lesson(question, batch, in_chunks=in_chunks)
        if not in_chunks:
            logits = self.logits(question).flatten(0, -2)
            return distillation.losses(logits, question.labels.flatten(), lesson, settings)
        found: list[Losses] = []

        def distilled(hidden: Tensor, head: Head) -> Tensor:
            found.append(chunked_entropy.distilled(hidden, question.labels, head, lesson, settings))
            return found[0].total

        total = self._without_logits(question, distilled)
        return replace(found[0], total=total)

    def scores(self, question: Question, rows: int) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy and the number of right answers of a question's first rows."""
        labels = question.labels[:rows]
        if not self._in_chunks(question):
            logits = self.logits(question)[:rows]
            return self.task.loss(logits, labels), self.task.correct(logits, labels)
        found: list[Tensor] = []

        def score(hidden: Tensor, head: Head) -> Tensor:
            loss, right = chunked_entropy.scores(hidden[:rows], labels, head)
            found.append(right)
            return loss

        return self._without_logits(question, score), found[0]

    def _in_chunks(self, question: Question) -> bool:
        """Return whether the logits are so many that they are computed in chunks.

        A teacher's are not compared with logits of which each rank has a part.
        """
        if not self.task.by_token or (self.teacher is not None and self.ranks.layout.tp > 1):
            return False
        words = heads.words(self.model)
        return words is not None and chunked_entropy.is_worth(question.labels.numel(), words)

    def _without_logits(self, question: Question, compute: Callable[[Tensor, Head], Tensor]) -> Tensor:
        with self.autocast(), packing.told(question.inputs):
            return heads.without_logits(self.model, question.inputs, compute)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a step, over the global batch."""

    loss: float  # cross-entropy, nats per target
    grad_norm: float
    divergence: float | None = None  # KL(teacher || model), nats per target; None without a teacher
    stopping: bool = False  # whether a rank was asked to stop
    stands_out: bool = False  # whether loss or gradient stand out against the last steps
    finite: bool = True
    tallies: Sequence[Tally] = ()  # one per layer, on the CPU
    balance_loss: float | None = None  # mean or sum over layers; each is top_k at perfect balance
    z_loss: float | None = None
    own_losses: Mapping[str, float] = field(default_factory=dict)  # the routers' own losses
    router_grad_norms: Sequence[float] = ()

    def skipped(self, spikes: Spikes) -> bool:
        """Return whether the update was left out."""
        return not self.finite or (self.stands_out and spikes.act != "warn")

    def rolls_back(self, spikes: Spikes) -> bool:
        """Return whether the run goes back to a checkpoint because of this step."""
        return (spikes.nonfinite if not self.finite else spikes.act if self.stands_out else "") == "roll_back"

    def what(self) -> str:
        """Return a phrase on a step that stands out, or is not finite."""
        how = "stands out against the last steps" if self.finite else "is not finite"
        return f"the loss is {self.loss:.4g} and the gradient's norm {self.grad_norm:.4g}, which {how}"


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A step that is queued on the device, or done, and whose numbers are on their way to the host."""

    step: int
    transfer: Transfer
    gradients: Sequence[str]  # names of the parameters that had one
    kinds: Sequence[Kind] = ()  # of the routers
    routers: Sequence[str] = ()
    own: Sequence[str] = ()  # names of the routers' own losses
    spikes: Spikes = field(default_factory=Spikes)
    taught: bool = False  # whether there is a teacher, whose divergence is the last sum

    def outcome(self) -> Outcome:
        """Wait for the step's numbers and return them.

        Raises `UpcycleError` if the loss or a gradient is not finite and the run stops at such a step.
        """
        read = self.transfer.read()
        loss, *others = read["sums"].tolist()
        divergence = others.pop() if self.taught else None
        squares = dict(zip(self.gradients, read["squares"].tolist(), strict=True))
        finite = bool(read["finite"])
        if not finite and self.spikes.nonfinite == "stop":
            raise _nonfinite(self.step, loss, squares)
        norm = sum(squares.values()) ** 0.5
        stopping = bool(read["stopping"].any())
        seen = Outcome(
            loss=loss,
            grad_norm=norm,
            stopping=stopping,
            divergence=divergence,
            stands_out=bool(read["stands_out"]),
            finite=finite,
        )
        if not self.kinds:
            return seen
        balance, z, *own = others
        return replace(
            seen,
            tallies=routing.split(read["tallies"].long(), self.kinds),
            balance_loss=balance,
            z_loss=z,
            own_losses=dict(zip(self.own, own, strict=True)),
            router_grad_norms=[
                sum(s for n, s in squares.items() if n.startswith(f"{name}.")) ** 0.5 for name in self.routers
            ],
        )


def train_step(trainee: Trainee, batch: Batch, step: int, lr: float) -> Outcome:
    """Update the model on this rank's part of the global batch, and wait until that is done.

    Raises `UpcycleError` if the loss or a gradient is not finite; then the weights are as they were.
    """
    return queue_step(trainee, batch, step, lr).outcome()


def queue_step(trainee: Trainee, batch: Batch, step: int, lr: float, stop: Sequence[int] = ()) -> Queued:
    """Queue an update of the model on this rank's part of the global batch.

    The host waits for nothing, apart from what transformers' or torch's own code waits for. The update is
    skipped on the device if the loss or a gradient is not finite. `stop` holds the signals by which this rank
    was asked to stop, which the others learn from the step's numbers.
    """
    run, ranks, routers = trainee.run, trainee.ranks, trainee.routers
    seeds = Seeds(run=run.train_seed, step=step, rank=ranks.dp_rank)
    torch.manual_seed(seeds.of_step)
    micros = _split(batch, run.train.micro_batch)
    questions = [trainee.task.question(micro, trainee.start.subject, training=True) for micro in micros]
    targets = _all_targets(trainee, batch)
    known = _count_ahead(trainee, questions, seeds) if _needs_counts_ahead(run, routers, micros) else None
    sums: Tensor | None = None  # cross-entropy, balance, z, the routers' own losses, the teacher's divergence
    total: Tensor | None = None
    for place, question in enumerate(questions):
        with _recorded(trainee, seeds, place):
            found = trainee.losses(question, micros[place])
        loss, (entropy, *taught) = found.total / targets, [each / targets for each in found.told()]
        parts = [entropy]
        if routers is not None:
            seen = ranks.sum(routers.tallies())
            total = seen if total is None else total + seen
            share = 1.0 if known is not None else (place + 1) / len(micros)
            extra = _router_losses(trainee, total if known is None else known, share, len(micros))
            loss = loss + extra.total
            parts += extra.values()
        numbers_here = torch.stack([*parts, *taught]).double()
        sums = numbers_here if sums is None else sums + numbers_here
        (loss * ranks.dp_size).backward()
    assert sums is not None
    sums = ranks.sum(sums)
    grads = {n: p.grad for n, p in trainee.model.named_parameters() if p.grad is not None}
    if trainee.kept is not None:
        trainee.kept.clear(grads)
    squares = gradients.squared_norms(grads)
    # Every rank knows the same sums, so all of them skip alike.
    finite = (squares.sum() + sums[0]).isfinite()
    stands_out = torch.zeros_like(finite)
    if trainee.recent is not None:
        stands_out = trainee.recent.judge(sums[0], squares.sum().sqrt(), finite)
    skipped = ~finite if run.spikes.act == "warn" else ~finite | stands_out
    numbers = {"sums": sums, "squares": squares, "stopping": ranks.seen(bool(stop))}
    numbers |= {"finite": finite, "stands_out": stands_out}
    kinds: Sequence[Kind] = ()
    own: Sequence[str] = ()
    if routers is not None and total is not None:
        kinds, own = routers.kinds(), router_losses.own_names(routers.said)
        numbers["tallies"] = total
    queued = Queued(
        step=step,
        transfer=Transfer(numbers),
        gradients=[*grads],
        kinds=kinds,
        routers=() if routers is None else routers.names,
        own=own,
        spikes=run.spikes,
        taught=trainee.teacher is not None,
    )
    if run.train.clip_grad_norm:
        # In double precision: the norm's square of a float32 gradient may be beyond float32.
        gradients.scale(grads.values(), (run.train.clip_grad_norm / squares.sum().sqrt()).clamp(max=1.0))
    optim.set_rate(trainee.optimizer, lr)
    # An optimizer that cannot skip an update on the device waits.
    if optim.skip_if(trainee.optimizer, skipped) or not queued.outcome().skipped(run.spikes):
        trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    if trainee.kept is not None:
        trainee.kept.put_back()
    if routers is not None and total is not None:
        if rate := run.router.bias_rate(step):
            # biases stay where weights stay
            routing.update_biases(routers.biases(), routers.read(total), ~skipped * rate)
        routers.said.clear()
    return queued


def _all_targets(trainee: Trainee, batch: Batch) -> Tensor | int:
    """Return the number of predictions in the global batch; a tensor if only the labels tell it."""
    mine = trainee.task.targets(batch)
    ranks = trainee.ranks
    return ranks.sum(mine) if isinstance(mine, Tensor) else mine * ranks.dp_size


def _split(batch: Batch, size: int | None) -> list[Batch]:
    """Split a batch into parts of `size` rows."""
    names = list(batch)
    parts = zip(*(batch[name].split(size or len(batch[name])) for name in names), strict=True)
    return [dict(zip(names, part, strict=True)) for part in parts]


def _recorded(trainee: Trainee, seeds: Seeds, place: int) -> AbstractContextManager[Any]:
    """Return a context that records the routers in the forward pass of micro batch `place`."""
    if trainee.routers is None:
        return nullcontext()
    return trainee.routers.recording(jitter=trainee.run.router.jitter, seeds=replace(seeds, micro=place))


def _needs_counts_ahead(run: Run, routers: Routers | None, micros: Sequence[Batch]) -> bool:
    """Return whether the first backward pass needs the global batch's f_e in advance."""
    router = run.router
    exact = router.balance_loss == "per_layer" and router.balance_counts == "exact"
    return bool(routers is not None and len(micros) > 1 and exact and router.balance_loss_coef)


@torch.no_grad()
def _count_ahead(trainee: Trainee, questions: Sequence[Question], seeds: Seeds) -> Tensor:
    """Return the tallies of the global batch from a separate forward pass."""
    routers = trainee.routers
    assert routers is not None
    total: Tensor | None = None
    device = trainee.ranks.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        for place, question in enumerate(questions):
            with _recorded(trainee, seeds, place):
                trainee.logits(question, **trainee.task.counting)
            total = routers.tallies() if total is None else total + routers.tallies()
    assert total is not None
    return trainee.ranks.sum(total)


def _router_losses(trainee: Trainee, tallies: Tensor, share: float, micros: int) -> router_losses.Part:
    """Compute this micro batch's part of the router losses; `tallies` cover the part `share` of the batch."""
    routers = trainee.routers
    assert routers is not None
    return router_losses.part(
        routers.said,
        routers.read(tallies),
        trainee.run.router,
        share=share,
        parts=micros * trainee.ranks.dp_size,
    )


def _nonfinite(step: int, loss: float, squares: dict[str, float]) -> UpcycleError:
    """Return the error of a run that stops before its weights change; it names a gradient at fault."""
    bad = next((name for name, square in squares.items() if not square < float("inf")), None)
    what = f"the first gradient that is not finite is that of {bad}" if bad else "no gradient is affected"
    return UpcycleError(
        f"step {step + 1}: the loss is {loss:g}; {what}. The weights were not updated and the last "
        f"checkpoint is kept; lower schedule.peak, lengthen the warm-up, or look at the data of this step"
    )


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a model on held-out rows: nats and right answers per target."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(trainee: Trainee, batch: Batch) -> Score:
    """Return the score on held-out rows; every rank gets the same score and has all rows."""
    ranks, model, task = trainee.ranks, trainee.model, trainee.task
    rows = len(next(iter(batch.values())))
    share = -(-rows // ranks.dp_size)
    size = trainee.run.train.micro_batch or max(1, trainee.run.train.rows // ranks.dp_size)
    sums = torch.zeros(3, device=ranks.device, dtype=torch.float64)
    model.eval()
    whole = fit.rows_of_groups(trainee.start.built, trainee.lengths)
    for micro, count in _parts(batch, rows, ranks.dp_rank * share, share, size, whole):
        question = task.question(micro, trainee.start.subject, training=False)
        # All ranks run the same number of passes; the last may have rows that another rank counts.
        found = trainee.scores(question, count)
        if count:
            sums[:2] += torch.stack([x.double() for x in found])
            sums[2] += task.targets({name: t[:count] for name, t in micro.items()})
    model.train()
    loss, correct, targets = ranks.sum(sums).tolist()
    return Score(loss=loss / targets, accuracy=correct / targets)


def _parts(
    batch: Batch, rows: int, first: int, share: int, size: int, whole: int
) -> Iterator[tuple[Batch, int]]:
    """Yield micro batches of this rank's share, and the number of their rows that count.

    All ranks run the same number of passes, on multiples of `whole` rows.
    """
    for start in range(first, first + share, size):
        stop = min(start + size, first + share, rows)
        count = max(0, stop - start)
        chosen = (start + torch.arange(-(-max(count, 1) // whole) * whole)) % rows
        yield {name: t[chosen.to(t.device)] for name, t in batch.items()}, count
