"""The dense model: admitted from a checkpoint, made smaller, measured."""
