"""The numbers of a training step: on their way from the device (`Queued`), and read (`Outcome`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from upcycle.errors import UpcycleError
from upcycle.training import routing
from upcycle.training.routing import RouterKind, Tally
from upcycle.training.sections import Spikes
from upcycle.training.transfer import Transfer


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
    kinds: Sequence[RouterKind] = ()  # of the routers
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


def _nonfinite(step: int, loss: float, squares: dict[str, float]) -> UpcycleError:
    """Return the error of a run that stops before its weights change; it names a gradient at fault."""
    bad = next((name for name, square in squares.items() if not square < float("inf")), None)
    what = f"the first gradient that is not finite is that of {bad}" if bad else "no gradient is affected"
    return UpcycleError(
        f"step {step + 1}: the loss is {loss:g}; {what}. The weights were not updated and the last "
        f"checkpoint is kept; lower schedule.peak, lengthen the warm-up, or look at the data of this step"
    )
