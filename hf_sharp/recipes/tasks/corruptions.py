"""Common corruptions of images at five severities: what a classifier meets that has only seen clean pictures.

After Hendrycks and Dietterich (ICLR 2019), with strengths of our own that suit images of 8 to 224 pixels, so the
numbers are not those of CIFAR-10-C or ImageNet-C. All of it is made from the test images; nothing is downloaded.
"""

import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hf_sharp._extras import optional

SEVERITIES = (1, 2, 3, 4, 5)
NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)  # standard deviation; black is 0 and white 1
BLUR = (0.10, 0.15, 0.20, 0.27, 0.35)  # deviation in pixels over the root of the side: 0.6 to 2.0 at 32 pixels
CONTRAST = (0.60, 0.45, 0.30, 0.20, 0.10)  # what is left of the distance to the channel's mean
BRIGHTNESS = (0.10, 0.20, 0.30, 0.40, 0.50)  # added to every channel
QUALITY = (60, 40, 25, 15, 8)  # of JPEG
SIDE = (0.80, 0.65, 0.50, 0.40, 0.30)  # of the pixelated image, over that of the image


def corrupt(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt images.

    Args:
        images: from 0 (black) to 1 (white), of shape (images, channels, height, width) with 1 or 3 channels.
        kind: one of `CORRUPTIONS`.
        severity: from 1 to 5.
        seed: of the noise, which depends on nothing else but the severity and the shape.

    Returns:
        Corrupted images of the same shape and range; those given are left as they are.

    Raises:
        ValueError: if there is no such corruption or severity, or the images are none.

    Example:
        >>> corrupt(torch.full((1, 1, 2, 2), 0.25), "brightness", severity=2)[0, 0, 0, 0].item()
        0.44999998807907104
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"There is no corruption '{kind}'. Known: {', '.join(CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is one of 1, 2, 3, 4, 5; got {severity!r}.")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(
            "Images are floats of shape (images, 1 or 3 channels, height, width); "
            f"got {images.dtype} of shape {tuple(images.shape)}."
        )
    return CORRUPTIONS[kind](images, severity - 1, seed).clamp(0, 1)


def _noise(images: Tensor, level: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(random.Random(f"noise {level} {seed}").getrandbits(63))
    return images + NOISE[level] * torch.randn(images.shape, generator=generator).to(images)


def _blur(images: Tensor, level: int, seed: int) -> Tensor:
    del seed
    side = min(images.shape[-2:])
    sigma = BLUR[level] * math.sqrt(side)
    reach = min(max(1, math.ceil(3 * sigma)), side - 1)  # reflection needs a side longer than the reach
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2).to(images)
    kernel, channels = kernel / kernel.sum(), images.shape[1]
    padded = functional.pad(images, (reach,) * 4, mode="reflect")
    rows = functional.conv2d(padded, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return functional.conv2d(rows, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)


def _contrast(images: Tensor, level: int, seed: int) -> Tensor:
    del seed
    mean = images.mean((-2, -1), keepdim=True)
    return mean + CONTRAST[level] * (images - mean)


def _brightness(images: Tensor, level: int, seed: int) -> Tensor:
    del seed
    return images + BRIGHTNESS[level]


def _jpeg(images: Tensor, level: int, seed: int) -> Tensor:
    del seed
    image, numpy = optional("PIL.Image"), optional("numpy")
    decoded = []
    for pixels in (images.clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy():
        file = io.BytesIO()
        image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
            file, format="JPEG", quality=QUALITY[level]
        )
        decoded.append(torch.from_numpy(numpy.array(image.open(file))).reshape(pixels.shape))
    return torch.stack(decoded).movedim(-1, 1).to(images) / 255


def _pixelate(images: Tensor, level: int, seed: int) -> Tensor:
    del seed
    rows, columns = (_blocks(side, max(1, round(SIDE[level] * side))).to(images) for side in images.shape[-2:])
    return rows @ images @ columns


def _blocks(side: int, count: int) -> Tensor:
    """Return the matrix that gives each pixel of a line the mean of its block, one of `count`."""
    place = torch.arange(side) * count // side
    same = (place == place.unsqueeze(1)).float()
    return same / same.sum(1, keepdim=True)


CORRUPTIONS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "jpeg": _jpeg,
    "pixelate": _pixelate,
}


def corrupted_rows(images: Tensor, labels: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Make every corruption of images at every severity.

    Args:
        images: from 0 to 1, of shape (images, channels, height, width).
        labels: their class numbers.
        seed: of the noise.

    Returns:
        Rows of ``pixel_values``, in bytes as an image is kept, and ``labels``: all images of the first kind at the
        first severity, at the second, and so on, then of the next kind. They take 30 times the memory of the images.
    """
    return [
        {"pixel_values": pixels, "labels": label}
        for kind in CORRUPTIONS
        for severity in SEVERITIES
        for pixels, label in zip((corrupt(images, kind, severity, seed) * 255).round().byte(), labels, strict=True)
    ]


def corrupted_accuracy(guesses: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Score guesses about `corrupted_rows`.

    Args:
        guesses: class numbers.
        rows: what they are about, in the same order.

    Returns:
        For each kind the share of right guesses at the five severities.
    """
    right = torch.tensor([guess == row["labels"] for guess, row in zip(guesses, rows, strict=True)])
    shares = right.view(len(CORRUPTIONS), len(SEVERITIES), -1).double().mean(-1)
    return dict(zip(CORRUPTIONS, shares.tolist(), strict=True))
