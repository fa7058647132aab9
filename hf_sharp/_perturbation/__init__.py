"""Where and how far weights are perturbed: radius, ball, mask and reference, and what all parts of methods share."""
