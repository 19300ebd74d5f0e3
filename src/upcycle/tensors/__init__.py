"""Lazy tensors, which are moved or computed when they are read, and the streams of random numbers."""
