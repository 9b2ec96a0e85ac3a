"""One folder an op; importing one registers it."""
