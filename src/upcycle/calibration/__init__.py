"""Collects activation statistics of a dense model: `upcycle calibrate`."""
