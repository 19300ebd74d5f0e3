"""Draws the forecast of `upcycle plan --world`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.cli.screen import grid, out
from upcycle.forecast.traffic import by_kind
from upcycle.system.wording import count, size

if TYPE_CHECKING:
    from upcycle.forecast.outlook import Outlook
    from upcycle.forecast.setting import Recompute


def show_outlook(outlook: Outlook) -> None:
    """Show what one step of training needs on the most loaded GPU."""
    setting, peak, held = outlook.setting, outlook.peak, outlook.held
    rows = (
        f"{setting.passes} x {setting.rows} rows of {' + '.join(map(str, setting.lengths.values()))} tokens"
    )
    again = _RECOMPUTED[setting.recompute]
    out.print(f"\non {setting.layout.world} {outlook.gpu.name}: {setting.layout}, {rows}, {again}")
    memory = grid("memory of the most loaded GPU", "", "held", "at the peak")
    for name, said in _PARTS.items():
        kept, most = getattr(held, name, 0), getattr(peak, name)
        if kept or most:
            memory.add_row(said, size(kept) if hasattr(held, name) else "", size(most))
    memory.add_row("total", size(held.total), size(peak.total))
    out.print(memory)
    fits = "it fits" if outlook.fits else "it does not fit"
    out.print(f"the peak is at {peak.moment}; {fits} into 90% of {size(outlook.gpu.memory)}")
    traffic = grid("traffic of a step", "", "GPUs", "calls", "bytes")
    for (kind, ranks), (calls, total) in by_kind(outlook.collectives).items():
        traffic.add_row(kind.replace("_", "-"), str(ranks), count(calls), size(total))
    out.print(traffic)
    time = outlook.time
    out.print(
        f"a step of {count(outlook.tokens)} tokens: {time.arithmetic:.2f} s of arithmetic, "
        f"{time.parameters:.2f} s of parameters and gradients, {time.activations:.2f} s of activations"
    )
    for said, seconds in (("overlapped", time.overlapped), ("one after another", time.in_turn)):
        out.print(f"{said}: {seconds:.2f} s, {outlook.mfu(seconds):.1%} of the peak FLOP/s")
    for note in outlook.notes:
        out.print(note)


_RECOMPUTED: dict[Recompute, str] = {
    True: "blocks recomputed",
    "selective": "blocks recomputed but for products and attention",
    False: "nothing recomputed",
}
_PARTS = {
    "weights": "weights",
    "moments": "moments",
    "gradients": "gradients",
    "teacher": "weights of the teacher",
    "gathered": "gathered parameters",
    "reduced": "gradients on their way",
    "activations": "activations",
    "logits": "logits and loss",
    "masks": "masks of attention",
    "update": "work of the optimizer",
}
