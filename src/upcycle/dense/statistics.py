"""The former place of `upcycle.records.statistics`, for code that imports from here."""

from upcycle.records.statistics import Statistics

__all__ = ["Statistics"]
