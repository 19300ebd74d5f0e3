"""Tensors that are not there yet: what moves, what is computed, and the streams of random numbers."""
