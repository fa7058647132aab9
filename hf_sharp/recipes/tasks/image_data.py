"""Where images with classes come from: scikit-learn's digits, a folder or archive of class folders, the Hub."""

import hashlib
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from hf_sharp._extras import optional

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
ARCHIVES = (".tar", ".tar.gz", ".tgz")
TRAIN, TESTS = ("train", "training"), ("test", "val", "validation", "valid", "dev")
Entries = list[tuple[Sequence[str], Any]]  # where an image lies, and its source
TEST_SHARE = 0.1  # of images that come without a test folder or split
DIGITS_TO_TRAIN = 1200


@dataclass(frozen=True)
class ImageSplit:
    """Images of one split, not yet decoded, and their classes.

    Args:
        sources: each is a tensor, a path, the bytes of a file, or an image of Pillow.
        labels: a class number for each image of the split.
        places: which of the sources are meant, in this order; None for all.
    """

    sources: Any
    labels: Sequence[int]
    places: Sequence[int] | None = None

    def source(self, index: int) -> Any:
        """Return the image at a place of the split, as it came."""
        return self.sources[index if self.places is None else self.places[index]]

    def take(self, most: int | None) -> "ImageSplit":
        """Draw some of the images, always the same.

        Args:
            most: how many; None for all.

        Returns:
            A split with at most so many images, in the order in which they came.
        """
        if most is None or most >= len(self.labels):
            return self
        drawn = sorted(random.Random("images").sample(range(len(self.labels)), most))
        places = drawn if self.places is None else [self.places[index] for index in drawn]
        return replace(self, labels=[self.labels[index] for index in drawn], places=places)


@dataclass(frozen=True)
class ImageTask:
    """Images to tell apart.

    Args:
        name: what the task is called in tables.
        classes: names of the classes, by number.
        train: what to train on.
        test: what to evaluate on.
    """

    name: str
    classes: Sequence[str]
    train: ImageSplit
    test: ImageSplit


def load_digits() -> ImageTask:
    """Read the handwritten digits that scikit-learn brings along: 1,797 grey images of 8 x 8 pixels.

    Returns:
        The first 1,200 in the order of the file to train on, the others to test on. The file goes from writer to
        writer, so this is harder than a split at random: mostly other hands are met in the test.
    """
    digits = optional("sklearn.datasets").load_digits()
    images = (torch.as_tensor(digits.images) * (255 / 16)).round().byte().unsqueeze(1)
    labels, many = digits.target.tolist(), DIGITS_TO_TRAIN
    train, test = ImageSplit(images[:many], labels[:many]), ImageSplit(images[many:], labels[many:])
    return ImageTask("digits", [str(digit) for digit in range(10)], train, test)


def load_image_folder(path: str | Path) -> ImageTask:
    """Find images whose folder is their class, in a folder or a tar archive (which is read into memory as it is).

    Args:
        path: a folder with ``train/<class>/*`` and ``test/<class>/*`` (or ``val``), or with ``<class>/*`` alone, of
            which a tenth is then held back; an archive with the same; or a folder that holds one such archive.

    Returns:
        The task; classes are numbered in the order of their names.

    Raises:
        ValueError: if there are no images there, fewer than two classes, or one that only the test knows.
    """
    path = Path(path)
    if path.is_dir():
        entries: Any = [(file.relative_to(path).parts, file) for file in sorted(path.rglob("*")) if file.is_file()]
        packed = [file for parts, file in entries if len(parts) == 1 and file.name.lower().endswith(ARCHIVES)]
        if len(packed) == 1 and not any(_is_image(parts) for parts, _ in entries):
            entries = _unpack(packed[0])
    elif path.is_file() and path.name.lower().endswith(ARCHIVES):
        entries = _unpack(path)
    else:
        raise ValueError(f"There is no folder of images and no archive ({', '.join(ARCHIVES)}) at {path}.")
    images: Entries = [(parts, source) for parts, source in entries if len(parts) > 1 and _is_image(parts)]
    while images and len({parts[0] for parts, _ in images}) == 1 and all(len(parts) > 2 for parts, _ in images):
        if images[0][0][0].lower() in (*TRAIN, *TESTS):
            break
        images = [(parts[1:], source) for parts, source in images]  # one folder around everything
    return _sort_out(images, path)


