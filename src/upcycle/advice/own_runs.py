"""What our own runs measured (experiments/code): upcycling beside dense continuation, at equal FLOPs.

A Llama of 312 thousand parameters was trained on Python code at a constant rate, and continued for 30 % of
what it had cost. A test compares these lines with the results that the experiment recorded.
"""

from __future__ import annotations

from upcycle.advice.comparison import Comparison

COMPARISONS: tuple[Comparison, ...] = ()
