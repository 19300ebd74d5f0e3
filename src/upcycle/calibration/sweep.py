"""A sweep over the examples: batch after batch through the model, sums that are saved, and what they give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from upcycle.calibration import mergekit
from upcycle.calibration.observer import MOST, TOKENS, Observer, means
from upcycle.calibration.parts import Part, batches
from upcycle.calibration.stopped import save
from upcycle.calibration.to_calibrate import ToCalibrate
from upcycle.checkpoints import tensor_file
from upcycle.checkpoints.tensor_file import Tensor
from upcycle.dense.source import Dense
from upcycle.errors import UpcycleError
from upcycle.records.statistics import KEY, NEGATIVE, OF_PROMPTS, WIDE
from upcycle.system.progress import Work
from upcycle.system.signals import noted


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The model, what watches it, the examples, and the file that sums are saved to."""

    dense: Dense
    asked: ToCalibrate
    data: Sequence[Part]
    model: PreTrainedModel
    observer: Observer
    provenance: dict[str, Any]
    partial_file: Path

    @property
    def examples(self) -> int:
        """The number of examples, of all parts."""
        return sum(len(part.order) for part in self.data)

    def run(self, done: int, save_every: int, calibrating: Work) -> None:
        """Show the model the examples after the first `done`; save the sums every `save_every` batches.

        Raises `KeyboardInterrupt` on SIGINT or SIGTERM, when the sums are saved.
        """
        gradient = "gradient" in self.asked.collect
        with noted(SIGINT, SIGTERM, twice_stops=True) as came:
            rest = batches(self.data, self.asked.batch_size, done)
            for number, (part, places) in enumerate(rest, start=1):
                _batch(self.model, self.observer, self.dense, part, places, gradient=gradient)
                done += len(places)
                if max(self.observer.tokens.values()) > MOST:
                    raise UpcycleError(f"more than {MOST} tokens; lower --limit {self.examples}")
                stop = bool(came) and done < self.examples
                if stop or number % save_every == 0:
                    _refuse_nonfinite(self.observer, self.dense)
                    save(self.partial_file, self.observer, self.provenance, done)
                calibrating.advance(len(places))
                if stop:
                    raise KeyboardInterrupt

    def write(self, out: Path) -> None:
        """Write the statistics, and remove the file of sums."""
        _refuse_nonfinite(self.observer, self.dense)
        tensors = _statistics(self.observer) | _of_prompts(self.dense, self.asked, self.model)
        about = self.provenance | {"tokens": self.observer.tokens} | _domains(self.observer, self.asked)
        tensor_file.write(out, tensors, {"format": "pt", KEY: json.dumps(about)})
        self.partial_file.unlink(missing_ok=True)


def _batch(
    model: PreTrainedModel,
    observer: Observer,
    dense: Dense,
    part: Part,
    places: np.ndarray,
    *,
    gradient: bool,
) -> None:
    """Run the model on the examples numbered `places`. Without gradients the head is left out."""
    rows = part.rows
    read = rows.read(places)
    batch = {name: torch.from_numpy(np.ascontiguousarray(a)).to(model.device) for name, a in read.items()}
    question = rows.ask(batch)
    real = rows.real(batch, question.inputs, [stack.name for stack in dense.stacks])
    watching = observer.watching(real, part.domain, negative=part.negative)
    try:
        with watching, torch.set_grad_enabled(gradient):
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
            where = "its weights are finite, so look in the data, or for numbers that are too large"
            if dense.checkpoint.allow_nonfinite:
                where = "without --allow-nonfinite, a tensor of the model that holds them is named"
            raise UpcycleError(
                f"{name} of {dense.checkpoint.folder} is NaN or inf on these examples; {where}"
            )


def _statistics(observer: Observer) -> dict[str, Tensor]:
    def made(name: str) -> np.ndarray:
        _, stack, _, kind = name.split(".")
        tokens: int | torch.Tensor = observer.tokens[stack]
        if kind in ("mean", NEGATIVE):
            tokens = observer.sums[f"{TOKENS}.{stack}"][int(kind == NEGATIVE)]
        found: np.ndarray = means(kind, observer.sums[name], tokens).cpu().numpy()
        return found[: shape(name)[0]]  # a sample of fewer tokens than it has places for

    def shape(name: str) -> tuple[int, ...]:
        whole = tuple(observer.sums[name].shape)
        full = not name.endswith(".sample") or observer.tokens[name.split(".")[1]] >= whole[0]
        return whole if full else (observer.tokens[name.split(".")[1]], *whole[1:])

    return {
        name: Tensor("F64" if name.endswith(WIDE) else "F32", shape(name), partial(made, name))
        for name in observer.sums
        if not name.startswith(f"{TOKENS}.")
    }


def _of_prompts(dense: Dense, asked: ToCalibrate, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the statistics that are made of the prompts alone, in a pass of their own."""
    names = [name for name in asked.collect if name in OF_PROMPTS]
    if not names:
        return {}
    table: Any = model.get_input_embeddings()
    found = mergekit.rows(dense, asked.domains, names, table.weight)
    return {name: Tensor("F32", tuple(rows.shape), rows.numpy) for name, rows in found.items()}


def _domains(observer: Observer, asked: ToCalibrate) -> dict[str, Any]:
    """Return what the provenance says about the domains."""
    if not asked.domains:
        return {}
    counts = {stack: observer.sums[f"{TOKENS}.{stack}"].tolist() for stack in observer.tokens}
    return {
        "domains": [
            {
                "name": domain.name,
                "tokens": {stack: found[0][number] for stack, found in counts.items()},
                "negative_tokens": {stack: found[1][number] for stack, found in counts.items()},
            }
            for number, domain in enumerate(asked.domains)
        ]
    }
