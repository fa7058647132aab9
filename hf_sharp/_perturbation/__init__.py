"""Where to look: radius, ball, mask and reference of a perturbation, and the parts that methods are made of."""
