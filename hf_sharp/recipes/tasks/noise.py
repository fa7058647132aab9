"""Label noise: the setting in which sharpness-aware training differs most clearly from plain training."""

import random
from collections.abc import Sequence


def redraw_labels(labels: Sequence[int], share: float, classes: int, seed: int) -> list[int]:
    """Draw a share of the labels again, uniformly from all classes, so that some of them stay right by chance.

    Exactly ``int(share * len(labels))`` labels are drawn, at places and with values that depend on the seed alone:
    methods compared under one seed see the same wrong labels.

    Args:
        labels: the true labels, numbers from 0 to ``classes - 1``; left as they are.
        share: which part of them is drawn again, from 0 (none) to 1 (all).
        classes: how many classes there are.
        seed: of the draw.

    Returns:
        The labels to train on.

    Raises:
        ValueError: if ``share`` lies outside [0, 1] or there are fewer than two classes.

    Example:
        >>> redraw_labels([0, 0, 0, 0], share=0.5, classes=3, seed=1)
        [2, 0, 1, 0]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"label_noise is a share of the training labels, so between 0 and 1; got {share}.")
    if classes < 2:
        raise ValueError("label_noise needs a task with classes; this one predicts a number.")
    draw = random.Random(f"label noise {seed}")
    noisy = list(labels)
    for place in draw.sample(range(len(noisy)), int(share * len(noisy))):
        noisy[place] = draw.randrange(classes)
    return noisy
