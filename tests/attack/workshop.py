"""Whole inputs of every kind, made once: what attacks start from."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import left_behind
import tiny
from heard import Counted
from upcycle.calibration.calibration import ToCalibrate, calibrate
from upcycle.conversion import write
from upcycle.conversion.write import convert
from upcycle.training.export import export
from upcycle.training.loop import train
from upcycle.training.run import Run

MOE: dict[str, Any] = {"moe": {"num_experts": 4, "top_k": 2}, "init": {"name": "drop"}}
SHARD = 20_000  # bytes of a shard of a conversion
WORDS = "One day a small cat saw a big red ball and ran to it. "
GLUE: dict[str, dict[str, Any]] = {
    "boolq": {"passage": "Tea is hot.", "question": "is tea hot", "idx": 0, "label": 1},
    "multirc": {
        "paragraph": "<b>Sent 1: </b>It rains.<br>", "question": "What?", "answer": "Rain",
        "idx": {"paragraph": 0, "question": 0, "answer": 0}, "label": 1,
    },
    "record": {
        "passage": "A man.\n@highlight\nBob came", "query": "@placeholder came", "entities": ["Bob"],
        "answers": ["Bob"], "idx": {"passage": 0, "query": 0},
    },
    "wsc": {
        "text": "Bob saw that he was late", "span1_text": "Bob", "span2_text": "he", "span1_index": 0,
        "span2_index": 3, "idx": 0, "label": 1,
    },
    "wic": {"sentence1": "A bank.", "sentence2": "The bank.", "word": "bank", "idx": 0, "label": 0},
}  # fmt: skip
HUB: dict[str, dict[str, Any]] = {
    "arc_easy": {
        "question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B",
    },
    "piqa": {"goal": "To open a door ", "sol1": "Push.", "sol2": "Pull.", "label": 0},
    "copa": {"premise": "He fell.", "question": "cause", "choice1": "A.", "choice2": "B.", "label": 1},
    "boolq": {"query": "Passage: Tea.\nQuestion: hot?", "choices": ["no", "yes"], "gold": 1},
    "lambada_openai": {"context": "He had two of", "continuation": "them"},
}  # fmt: skip


def in_memory() -> Path | None:
    """A folder in memory for damaged files, or None: TMPDIR says where, or there is no such place."""
    found = Path("/dev/shm")  # writing a file there takes a quarter of the time
    return found if "TMPDIR" not in os.environ and os.access(found, os.W_OK) else None


class Workshop:
    """A folder in which everything is made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, name: str) -> Path:
        """A folder of this name, made anew."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def copied(self, source: Path, name: str) -> Path:
        """A copy of a folder, of another name."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return Path(shutil.copytree(source, path))

    @cached_property
    def text(self) -> Path:
        path = self.folder / "text.txt"
        path.write_text(WORDS * 40)
        return path

    @cached_property
    def dense(self) -> Path:
        made = tiny.make_dense(
            self.folder / "dense", "llama", vocab_size=300, hidden_size=16, intermediate_size=24,
            num_hidden_layers=2, max_position_embeddings=64,
        )  # fmt: skip
        tiny.make_bytes_tokenizer(made)
        return made

    @cached_property
    def sharded(self) -> Path:
        made = tiny.make_dense(
            self.folder / "sharded", "llama", shard="8KB", hidden_size=16, intermediate_size=24,
            num_hidden_layers=2,
        )  # fmt: skip
        assert (made / "model.safetensors.index.json").exists()
        return made

    @cached_property
    def out(self) -> Path:
        """A conversion."""
        convert(self.dense, self.folder / "out", MOE, shard_size=SHARD)
        return self.folder / "out"

    @cached_property
    def upcycled(self) -> Path:
        """A conversion to a model of our own class."""
        convert(self.dense, self.folder / "upcycled", {"moe": {**MOE["moe"], "target": "upcycled"}})
        return self.folder / "upcycled"

    @cached_property
    def partial(self) -> Path:
        """A conversion that was interrupted."""
        real, every, left = write.ShardFiles.write, write.SYNC_EVERY, [60_000]

        def interrupted(files: Any, place: Any, start: int, data: Any) -> None:
            left[0] -= data.size
            if left[0] < 0:
                raise KeyboardInterrupt
            real(files, place, start, data)

        write.ShardFiles.write, write.SYNC_EVERY = interrupted, 10_000  # type: ignore[method-assign]
        try:
            convert(self.dense, self.folder / "broken", MOE, shard_size=SHARD)
        except KeyboardInterrupt:
            pass
        finally:
            write.ShardFiles.write, write.SYNC_EVERY = real, every  # type: ignore[method-assign]
        return self.folder / "broken.partial"

    def table(self, out: Path) -> dict[str, Any]:
        """A run file of two small steps, as a table."""
        return {
            **MOE,
            "source": str(self.dense),
            "out": str(out),
            "data": {"sources": [{"path": str(self.text)}], "held_out": 0.1},
            "train": {"steps": 2, "batch_tokens": 64, "sequence_length": 16, "eval_every": 1},
            "schedule": {"name": "constant", "peak": 1e-3},
            "checkpoint": {"every": 1, "keep": 9},
        }

    @cached_property
    def run(self) -> Path:
        """A run that is done."""
        train(Run.of(self.table(self.folder / "run")))
        return self.folder / "run"

    @cached_property
    def unsigned(self) -> Path:
        """A run as a version left it that wrote no hashes."""
        copy = self.copied(self.run, "unsigned")
        for state in copy.glob("checkpoints/*/state.json"):
            told = json.loads(state.read_text())
            state.write_text(json.dumps({k: v for k, v in told.items() if not k.endswith("sha256")}))
        return copy

    @cached_property
    def exported(self) -> Path:
        export(self.run, self.folder / "exported")
        return self.folder / "exported"

    @cached_property
    def statistics(self) -> Path:
        return tiny.make_statistics(self.folder / "stats.safetensors", self.dense)

    def calibrating(self, **changes: Any) -> ToCalibrate:
        """What is asked of a calibration of four rows."""
        given = {"text": self.text, "length": 16, "limit": 4, "batch_size": 1, "device": "cpu"}
        return ToCalibrate(**{**given, **changes})

    @cached_property
    def half_calibrated(self) -> Path:
        """The sums of a calibration that was interrupted."""
        out, came = self.folder / "half.safetensors", []

        def interrupt(n: int) -> None:
            came.append(n)
            if len(came) == 3:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            calibrate(
                self.dense, out, self.calibrating(), progress=Counted("calibrating", interrupt), save_every=1
            )
        return out.with_name(out.name + ".partial")

    @cached_property
    def reported(self) -> tuple[Path, Path]:
        """A run and a checkpoint of it, as a report reads them."""
        run = left_behind.write_run(
            self.folder / "told", lambda tokens: 5 - tokens / 1e4, moe={"num_experts": 4}
        )
        checkpoint = left_behind.write_checkpoint(
            self.folder / "told-out", run, routing=left_behind.ROUTING,
            eval=left_behind.scores(arc_easy=(0.4, 0.01), boolq=(0.5, None)),
        )  # fmt: skip
        return run, checkpoint

    @cached_property
    def parquet(self) -> bytes:
        import pyarrow
        import pyarrow.parquet

        path = self.folder / "made.parquet"
        rows = [{"text": WORDS * (1 + i % 3), "label": i % 2} for i in range(20)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path.read_bytes()

    @cached_property
    def images(self) -> bytes:
        """Images in parquet."""
        import io

        import numpy as np
        import pyarrow
        import pyarrow.parquet
        from PIL import Image

        path, draw, rows = self.folder / "images.parquet", np.random.default_rng(0), []
        for i in range(6):
            encoded = io.BytesIO()
            Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).save(encoded, "png")
            rows.append({"image": {"bytes": encoded.getvalue(), "path": None}, "label": i % 3})
        feature = {"label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
        told = {"huggingface": json.dumps({"info": {"features": feature}})}
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(told)
        pyarrow.parquet.write_table(table, path)
        return path.read_bytes()

    @cached_property
    def lines(self) -> bytes:
        """Texts with labels, as JSON lines."""
        rows = [{"text": WORDS * (1 + i % 3), "label": i % 2} for i in range(8)]
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    @cached_property
    def zipped(self) -> bytes:
        return gzip.compress(self.lines)
