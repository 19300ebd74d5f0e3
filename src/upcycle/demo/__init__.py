"""`upcycle demo`: upcycling from start to end on one machine, with no data but Python's own files."""
