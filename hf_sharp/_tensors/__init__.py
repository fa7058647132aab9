"""Vectors over the parameters, whole or sharded, and sums over outputs; no model and no data."""
