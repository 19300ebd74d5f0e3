"""How many numbers of a rank an update works with at a time, which a forecast reads without torch."""

from __future__ import annotations

TOGETHER = 1 << 26  # numbers that Adafactor updates together, unless one parameter has more
CHUNK = 1 << 24  # numbers whose moments AdamW with 8 bits has as floats
