"""The copy run of seed 0, once uninterrupted and once killed with SIGKILL three times and resumed.

The moments of the kills are random. Both runs must end at the same held-out loss, to the last bit. The script
writes `killed.json`.

    python experiments/stories260k/kill.py --checkpoint stories260k --text tinystories.txt
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import run as experiment

CODE = (
    "import json, sys; from upcycle.training.loop import train; from upcycle.training.run import Run; "
    "train(Run.of(json.load(sys.stdin)), resume=True)"
)


def start(table: dict[str, Any]) -> subprocess.Popen[str]:
    """Start the run in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdin=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(table))
    process.stdin.close()
    return process


def records(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the metrics of the run so far."""
    path = Path(table["out"]) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Run both and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=experiment.HERE / "runs" / "killed")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seed", type=int, default=7, help="of the three moments")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    found = []
    for name, waits in (("whole", []), ("killed", [rng.uniform(15, 60) for _ in range(3)])):
        table = experiment.table("copy", 0, options.steps, options)
        table["out"] = str(options.runs / name)
        table["checkpoint"]["every"] = 10
        began, kills = time.time(), []
        for seconds in waits:
            process = start(table)
            time.sleep(seconds)
            assert process.poll() is None, "the run ended before it could be killed"
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills.append({"after_seconds": round(seconds, 1), "steps_logged": len(records(table))})
        assert start(table).wait() == 0
        last = records(table)[-1]
        found.append({"name": name, "kills": kills, "seconds": round(time.time() - began)})
        found[-1] |= {"steps": last["step"], "held_out_loss": last["held_out_loss"]}
    same = found[0]["held_out_loss"] == found[1]["held_out_loss"]
    report = {"same_to_the_last_bit": same, "runs": found}
    (experiment.HERE / "killed.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
