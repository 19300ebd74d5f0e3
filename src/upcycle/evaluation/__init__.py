"""Evaluation: measures of a model other than the loss it was trained on."""
