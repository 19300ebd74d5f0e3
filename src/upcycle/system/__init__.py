"""Files, locks, signals and memory of the machine."""
