"""A blueprint written to a folder."""
