"""What two ops share: argument checks, activations, convolution geometry. Never imports an op."""
