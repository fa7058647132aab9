"""Recipes are scripts to launch and to copy from, not modules: nothing may import them."""

raise ImportError("Recipes are not importable. Launch one, `accelerate launch recipes/glue_fsam.py`, or copy it.")
