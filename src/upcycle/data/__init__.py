"""Data: documents, tokens, images, and rows of them in order."""
