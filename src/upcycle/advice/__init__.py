"""What to know before spending: dense continuation, upcycling or from scratch. See `gather.py`."""
