"""The outputs of a run: one line of JSON per step, a line on the screen, and external dashboards."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from upcycle.checkpoints.checkpoint import read_json
from upcycle.errors import UpcycleError
from upcycle.records.metrics import LayerMetrics, StepMetrics
from upcycle.system import gpus, progress, whole_file
from upcycle.system.wording import count
from upcycle.training.sections import Log

_CELL = 16  # pixels of a side
SINKS = "sinks.json"  # a file of a run: the ids of its runs in dashboards


def peak_flops(log: Log, device: torch.device) -> float | None:
    """Return the peak FLOP/s for MFU: the run's setting, or that of a known GPU; None on a CPU."""
    if log.peak_flops is not None or device.type != "cuda":
        return log.peak_flops
    gpu = gpus.of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak_flops


def read(out: Path) -> list[StepMetrics]:
    """Return the steps of a run in order, without lines that are damaged or were cut off by a kill."""
    path = out / StepMetrics.FILE
    return [step for step, _ in _lines(path) if step is not None] if path.is_file() else []


def _lines(path: Path) -> Iterator[tuple[StepMetrics | None, bytes]]:
    """Yield each line of a file with its step, which is None for a damaged one.

    The last line is left out if a kill has cut it off. One line is held at a time: those of a large model
    over many steps are gigabytes.
    """
    with path.open("rb") as file:
        for line in file:
            try:
                yield StepMetrics.of_line(line, path.name), line.rstrip(b"\n") + b"\n"
            except UpcycleError:
                if line.strip() and line.endswith(b"\n"):
                    yield None, line


@dataclass(frozen=True)
class _Written:
    """The last line of the file: what it says, and the number of bytes before it."""

    step: StepMetrics
    begin: int


def _end_at(path: Path, last: int) -> tuple[_Written | None, int]:
    """Write a file anew without the steps after `last`; return its last line.

    Damaged lines are left out as well; also returns their number.
    """
    written, size, damaged = None, 0, 0
    with whole_file.filling(path) as file:
        for step, line in _lines(path) if path.is_file() else ():
            damaged += step is None
            if step is not None and step.step <= last:
                file.write(line)
                written, size = _Written(step, size), size + len(line)
    return written, damaged


class Metrics:
    """The outputs of a run. Only the first rank has one."""

    def __init__(self, out: Path, log: Log, total: int, start: int, settings: dict[str, Any]) -> None:
        self.log, self.total, self.start = log, total, start
        # Steps after the checkpoint are run again, so drop their old lines.
        path = self._path = out / StepMetrics.FILE
        self._written, damaged = _end_at(path, start)
        if damaged:
            lines = "1 line" if damaged == 1 else f"{damaged} lines"
            progress.warn(f"{lines} of {path.name} {'is' if damaged == 1 else 'are'} damaged and left out")
        self.file: IO[str] = path.open("a")
        self.sinks = [_sink(name, log, out, settings, resumed=start > 0) for name in log.sinks]
        self.warned: set[str] = set()
        self.shown = ExitStack()
        self.work = self.shown.enter_context(
            progress.work("training", "steps", total=total, done=start, every=log.every)
        )

    @property
    def last(self) -> StepMetrics | None:
        """The step of the last line; None if there is no line."""
        return None if self._written is None else self._written.step

    def _write(self, record: StepMetrics, begin: int | None = None) -> None:
        """Write a line, in place of all after byte `begin` if one is given.

        On a full disk it is lost, which ends no run.
        """
        self._written = None
        try:
            if begin is not None:
                self.file.truncate(begin)
            place = self._path.stat().st_size
            self.file.write(json.dumps(record.as_table()) + "\n")
            self.file.flush()
        except OSError as error:
            self.warn(f"metrics of step {record.step} are lost: {error.strerror}")
        else:
            self._written = _Written(record, place)

    def scored(self, step: int, scores: Mapping[str, float]) -> None:
        """Tell the scores on tasks after `step`, and add them to its line, if that is there."""
        for name, value in scores.items():
            self.say(f"step {step}: {name} {value:.4f}")
        for sink in self.sinks:
            sink.log({f"eval/{name}": value for name, value in scores.items()}, step=step)
        if self._written is not None:
            self._write(replace(self._written.step, scores=scores), self._written.begin)

    def step(self, record: StepMetrics) -> None:
        """Record one finished step."""
        self._write(record)
        done = record.step
        note = f"step {done}/{self.total}  loss {record.loss:.4f}  {count(record.tokens_per_s or 0)} tokens/s"
        if record.mfu is not None:
            note += f"  MFU {record.mfu:.1%}"
        self.work.advance(1, note)
        if record.held_out_loss is not None:
            self.say(f"step {done}: {score(record.held_out_loss, record.held_out_accuracy)}")
        for layer in record.layers:
            self._watch(done, layer)
        flat = _numbers(record)
        shows = bool(record.layers and self.log.pictures) and (
            done % self.log.pictures == 0 or done == self.total
        )
        for sink in self.sinks:
            picture = {"expert_load": sink.Image(load_picture(record.layers))} if shows else {}
            sink.log({**flat, **picture}, step=done)

    def go_back(self, step: int) -> None:
        """Drop the lines after `step`, because those steps are taken again."""
        self._shut()
        self._written, _ = _end_at(self._path, step)
        self.file = self._path.open("a")

    def _watch(self, step: int, layer: LayerMetrics) -> None:
        """Warn once when a layer collapses, and again only after it has recovered."""
        place = f"{'' if layer.stack == 'layers' else layer.stack} {layer.layer}".strip()
        if layer.collapsed and place not in self.warned:
            self.warned.add(place)
            self.warn(
                f"step {step}: layer {place} collapsed; its busiest expert takes "
                f"{layer.busiest:.0%} of the slots, {layer.dead} take none; "
                f"raise router.balance_loss_coef"
            )
        elif not layer.collapsed:
            self.warned.discard(place)

    def say(self, sentence: str) -> None:
        """Print a sentence above the progress bar."""
        progress.say(sentence)

    def warn(self, sentence: str) -> None:
        """Print a warning above the progress bar."""
        progress.warn(sentence)

    def close(self) -> None:
        """Flush and close all outputs."""
        self.shown.close()
        self._shut()
        for sink in self.sinks:
            sink.finish()

    def _shut(self) -> None:
        """Close the file. On a full disk it lacks lines, which ends no run."""
        try:
            self.file.close()
        except OSError as error:
            self.warn(f"{self._path.name} lacks the last steps: {error.strerror}")


