"""What a run reports: a line of JSON a step, a line on the screen, and other people's dashboards."""

from __future__ import annotations

import importlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch

from upcycle.errors import UpcycleError
from upcycle.system import gpus, progress, whole_file
from upcycle.system.wording import count
from upcycle.training.run import Log

FILE = "metrics.jsonl"


def peak_flops(log: Log, device: torch.device) -> float | None:
    """The FLOP/s that MFU is measured against: what the run states, or that of a known GPU; None on a CPU."""
    if log.peak_flops is not None or device.type != "cuda":
        return log.peak_flops
    gpu = gpus.of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak_flops


def read(out: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; a line that is damaged, or was cut off by a kill, is left out."""
    return _read(out / FILE)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records in a file, and how many lines are damaged; the last may be cut off, as a kill leaves it."""
    records, damaged = [], 0
    *lines, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for line in (*lines, last):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise ValueError
            records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += bool(line.strip()) and line is not last
    return records, damaged


class Metrics:
    """The sinks of a run. Only the first rank has one that does anything."""

    def __init__(self, out: Path, log: Log, total: int, start: int, settings: dict[str, Any]) -> None:
        self.log, self.total, self.start = log, total, start
        # Steps after the checkpoint that is gone on from are done again, and stand in the file once.
        path = out / FILE
        before, damaged = _read(path)
        if damaged:
            lines = "1 line" if damaged == 1 else f"{damaged} lines"
            progress.warn(f"{lines} of {FILE} {'is' if damaged == 1 else 'are'} damaged and left out")
        kept = [r for r in before if r["step"] <= start]
        whole_file.write(path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self.file: IO[str] = path.open("a")
        self.sinks = [_sink(name, log, out, settings) for name in log.sinks]
        self.warned: set[str] = set()
        self.shown = ExitStack()
        self.work = self.shown.enter_context(
            progress.work("training", "steps", total=total, done=start, every=log.every)
        )

    def step(self, record: dict[str, Any]) -> None:
        """One step is done."""
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            self.warn(f"metrics of step {record['step']} are lost: {error.strerror}")
        done, loss, speed = record["step"], record["loss"], record["tokens_per_s"]
        note = f"step {done}/{self.total}  loss {loss:.4f}  {count(speed)} tokens/s"
        if record.get("mfu") is not None:
            note += f"  MFU {record['mfu']:.1%}"
        self.work.advance(1, note)
        if "held_out_loss" in record:
            self.say(f"step {done}: {score(record)}")
        for layer in record.get("layers", ()):
            self._watch(done, layer)
        flat = {k: v for k, v in record.items() if isinstance(v, (int, float))}
        for layer in record.get("layers", ()):
            place = "_".join(filter(None, [layer.get("stack"), f"layer_{layer['layer']}"]))
            flat |= {f"{place}/{k}": v for k, v in layer.items() if isinstance(v, float)}
        for sink in self.sinks:
            sink.log(flat, step=done)

    def _watch(self, step: int, layer: dict[str, Any]) -> None:
        """Say it once when a layer collapses, and again only after it recovered."""
        place = f"{layer.get('stack', '')} {layer['layer']}".strip()
        if layer["collapsed"] and place not in self.warned:
            self.warned.add(place)
            self.warn(
                f"step {step}: layer {place} collapsed; its busiest expert takes "
                f"{layer['busiest']:.0%} of the slots, {layer['dead']} take none; "
                f"raise router.balance_loss_coef"
            )
        elif not layer["collapsed"]:
            self.warned.discard(place)

    def say(self, sentence: str) -> None:
        """A sentence above the progress bar."""
        progress.say(sentence)

    def warn(self, sentence: str) -> None:
        """What should not be overlooked, above the progress bar."""
        progress.warn(sentence)

    def close(self) -> None:
        """Flush and finish everything."""
        self.shown.close()
        self.file.close()
        for sink in self.sinks:
            sink.finish()


def score(record: dict[str, Any]) -> str:
    """How well held-out rows went."""
    return f"held-out loss {record['held_out_loss']:.4f}, accuracy {record['held_out_accuracy']:.2%}"


def _sink(name: str, log: Log, out: Path, settings: dict[str, Any]) -> Any:
    """A module with `log` and `finish`, started for this run; wandb and trackio share their interface."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        raise UpcycleError(f"log.sinks names {name}, which is not installed: pip install {name}") from None
    module.init(project=log.project, name=log.name or out.name, config=settings)
    return module
