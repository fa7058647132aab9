"""Images as a Trainer takes them, without torchvision: decoded by Pillow when asked for, augmented batch by batch."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_sharp._extras import optional
from hf_sharp.recipes.tasks.augmentation import Augmentation
from hf_sharp.recipes.tasks.image_data import ImageSplit


def decode(source: Any, size: int, channels: int) -> Tensor:
    """Decode an image; its middle is cut to a square and brought to size.

    Args:
        source: a tensor, a path, the bytes of a file, or an image of Pillow.
        size: sides of the result in pixels.
        channels: 1 for grey, 3 for colour.

    Returns:
        Bytes of shape (channels, size, size).

    Raises:
        ValueError: if this is no image that Pillow can read.
    """
    pillow, operations, numpy = optional("PIL.Image"), optional("PIL.ImageOps"), optional("numpy")
    if isinstance(source, Tensor):
        if tuple(source.shape) == (channels, size, size):
            return source
        grey = source.shape[0] == 1
        source = pillow.fromarray((source[0] if grey else source.movedim(0, -1)).numpy())
    try:
        image = (
            pillow.open(io.BytesIO(source) if isinstance(source, bytes) else source) if _is_file(source) else source
        )
        image = image.convert("L" if channels == 1 else "RGB")
    except OSError as error:
        where = "an image of the archive" if isinstance(source, bytes) else source
        raise ValueError(f"Pillow cannot read {where}: {error}") from error
    if image.size != (size, size):
        image = operations.fit(image, (size, size), pillow.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(image)).reshape(size, size, channels).movedim(-1, 0)


def _is_file(source: Any) -> bool:
    return isinstance(source, (bytes, str, Path))


class Images(Dataset):
    """A split, decoded when asked.

    Args:
        split: the images.
        size: their sides in pixels.
        channels: 1 or 3.
        augment: whether `Batches` shall draw views of them.
        labels: other classes than the split's, noisy ones.
    """

    def __init__(
        self, split: ImageSplit, size: int, channels: int, augment: bool = False, labels: Sequence[int] | None = None
    ) -> None:
        self.split, self.size, self.channels, self.augment = split, size, channels, augment
        self.labels = split.labels if labels is None else labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = decode(self.split.source(index), self.size, self.channels)
        return {"pixel_values": pixels, "labels": self.labels[index], "augment": self.augment}

    def pixels(self) -> Tensor:
        """Decode all.

        Returns:
            Images from 0 to 1, of shape (images, channels, size, size).
        """
        return torch.stack([self[index]["pixel_values"] for index in range(len(self))]) / 255


@dataclass(frozen=True)
class Batches:
    """Makes batches of `Images`, as ``Trainer(data_collator=...)``: draws views and normalises.

    Args:
        augmentation: how views are drawn.
        mean: of each channel, which is subtracted.
        std: of each channel, which is divided by.
    """

    augmentation: Augmentation
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            rows: ``pixel_values`` of bytes, or of floats from 0 to 1; ``labels``; ``augment`` for views.

        Returns:
            ``pixel_values`` of shape (rows, channels, size, size) and ``labels``.
        """
        rows = list(rows)
        pixels = torch.stack([row["pixel_values"] for row in rows])
        pixels = pixels if pixels.is_floating_point() else pixels / 255
        if rows[0].get("augment"):
            pixels = self.augmentation(pixels)
        mean, std = (torch.tensor(list(each)).view(1, -1, 1, 1) for each in (self.mean, self.std))
        return {"pixel_values": (pixels - mean) / std, "labels": torch.tensor([row["labels"] for row in rows])}