def load_picture(layers: Sequence[LayerMetrics]) -> np.ndarray:
    """Return a picture of the experts' load, uint8 [L x 16, E x 16, 3]: a row a layer, a column an expert.

    A cell is white if the expert got no token, and dark blue if it got twice its even share or more. A layer
    of fewer experts than the widest ends in grey.
    """
    widest = max(len(layer.load) for layer in layers)
    cells = np.full((len(layers), widest, 3), 128.0)
    for row, layer in zip(cells, layers, strict=True):
        shade = np.clip(np.array(layer.load) * len(layer.load) / 2, 0, 1)[:, None]
        row[: len(layer.load)] = (1 - shade) * (255, 255, 255) + shade * (8, 48, 107)
    return cells.round().astype(np.uint8).repeat(_CELL, 0).repeat(_CELL, 1)


def score(loss: float, accuracy: float | None) -> str:
    """Return a phrase with the held-out loss in nats and the share of right answers."""
    return f"held-out loss {loss:.4f}" + ("" if accuracy is None else f", accuracy {accuracy:.2%}")


def _numbers(record: StepMetrics) -> dict[str, float]:
    """Return the numbers of a step in a flat table, for dashboards."""
    flat = {k: v for k, v in record.as_table().items() if isinstance(v, (int, float))}
    for layer in record.layers:
        place = f"layer_{layer.layer}" if layer.stack == "layers" else f"{layer.stack}_layer_{layer.layer}"
        flat |= {f"{place}/{k}": v for k, v in layer.as_table().items() if isinstance(v, float)}
    return flat


def _sink(name: str, log: Log, out: Path, settings: dict[str, Any], *, resumed: bool) -> Any:
    """Start a dashboard for this run; wandb and trackio share `init`, `log`, `Image` and `finish`."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        raise UpcycleError(f"log.sinks names {name}, which is not installed: pip install {name}") from None
    more: dict[str, Any] = {}
    if resumed:
        known = read_json(out / SINKS, "") if (out / SINKS).is_file() else {}
        more = {"resume": "allow", **({"id": known[name]} if isinstance(known.get(name), str) else {})}
    begun = module.init(project=log.project, name=log.name or out.name, config=settings, **more)
    if name == "wandb":  # trackio finds a run by its name
        whole_file.write_json(out / SINKS, {name: begun.id})
    if name == "trackio":  # wandb says the address of its page itself
        progress.say(f"the live page of this run: trackio show --project {log.project}")
    return module
