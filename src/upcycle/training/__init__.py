"""Continued training from a run file, on one process or many; writes metrics and checkpoints."""
