"""The forecast of a step: what a rank holds, its peak of memory, its traffic and its time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from upcycle.forecast import memory, time, traffic
from upcycle.forecast.memory import Held, Memory
from upcycle.forecast.setting import Setting
from upcycle.forecast.time import Time
from upcycle.forecast.traffic import Collective
from upcycle.system.gpus import Gpu

USABLE = 0.9  # share of a GPU's memory; the CUDA context, buffers of collectives and fragments take the rest


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The forecast of one step on the most loaded rank of a layout."""

    setting: Setting
    gpu: Gpu
    held: Held
    peak: Memory
    collectives: tuple[Collective, ...]
    time: Time
    notes: tuple[str, ...] = ()  # what else a user must know, one sentence each

    @property
    def fits(self) -> bool:
        """True if the peak fits into a GPU."""
        return self.peak.total <= USABLE * self.gpu.memory

    @property
    def tokens(self) -> int:
        """The tokens of a step on all ranks."""
        setting = self.setting
        return setting.rows * setting.passes * setting.layout.dp * sum(setting.lengths.values())

    def mfu(self, seconds: float) -> float:
        """Return the share of the peak FLOP/s that a step of so many seconds reaches.

        It counts the FLOPs of three forward passes with all attention scores, as papers do; fewer if a part
        is not trained, and those of a teacher.
        """
        flops = time.flops(self.setting, recomputed=False)
        return flops / (seconds * self.gpu.peak_flops)

    def as_dict(self) -> dict[str, Any]:
        """Return the forecast as JSON has it. Bytes and seconds are those of one rank and one step."""
        setting, found = self.setting, self.time
        return {
            "gpu": self.gpu.name,
            "layout": asdict(setting.layout),
            "world": setting.layout.world,
            "rows": setting.rows,
            "passes": setting.passes,
            "lengths": dict(setting.lengths),
            "precision": setting.precision,
            "recompute": setting.recompute,
            "held": {**asdict(self.held), "total": self.held.total},
            "peak": {**asdict(self.peak), "total": self.peak.total},
            "fits": self.fits,
            "collectives": [asdict(each) for each in self.collectives],
            "seconds": {
                **asdict(found),
                "overlapped": found.overlapped,
                "in_turn": found.in_turn,
            },
            "mfu": {"overlapped": self.mfu(found.overlapped), "in_turn": self.mfu(found.in_turn)},
            "tokens": self.tokens,
            "notes": [*self.notes],
            "assumed": {"arithmetic": time.ARITHMETIC, "link": time.LINK},
        }


def of(setting: Setting, gpu: Gpu) -> Outlook:
    """Return the forecast of a step on a kind of GPU."""
    return Outlook(
        setting=setting,
        gpu=gpu,
        held=memory.held(setting),
        peak=memory.peak(setting),
        collectives=traffic.collectives(setting),
        time=time.of(setting, gpu),
    )
