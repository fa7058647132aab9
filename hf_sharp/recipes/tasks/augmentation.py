"""Light augmentation of a batch of images in the style of Inception: random crops, flips and changes of colour.

The crop of Szegedy et al. (CVPR 2015): a part of the image of random area and aspect, enlarged to the whole. All
images of a batch are sampled at once, on tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601
LARGEST_ASPECT = 4 / 3


@dataclass(frozen=True)
class Augmentation:
    """Another view of each image of a batch, drawn from torch's stream of random numbers.

    A run under one seed, and one that goes on from a checkpoint of the Trainer, therefore sees the same views again.

    Args:
        area: smallest share of an image's area that is cut out; 1 cuts nothing. Inception's is 0.08.
        flip: whether every second image, on average, is mirrored left to right; wrong for digits and letters.
        jitter: brightness, contrast and saturation are each multiplied by up to 1 +- this; 0 leaves colours alone.

    Raises:
        ValueError: if a number lies outside its range.

    Example:
        >>> Augmentation(area=1.0, flip=False, jitter=0.0)(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    area: float = 0.25
    flip: bool = True
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.area <= 1:
            raise ValueError(f"area is the smallest share of an image that is cut out, in (0, 1]; got {self.area}.")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter is the largest change of a colour's strength, in [0, 1); got {self.jitter}.")

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw a view of each image.

        Args:
            images: from 0 to 1, of shape (images, channels, height, width).
            generator: where random numbers come from; None for torch's own stream.

        Returns:
            Views of the same shape and range.
        """
        draws = torch.rand(8, len(images), generator=generator).to(images)
        return self._colour(self._crop(images, draws[:5]), draws[5:]).clamp(0, 1)

    def _crop(self, images: Tensor, draws: Tensor) -> Tensor:
        """Cut out and mirror, in one bilinear sampling; what is cut out is never outside the image."""
        if self.area == 1 and not self.flip:
            return images
        area = self.area + (1 - self.area) * draws[0]
        stretch = LARGEST_ASPECT ** (draws[1] - 0.5)  # the root of the aspect, whose logarithm is uniform
        if self.area == 1:
            stretch = torch.ones_like(stretch)
        width, height = (area.sqrt() * stretch).clamp(max=1), (area.sqrt() / stretch).clamp(max=1)
        mirror = torch.where(draws[4] < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(width)
        maps = torch.zeros(len(images), 2, 3, dtype=images.dtype, device=images.device)  # from views to images
        maps[:, 0, 0], maps[:, 1, 1] = width * mirror, height
        maps[:, 0, 2], maps[:, 1, 2] = (2 * draws[2] - 1) * (1 - width), (2 * draws[3] - 1) * (1 - height)
        grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)

    def _colour(self, images: Tensor, draws: Tensor) -> Tensor:
        """Move each image towards or away from black, its mean grey and its own grey picture, as PIL does."""
        brightness, contrast, saturation = (1 + self.jitter * (2 * draws - 1)).view(3, -1, 1, 1, 1)
        images = images * brightness
        mean = _grey(images).mean((-2, -1), keepdim=True)
        images = mean + contrast * (images - mean)
        grey = _grey(images)
        return grey + saturation * (images - grey) if images.shape[1] == 3 else images


def _grey(images: Tensor) -> Tensor:
    """Return the images' brightness, of shape (images, 1, height, width)."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
