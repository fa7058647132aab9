"""Losses and divergences: they know no optimizer and no method."""
