"""The functions that benchmarks share: the device, its name, and the time of a call."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name() -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name() if device().type == "cuda" else _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        found = platform.processor()
    return f"{found}, {os.cpu_count()} cores"


def timed(contender: Callable[[], Any]) -> float:
    """Return the seconds of one call, including the work on the device."""
    if device().type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    contender()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contender in each round, in rotating order, after one warm-up call each."""
    for contender in contenders.values():
        timed(contender)
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(timed(contenders[name]))
    return seconds


def ratio(of: list[float], to: list[float]) -> dict[str, float]:
    """Return the ratio of the times `of` and `to`, round by round."""
    each = sorted(x / y for x, y in zip(of, to, strict=True))
    found = {"median": statistics.median(each), "min": each[0], "max": each[-1]}
    return {key: round(value, 3) for key, value in found.items()}
