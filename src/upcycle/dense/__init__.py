"""The dense model: read from a checkpoint and checked, made smaller, measured."""
