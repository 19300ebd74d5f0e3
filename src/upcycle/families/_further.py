"""Blocks after the last one that predict further tokens, which some checkpoints have beside the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Further:
    """How such blocks are named on disk, and which keys of config.json are about them."""

    prefix: str = "mtp."
    counted: str = "mtp_num_hidden_layers"  # how many there are
    keys: str = "mtp_"  # what all their keys begin with

    def owns(self, name: str) -> bool:
        """Return whether a stored tensor is of these blocks."""
        return name.startswith(self.prefix)
