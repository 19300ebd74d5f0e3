"""Tools for files, locks, signals, GPUs and memory."""
