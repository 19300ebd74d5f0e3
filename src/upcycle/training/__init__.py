"""Continued training: a run file in, metrics and checkpoints out, on one process or many."""
