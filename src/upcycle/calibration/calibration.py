"""Streams examples through a dense model and collects statistics of its activations (`upcycle calibrate`).

Takes a dense checkpoint and images or text; writes a file that `statistics.py` reads. The sums are saved next
to it every few batches, so that an interrupted pass resumes with bit-identical results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

import upcycle
from upcycle.calibration.asked import Asked
from upcycle.calibration.observer import MOST, Observer, means
from upcycle.calibration.stopped import begun, restore, save
from upcycle.checkpoints import tensor_file
from upcycle.checkpoints.hub import open_checkpoint
from upcycle.checkpoints.tensor_file import Tensor
from upcycle.dense.source import Dense, admit
from upcycle.dense.statistics import (
    FORMAT,
    KEY,
    PARTIAL,
    Statistics,
    fingerprint,
)
from upcycle.dense.subject import Subject
from upcycle.errors import UpcycleError
from upcycle.hf import models, opening
from upcycle.hf.quiet import quiet
from upcycle.system import claim, lock, memory, scratch
from upcycle.system.progress import Progress, reporting_to, say, work
from upcycle.system.signals import interrupting, noted
from upcycle.system.wording import size
from upcycle.tasks._rows import Rows, of_images, of_text

__all__ = ["Asked", "calibrate"]

SAVE_EVERY = 50  # batches
ENDING = ".safetensors"


def calibrate(
    source: str | Path,
    out: str | Path,
    asked: Asked,
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
        dense, device = admit(opened), _device(asked.device)
        asked = _there(dense, asked)
        _check_memory(dense, asked, device)
        rows = _rows(dense, asked, asked.cache or made_here)
        order = asked.order(rows.count)
        provenance = _provenance(dense, asked, rows, device, len(order))
        partial_file = out.with_name(out.name + PARTIAL)
        done = begun(partial_file, provenance)
        model = _model(dense, device)
        observer = Observer(
            model,
            dense.stacks,
            positions=asked.positions,
            names=asked.collect,
            threshold=asked.threshold,
        )
        if done:
            restore(partial_file, observer)
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(out), work("calibrating", "examples", total=len(order), done=done) as calibrating:
            with noted(SIGINT, SIGTERM, twice_stops=True) as came:
                for number, start in enumerate(range(done, len(order), asked.batch_size), start=1):
                    places = order[start : start + asked.batch_size]
                    _batch(model, observer, dense, rows, places, gradient="gradient" in asked.collect)
                    done = start + len(places)
                    if max(observer.tokens.values()) > MOST:
                        raise UpcycleError(f"more than {MOST} tokens; lower --limit {len(order)}")
                    stop = bool(came) and done < len(order)
                    if stop or number % save_every == 0:
                        _refuse_nonfinite(observer, dense)
                        save(partial_file, observer, provenance, done)
                    calibrating.advance(len(places))
                    if stop:
                        raise KeyboardInterrupt
            _refuse_nonfinite(observer, dense)
            found = provenance | {"tokens": observer.tokens}
            tensor_file.write(out, _statistics(observer), {"format": "pt", KEY: json.dumps(found)})
            partial_file.unlink(missing_ok=True)
    return Statistics.open(out)


# --- before the first batch


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
        yield


def _there(dense: Dense, asked: Asked) -> Asked:
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


def _check_memory(dense: Dense, asked: Asked, device: torch.device) -> None:
    """Report the memory for pairs of neurons and refuse what cannot fit (4 bytes per number)."""
    model = 4 * sum(t.size for t in dense.tensors.values())
    pairs = 0
    if "co_activation" in asked.collect:
        pairs = 4 * sum(stack.count * stack.width**2 for stack in dense.stacks)
        layers = sum(stack.count for stack in dense.stacks)
        say(f"co_activation of {layers} layers takes {size(pairs)} of memory, and of the file")
    free = _free(device)
    if free is not None and model + pairs > free:
        raise UpcycleError(
            f"{dense.checkpoint.folder} in float32 takes {size(model)}"
            + (f" and co_activation {size(pairs)}" if pairs else "")
            + f", and {size(free)} of the memory of {device} are free; "
            + ("leave co_activation out of --collect, or " if pairs and model <= free else "")
            + "use a machine or a --device with more"
        )


def _rows(dense: Dense, asked: Asked, cache: Path) -> Rows:
    subject = Subject.of_dense(dense)
    gradient = "gradient" in asked.collect
    if asked.images is not None:
        return of_images(asked.images, subject, cache, gradient=gradient, seed=asked.seed)
    assert asked.text is not None
    return of_text(asked.text, subject, cache, gradient=gradient, seed=asked.seed, length=asked.length)


def _provenance(dense: Dense, asked: Asked, rows: Rows, device: torch.device, count: int) -> dict[str, Any]:
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
            "fingerprint": fingerprint(dense),
        },
        "data": dict(rows.about),
        "examples": count,
        "collect": sorted(asked.collect),
        "positions": sorted(asked.positions),
        "threshold": asked.threshold,
        "seed": asked.seed,
        "in_order": asked.in_order,
        "length": asked.length,
        "batch_size": asked.batch_size,
        "device": str(device),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _model(dense: Dense, device: torch.device) -> PreTrainedModel:
    with quiet():
        cls = models.architecture(dense.architecture)
        model = opening.fill(cls, dense.checkpoint.folder, dtype=torch.float32)
    model.requires_grad_(False)
    return model.to(device).eval()


# --- a batch


def _batch(
    model: PreTrainedModel,
    observer: Observer,
    dense: Dense,
    rows: Rows,
    places: np.ndarray,
    *,
    gradient: bool,
) -> None:
    """Run the model on the examples numbered `places`. Without gradients the head is left out."""
    read = rows.read(places)
    batch = {name: torch.from_numpy(np.ascontiguousarray(a)).to(model.device) for name, a in read.items()}
    question = rows.ask(batch)
    real = rows.real(question.inputs, [stack.name for stack in dense.stacks])
    try:
        with observer.watching(real), torch.set_grad_enabled(gradient):
            if not gradient:
                model.base_model(**question.inputs)
                return
            assert rows.task is not None
            logits = model(**question.inputs).logits
            rows.task.loss(logits, question.labels).backward()
    except torch.OutOfMemoryError:
        raise UpcycleError(
            f"a batch of {len(places)} does not fit in the memory of {model.device}; lower --batch-size"
        ) from None


def _refuse_nonfinite(observer: Observer, dense: Dense) -> None:
    for name, total in observer.sums.items():
        if total.is_floating_point() and not bool(total.isfinite().all()):
            raise UpcycleError(
                f"{name} of {dense.checkpoint.folder} is NaN or inf on these examples; look for them in the "
                f"model (upcycle inspect) and in the data"
            )


def _statistics(observer: Observer) -> dict[str, Tensor]:
    def made(name: str) -> np.ndarray:
        _, stack, _, kind = name.split(".")
        out: np.ndarray = means(kind, observer.sums[name], observer.tokens[stack]).cpu().numpy()
        return out

    return {
        name: Tensor("F32", tuple(total.shape), partial(made, name)) for name, total in observer.sums.items()
    }
