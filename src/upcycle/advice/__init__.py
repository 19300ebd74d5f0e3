"""Advice before spending: dense continuation, upcycling or training from scratch. See `gather.py`."""
