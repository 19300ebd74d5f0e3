"""What activations of the dense model tell: `upcycle calibrate`."""
