"""Streams examples through a dense model and collects statistics of its activations (`upcycle calibrate`).

Takes a dense checkpoint and images or text; writes a file that `records/statistics.py` reads. The sums are
saved next to it every few batches, so that an interrupted pass resumes with bit-identical results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
import transformers

import upcycle
from upcycle.calibration import markers, model
from upcycle.calibration.observer import Observer
from upcycle.calibration.parts import Part, about, parts
from upcycle.calibration.stopped import begun, restore
from upcycle.calibration.sweep import Sweep
from upcycle.calibration.to_calibrate import ToCalibrate
from upcycle.checkpoints.hub import open_checkpoint
from upcycle.dense.admission import admit
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError
from upcycle.families import Stack
from upcycle.records.statistics import (
    FORMAT,
    NEGATIVE,
    OF_PROMPTS,
    PARTIAL,
    Statistics,
)
from upcycle.system import claim, lock, memory, scratch, whole_file
from upcycle.system.progress import Progress, reporting_to, say, work
from upcycle.system.signals import interrupting
from upcycle.system.wording import size

__all__ = ["ToCalibrate", "calibrate"]

SAVE_EVERY = 50  # batches
ENDING = ".safetensors"


def calibrate(
    source: str | Path,
    out: str | Path,
    asked: ToCalibrate,
    *,
    progress: Progress | None = None,
    save_every: int = SAVE_EVERY,
) -> Statistics:
    """Collect the statistics of the dense checkpoint `source` and write them to the file `out`.

    An interrupted pass with the same arguments resumes from the sums in OUT.partial. Raises `UpcycleError`
    for unusable input, and for a partial file with other arguments.
    """
    out = Path(out)
    _refuse_target(out)
    with (
        reporting_to(progress),
        interrupting(SIGTERM),
        open_checkpoint(source, allow_nonfinite=asked.allow_nonfinite) as opened,
        scratch.folder() as made_here,
    ):
        sweep, done = _begun(admit(opened, drop=asked.drop), asked, out, asked.cache or made_here)
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(out), work("calibrating", "examples", total=sweep.examples, done=done) as calibrating:
            sweep.run(done, save_every, calibrating)
            sweep.write(out)
    return Statistics.open(out)


def _begun(dense: Dense, asked: ToCalibrate, out: Path, cache: Path) -> tuple[Sweep, int]:
    """Return the sweep over the examples, and how many of them an interrupted one has seen already."""
    device = _device(asked.device)
    asked = _there(dense, asked)
    if "co_marker" in asked.collect:
        markers.refuse(dense, asked.marked)
    _check_memory(dense, asked, device)
    data = parts(dense, asked, cache)
    provenance = _provenance(dense, asked, data, device)
    partial_file = out.with_name(out.name + PARTIAL)
    done = begun(partial_file, provenance)
    opened = model.opened(dense, device, torch.float32)
    observer = Observer(
        opened,
        dense.stacks,
        positions=asked.positions,
        names=_summed(asked),
        threshold=asked.threshold,
        domains=len(asked.domains),
        sample=asked.sample,
        seed=asked.seed,
        markers=markers.markers(dense, asked.marked, device) if "co_marker" in asked.collect else None,
    )
    if done:
        restore(partial_file, observer)
    sweep = Sweep(
        dense=dense,
        asked=asked,
        data=data,
        model=opened,
        observer=observer,
        provenance=provenance,
        partial_file=partial_file,
    )
    return sweep, done


def _refuse_target(out: Path) -> None:
    if out.suffix != ENDING:
        raise UpcycleError(f"--out {out} must end in {ENDING}, which is what is written")
    claim.may_create(out)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second pass away from the same file, and refuse a result that another pass wrote meanwhile."""
    busy = f"another pass is writing {out}; wait for it or stop it"
    with lock.held(out.with_name(out.name + ".lock"), busy):
        _refuse_target(out)
        for file in (out, out.with_name(out.name + PARTIAL)):
            whole_file.clear_of(file)
        yield


def _there(dense: Dense, asked: ToCalibrate) -> ToCalibrate:
    """Leave out heads if the model has no attention, and tell the user."""
    if "heads" not in asked.positions or any(stack.heads for stack in dense.stacks):
        return asked
    rest = tuple(position for position in asked.positions if position != "heads")
    why = f"{dense.family.model_type} has no attention heads"
    if not rest:
        raise UpcycleError(f"--positions heads: {why}; ask for neurons or channels")
    say(f"{why}: --positions heads is left out")
    return replace(asked, positions=rest)


def _device(name: str | None) -> torch.device:
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UpcycleError(
            f"--device {name} cannot be used here ({reason}); leave it out, or give cpu"
        ) from None
    if device.type == "meta":
        raise UpcycleError("--device meta computes nothing; leave it out, or give cpu")
    return device


def _free(device: torch.device) -> int | None:
    """Return the number of free bytes of memory; None if it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return memory.available()


def _check_memory(dense: Dense, asked: ToCalibrate, device: torch.device) -> None:
    """Report the memory for matrices and refuse what cannot fit (4 bytes per number of the model)."""
    model = 4 * sum(t.size for t in dense.tensors.values())
    each: dict[str, Callable[[Stack], int]] = {
        "co_activation": lambda stack: 4 * stack.width**2,
        "co_marker": lambda stack: 4 * stack.width**2,
        "second_moment": lambda stack: 8 * stack.hidden**2,
        "sample": lambda stack: 4 * asked.sample * stack.hidden,
    }
    large = {
        name: sum(len(stack.numbers) * nbytes(stack) for stack in dense.stacks)
        for name, nbytes in each.items()
        if name in asked.collect
    }
    layers = sum(len(stack.numbers) for stack in dense.stacks)
    for name, nbytes in large.items():
        say(f"{name} of {layers} layers takes {size(nbytes)} of memory, and of the file")
    free = _free(device)
    if free is not None and model + sum(large.values()) > free:
        names = ", ".join(large)
        raise UpcycleError(
            f"{dense.checkpoint.folder} in float32 takes {size(model)}"
            + "".join(f" and {name} {size(nbytes)}" for name, nbytes in large.items())
            + f", and {size(free)} of the memory of {device} are free; "
            + (f"leave {names} out of --collect, or " if large and model <= free else "")
            + "use a machine or a --device with more"
        )


def _summed(asked: ToCalibrate) -> list[str]:
    """Return the names of the statistics that are sums over activations."""
    names = [name for name in asked.collect if name not in OF_PROMPTS]
    negative = "mean" in names and any(domain.negative_prompts for domain in asked.domains)
    return [*names, NEGATIVE] if negative else names


def _provenance(
    dense: Dense, asked: ToCalibrate, data: Sequence[Part], device: torch.device
) -> dict[str, Any]:
    """Return everything that the statistics depend on, as JSON; it has no times and no paths."""
    found = {
        "format": FORMAT,
        "upcycle_version": upcycle.__version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "source": {
            "name": dense.checkpoint.name,
            "model_type": dense.family.model_type,
            "architecture": dense.architecture,
            "fingerprint": dense.fingerprint,
        },
        "data": about(asked, data),
        "examples": sum(len(part.order) for part in data),
        "collect": sorted(asked.collect),
        "positions": sorted(asked.positions),
        "threshold": asked.threshold,
        "seed": asked.seed,
        "in_order": asked.in_order,
        "length": asked.length,
        "batch_size": asked.batch_size,
        "device": str(device),
        **({"sample": asked.sample} if "sample" in asked.collect else {}),
        **({"marked": asked.marked} if "co_marker" in asked.collect else {}),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain
