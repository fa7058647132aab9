"""One optimizer step's window: the loss and its gradient, here or at shifted weights. It knows no method."""
