"""What the scripts in `recipes/` and `benchmarks/` share: data to train on (`tasks`) and what they report (`report`).

It stands above the library, which imports nothing of it, and is left out of the wheel: the scripts run in a clone. Its
names may change in any release.
"""
