"""The former place of `upcycle.records.statistics`, for code that imports from here."""

from upcycle.records.statistics import NAMES, Statistics

__all__ = ["NAMES", "Statistics"]
