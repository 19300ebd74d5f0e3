"""Data: documents, tokens and images, and rows of them in a reproducible order."""
