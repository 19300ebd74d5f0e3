"""Writing a blueprint to a folder."""
