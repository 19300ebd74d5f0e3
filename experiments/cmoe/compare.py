"""Perplexity without training: `cmoe` against `split` and `co_activation` at equal active neurons.

The dense network has 172 neurons. It is cut into 4 parts of 43, or 43 parts of 4. Statistics are of the first
stories, scores of the last. The script writes `results.json`, and adds what is not in it yet.

    python experiments/cmoe/compare.py --checkpoint stories260k --text tinystories.txt
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import upcycle

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from results_file import ResultsFile  # noqa: E402

SEEDS = (0, 1, 2)
LENGTH = 256
CALIBRATED, SCORED = 200_000, 60_000  # characters, from the beginning and from the end
ACTIVE = {4: (3, 2, 1), 43: (32, 22, 11)}  # active parts of each cut
SHARED = {4: 1, 43: 11}  # parts in the shared expert; half of the active ones where that is fewer

Job = tuple[str, int, dict[str, Any]]  # variant, active neurons, recipe


def jobs(statistics: Path) -> Iterator[Job]:
    """Yield every recipe that is compared."""
    for parts, chosen in ACTIVE.items():
        for active in chosen:
            yield from _of(parts, active, str(statistics))


def _of(parts: int, active: int, statistics: str) -> Iterator[Job]:
    neurons = active * 172 // parts
    where = {"target": "upcycled", "granularity": parts}
    shared = min(SHARED[parts], active // 2)
    cut = {
        "moe": {
            **where, "num_experts": parts - shared, "top_k": active - shared, "shared_experts": shared,
        },
        "init": {"name": "cmoe", "statistics": statistics},
    }  # fmt: skip
    yield f"cmoe, {parts} parts", neurons, {**cut, "router": {"name": "analytic"}}
    for seed in SEEDS if parts == 4 else SEEDS[:1]:
        whole = {"seed": seed, "moe": {**where, "num_experts": parts, "top_k": active}}
        yield f"cmoe, {parts} parts, random router", neurons, {**cut, "seed": seed}
        yield f"split random, {parts} parts", neurons, {**whole, "init": {"name": "split"}}
        yield f"split kmeans, {parts} parts", neurons, {**whole, "init": {"name": "split", "by": "kmeans"}}
        for output in ("raw", "expected") if parts == 4 else ():
            init = {
                "name": "co_activation",
                "statistics": statistics,
                "output": output,
                "partition": "spectral",
            }
            moe = {"target": "upcycled", "num_experts": parts, "top_k": active, "expert_width": 172 // parts}
            yield f"co_activation {output}, {parts} parts", neurons, {"seed": seed, "moe": moe, "init": init}


def main() -> None:
    """Score the dense model, and every variant that `results.json` does not have."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    given = parser.parse_args()
    results = ResultsFile(
        path=HERE / "results.json", named_by=("variant", "active", "seed"), order=lambda _: 0
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        text = given.text.read_text()
        (scratch / "first.txt").write_text(text[:CALIBRATED])
        (scratch / "last.txt").write_text(text[-SCORED:])
        statistics = scratch / "statistics.safetensors"
        upcycle.calibrate(
            given.checkpoint, statistics, text=scratch / "first.txt", length=LENGTH, limit=0, device="cpu",
            collect=("l2", "co_activation", "co_marker"), positions=("neurons", "channels"),
        )  # fmt: skip
        known = results.known()
        ordered = sorted(jobs(statistics), key=lambda job: job[2].get("seed", 0))
        wanted = [("dense", 172, None), *ordered]
        for variant, active, recipe in wanted:
            seed = 0 if recipe is None else recipe.get("seed", 0)
            if (variant, active, seed) in known:
                continue
            checkpoint = given.checkpoint
            if recipe is not None:
                checkpoint = scratch / f"{variant} {active} {seed}"
                upcycle.convert(given.checkpoint, checkpoint, recipe)
            loss = score(checkpoint, scratch / "last.txt")
            results.add({}, {"variant": variant, "active": active, "seed": seed, "loss": round(loss, 5)})
            print(variant, active, seed, round(loss, 4), flush=True)


def score(checkpoint: Path, text: Path) -> float:
    """Return the loss in nats per token on a text."""
    found = upcycle.evaluate([checkpoint], text={"last": text}, length=LENGTH).as_dict()
    return float(found["checkpoints"][0]["loss"])


if __name__ == "__main__":
    main()