def _is_image(parts: Sequence[str]) -> bool:
    return parts[-1].lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in parts)


def _unpack(path: Path) -> list[tuple[tuple[str, ...], bytes]]:
    """Read the images of an archive, in the order of their names."""
    entries = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                file = archive.extractfile(member) if member.isfile() and _is_image(parts) else None
                if file is not None:
                    entries.append((parts, file.read()))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error
    return sorted(entries, key=lambda entry: entry[0])


def _sort_out(images: Entries, path: Path) -> ImageTask:
    """Divide images into splits and classes by the folders that they lie in."""
    splits: dict[str, list[tuple[str, Any]]] = {}
    for parts, source in images:
        known = len(parts) > 2 and parts[0].lower() in (*TRAIN, *TESTS)
        if known:
            split = parts[0].lower()
        else:
            draw = int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "big") / 2**64
            split = TESTS[0] if draw < TEST_SHARE else TRAIN[0]
        splits.setdefault(split, []).append((parts[1 if known else 0], source))
    train = next((splits[name] for name in TRAIN if name in splits), [])
    test = next((splits[name] for name in TESTS if name in splits), [])
    classes = sorted({name for name, _ in train})
    if len(classes) < 2 or not test:
        raise ValueError(
            f"{path} should hold train/<class>/* and test/<class>/*, or <class>/* alone, with at least two classes; "
            f"found {len(train)} images of {len(classes)} classes to train on and {len(test)} to test on."
        )
    unknown = sorted({name for name, _ in test} - set(classes))
    if unknown:
        raise ValueError(f"{path} has classes in the test that are not in training: {', '.join(unknown[:5])}.")
    numbers = {name: number for number, name in enumerate(classes)}
    first, second = (ImageSplit([s for _, s in rows], [numbers[name] for name, _ in rows]) for rows in (train, test))
    return ImageTask(path.name.partition(".")[0], classes, first, second)


def load_image_hub(
    name: str, config: str | None = None, image_column: str | None = None, label_column: str | None = None
) -> ImageTask:
    """Load a data set of images from the Hub.

    Args:
        name: of the data set, or a folder that `datasets` can load.
        config: which of its configurations.
        image_column: None for the first column of images.
        label_column: None for the first column of classes.

    Returns:
        The task, with the split ``test`` (or ``validation``) to test on, or with a tenth held back.

    Raises:
        ValueError: if there is no training split or no such column.
    """
    datasets = optional("datasets")
    splits = datasets.load_dataset(name, config)
    if "train" not in splits:
        raise ValueError(f"{name} has no split train; it has {', '.join(splits)}.")
    train, features = splits["train"], splits["train"].features
    image = image_column or next((c for c, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = label_column or next((c for c, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image not in features or label not in features:
        raise ValueError(
            f"{name} needs a column of images and one of classes (--image_column, --label_column); got {image} and "
            f"{label}, and it has {', '.join(features)}."
        )
    test = next((splits[split] for split in TESTS if split in splits), None)
    if test is None:
        divided = train.train_test_split(test_size=TEST_SHARE, seed=0)
        train, test = divided["train"], divided["test"]
    kind = features[label]
    classes = kind.names if isinstance(kind, datasets.ClassLabel) else [str(each) for each in train.unique(label)]
    numbers = {each: number for number, each in enumerate(classes)}
    first, second = (
        ImageSplit(
            part[image],
            [each if isinstance(kind, datasets.ClassLabel) else numbers[str(each)] for each in part[label]],
        )
        for part in (train, test)
    )
    return ImageTask(name.rstrip("/").rpartition("/")[2], classes, first, second)
