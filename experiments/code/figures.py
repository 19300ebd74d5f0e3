"""Draw the figures of this experiment from `results.json`, and print its tables.

python experiments/code/figures.py
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import run  # noqa: E402

from outcome import HEAD, Outcome  # noqa: E402


def read() -> Outcome:
    """Return what is in `results.json`."""
    return Outcome.of(run.CODE)


gap, crossing = Outcome.gap, Outcome.crossing


def main() -> None:
    """Draw every figure and print the table of final losses."""
    found = read()
    print(*HEAD, sep="\n")
    for start in found.starts:
        title, y = f"From {start} tokens per parameter", "held-out loss (nats per token)"
        found.draw(HERE / f"start-{start}.png", start, title, y, highest=3.5)
        print(*found.rows(start), sep="\n")
    found.draw_gaps(
        HERE / "gaps.png",
        "The longer the dense model was trained",
        "tokens per parameter of the start",
        "nats against dense, continued",
    )


if __name__ == "__main__":
    main()
