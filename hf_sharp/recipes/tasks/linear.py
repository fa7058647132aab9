"""What a linear model makes of the pixels: the least that a network for images should beat."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_sharp._extras import optional
from hf_sharp.recipes.tasks.corruptions import corrupted_accuracy
from hf_sharp.recipes.tasks.images import Images

LARGEST_SIDE = 32
STEPS = 300  # of the solver; as a yardstick it need not converge on large images


def linear_scores(
    train: Images, test: Images, corrupted: Sequence[Mapping[str, Any]], most: int
) -> tuple[float, dict[str, list[float]]]:
    """Fit a logistic regression to pixels, with scikit-learn's own penalty, and test it.

    Args:
        train: what it is fitted to; larger images are averaged down to 32 pixels.
        test: clean images.
        corrupted: `corrupted_rows`.
        most: fit to at most so many, evenly spread.

    Returns:
        The share of right guesses on the test, and on the corrupted images by kind and severity.
    """
    rows = [train[index] for index in range(0, len(train), -(-len(train) // most))]
    model = optional("sklearn.linear_model").LogisticRegression(max_iter=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optional("sklearn.exceptions").ConvergenceWarning)
        model.fit(_pixels(rows), [row["labels"] for row in rows])
    clean = model.score(_pixels([test[index] for index in range(len(test))]), list(test.labels))
    return float(clean), corrupted_accuracy(model.predict(_pixels(corrupted)).tolist(), corrupted)


def _pixels(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the pixels of images, one row an image, from 0 to 1."""

    def small(pixels: Tensor) -> Tensor:
        sides = [min(side, LARGEST_SIDE) for side in pixels.shape[-2:]]
        return functional.interpolate((pixels / 255).unsqueeze(0), sides, mode="area").flatten()

    return torch.stack([small(row["pixel_values"]) for row in rows]).numpy()
