"""Drawings of results on standard output, one file for each command that has something to show."""
