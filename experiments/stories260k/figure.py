"""The figure of this experiment, from `results.json`: held-out loss over tokens and training FLOPs."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent


def main() -> None:
    """Write `figure.svg`: means over seeds with bands of one standard error."""
    runs = json.loads((HERE / "results.json").read_text())["runs"]
    variants = list(dict.fromkeys(r["variant"] for r in runs))
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "upcycle", "font.size": 8})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, column, label in ((axes[0], 0, "tokens"), (axes[1], 1, "training FLOPs (active)")):
        for number, variant in enumerate(variants):
            curves = np.array([r["curve"] for r in runs if r["variant"] == variant])
            x, losses = curves[0, :, column], curves[:, :, 2]
            mean, error = losses.mean(0), losses.std(0, ddof=1) / np.sqrt(len(losses))
            axis.plot(x, mean, label=variant.replace("_", " "), color=f"C{number}", linewidth=1)
            axis.fill_between(x, mean - error, mean + error, color=f"C{number}", alpha=0.3, linewidth=0)
        axis.set(xlabel=label, yscale="log")
        axis.set_yticks([1.5, 2, 3, 4, 6, 8], labels=["1.5", "2", "3", "4", "6", "8"])
        axis.minorticks_off()
    axes[0].set_ylabel("held-out loss, nats per token")
    axes[1].legend(frameon=False, fontsize=6)
    figure.tight_layout()
    figure.savefig(HERE / "figure.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
