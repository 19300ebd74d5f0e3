"""Output of results on standard output, with one file for each command that shows something."""
