"""Commands killed at random moments, and what must hold of what they leave."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from workshop import Workshop

import forked
from files import digests, toml
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.errors import UpcycleError
from upcycle.evaluation import results
from upcycle.records.evaluation import EvaluationRecord
from upcycle.training import saving
from upcycle.training.metrics import read
from upcycle.training.parallel import Ranks


@dataclass
class Arena:
    """Where commands are killed. `started` and `killed` count; one that was done before is no kill."""

    shop: Workshop
    server: forked.Server
    folder: Path
    draw: random.Random
    started: int = 0
    killed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def whole(self, line: list[str], name: str = "") -> None:
        """Run a command to its end; under a name, note how long it takes."""
        said = self.folder / "said"
        process = self.server.start(line, said)  # which waits until the server is ready
        began = time.monotonic()
        code = self.server.wait(process)
        assert code == 0, f"{' '.join(line)} ended with {code}: {said.read_text()[-2000:]}"
        if name:
            self.seconds[name] = time.monotonic() - began

    def kill(self, line: list[str], name: str) -> bool:
        """Run a command and kill it at a random moment of the time it takes; whether that came in time."""
        process = self.server.start(line, self.folder / "said")
        time.sleep(self.draw.random() * self.seconds[name])
        os.kill(process, signal.SIGKILL)
        in_time = self.server.wait(process) == -signal.SIGKILL
        self.started += 1
        self.killed += in_time
        if not in_time:  # the machine has less to do than it had
            self.seconds[name] *= 0.7
        return in_time

    def path(self, name: str) -> Path:
        """A place where nothing is."""
        path = self.folder / name
        for left in [path, *self.folder.glob(f"{name}.*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        return path

    @property
    def leftovers(self) -> list[Path]:
        """Half-written files and locks."""
        found = [*self.folder.rglob("*.partial"), *self.folder.rglob("*.lock"), *self.folder.rglob("lock")]
        return sorted(found)


def weights(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights, and of the config."""
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def converts(arena: Arena, times: int) -> None:
    """Nothing opens before it is whole, and what goes on has the bytes of what was not killed."""

    def line(out: Path, *more: str) -> list[str]:
        shard = ["--shard-size", "20KB", "--init", "drop", "--experts", "4"]
        return ["convert", str(arena.shop.dense), str(out), *shard, *more]

    calm = arena.path("calm")
    arena.whole(line(calm), "convert")
    for _ in range(times):
        out = arena.path("out")
        partial = out.with_name("out.partial")
        if not arena.kill(line(out), "convert") or (out / "config.json").exists():
            _are_equal(out, calm)
            continue
        for left in filter(Path.exists, (out, partial)):
            with pytest.raises(UpcycleError):
                Checkpoint.open(left)
        arena.whole(line(out, "--resume"))
        _are_equal(out, calm)
        assert not arena.leftovers


def _are_equal(out: Path, calm: Path) -> None:
    """Fail with the names of the files that differ between two folders."""
    one, two = digests(out), digests(calm)
    assert one == two, sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def trains(arena: Arena, times: int) -> None:
    """A run that is killed again and again ends with the losses and the weights of one that was not."""
    from upcycle.training.export import export

    def line(out: Path) -> list[str]:
        table = {**arena.shop.table(out), "checkpoint": {"every": 1, "keep": 2}}
        table["train"] = {**table["train"], "steps": 12}
        (arena.folder / f"{out.name}.toml").write_text(toml(table))
        return ["train", str(arena.folder / f"{out.name}.toml"), "--resume"]

    calm = arena.path("calm-run")
    arena.whole(line(calm), "train")
    export(calm, arena.path("calm-export"))
    while times > 0:
        out = arena.path("run")
        for _ in range(min(times, 10)):
            times -= 1
            arena.kill(line(out), "train")
            newest = saving.latest(out)
            if newest is not None:
                saving.refuse_changed(newest, Ranks(device=_cpu()))
        arena.whole(line(out))
        assert [r.loss for r in read(out)] == [r.loss for r in read(calm)]
        assert [r.held_out_loss for r in read(out)] == [r.held_out_loss for r in read(calm)]
        export(out, arena.path("killed-export"))
        assert weights(arena.folder / "killed-export") == weights(arena.folder / "calm-export")
        assert not arena.leftovers


def exports(arena: Arena, times: int) -> None:
    """An export is there and whole, or it is not there; the next one does not mind what is left."""

    def line(out: Path) -> list[str]:
        return ["export", str(arena.shop.run), str(out)]

    calm = arena.path("calm-export")
    arena.whole(line(calm), "export")
    for _ in range(times):
        out = arena.path("export")
        if not arena.kill(line(out), "export") or out.exists():
            assert weights(out) == weights(calm)
            continue
        arena.whole(line(out))
        assert weights(out) == weights(calm)
        assert not arena.leftovers


def calibrates(arena: Arena, times: int) -> None:
    """Started again as it was, it goes on, and the file has the bytes of one that was not killed."""

    def line(out: Path) -> list[str]:
        rows = ["--length", "16", "--batch-size", "1", "--limit", "100"]
        return [
            "calibrate", str(arena.shop.dense), "--out", str(out), "--text", str(arena.shop.text), *rows,
            "--device", "cpu",
        ]  # fmt: skip

    calm = arena.path("calm.safetensors")
    arena.whole(line(calm), "calibrate")
    for _ in range(times):
        out = arena.path("out.safetensors")
        if arena.kill(line(out), "calibrate") and not out.exists():
            arena.whole(line(out))
        assert out.read_bytes() == calm.read_bytes()
        assert not arena.leftovers


def evals(arena: Arena, times: int) -> None:
    """What was scored before is still there, or the new result beside it."""
    model = arena.path("model")
    shutil.copytree(arena.shop.out, model)

    def line(name: str) -> list[str]:
        return ["eval", str(model), "--text", f"{name}={arena.shop.text}", "--length", "16", "--limit", "20"]

    arena.whole(line("first"), "eval")
    before = _scores(model)
    for _ in range(times):
        (model / EvaluationRecord.FILE).write_text(json.dumps({"format": 1, "results": before}))
        in_time = arena.kill(line("second"), "eval")
        now = _scores(model)
        assert now[:1] == before
        assert [entry["name"] for entry in now[1:]] in ([[], ["second"]] if in_time else [["second"]])
        arena.whole(line("second"))
        assert [entry["name"] for entry in _scores(model)] == ["first", "second"]
        assert [entry["metrics"] for entry in _scores(model)] == [before[0]["metrics"]] * 2
        assert not arena.leftovers


def _scores(model: Path) -> list[dict[str, Any]]:
    return [entry.as_table() for entry in results.read(model / EvaluationRecord.FILE).results]


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


KILLED: dict[str, Callable[[Arena, int], None]] = {
    "convert": converts, "train": trains, "export": exports, "calibrate": calibrates, "eval": evals,
}  # fmt: skip
