"""What a model is worth: measures beside the loss it was trained on."""
