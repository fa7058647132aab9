"""Which network reads the images: a small ViT, any architecture from scratch, or a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig
from transformers.image_processing_base import ImageProcessingMixin

HALF = (0.5,)  # mean and deviation of pixels from 0 to 1, where the model says nothing else


@dataclass(frozen=True)
class ImageModel:
    """A model that can be made again and again, and the images that it takes.

    Args:
        make: makes it, by torch's random numbers where weights are new.
        size: sides of its images in pixels.
        channels: 1 for grey, 3 for colour.
        mean: of each channel (or of all), which is subtracted from pixels between 0 and 1.
        std: which they are divided by.
    """

    make: Callable[[], Any]
    size: int
    channels: int
    mean: Sequence[float] = HALF
    std: Sequence[float] = HALF


def pick_model(name: str, classes: Sequence[str], size: int | None = None, from_scratch: bool = False) -> ImageModel:
    """Find a model for images of some classes.

    Args:
        name: of the model on the Hub, or its folder.
        classes: names of the classes; the model gets a new head if it has another number of them.
        size: sides of the images in pixels; None for the model's own.
        from_scratch: the architecture only, with new weights.

    Returns:
        The model, with weights in float32 (under autocast in training a short ascent step would be lost in 16 bits).

    Raises:
        ValueError: if the size is not known, or is not that of the checkpoint.
    """
    config = AutoConfig.from_pretrained(name, num_labels=len(classes), id2label=dict(enumerate(classes)))
    config.label2id = {each: number for number, each in enumerate(classes)}
    own = getattr(config, "image_size", None)
    own = own if own is None or isinstance(own, int) else own[0]
    if from_scratch and own is not None and size is not None:
        config.image_size = own = size
    if size is None and own is None:
        raise ValueError(f"{name} does not say how large its images are; say it with --image_size.")
    if None not in (size, own) and size != own:
        raise ValueError(f"{name} takes images of {own} pixels, not {size}; leave --image_size out.")
    size, channels, auto = size or own, getattr(config, "num_channels", 3), AutoModelForImageClassification
    assert size is not None
    if from_scratch:
        return ImageModel(partial(auto.from_config, config), size, channels)
    processor = ImageProcessingMixin.get_image_processor_dict(name)[0]
    # Only the head can be of another size, since that of the images is the model's own.
    options: dict[str, Any] = {"config": config, "dtype": "float32", "ignore_mismatched_sizes": True}
    make = partial(auto.from_pretrained, name, use_safetensors=True, **options)
    return ImageModel(make, size, channels, processor.get("image_mean", HALF), processor.get("image_std", HALF))


def small_vit(classes: Sequence[str], size: int, channels: int, hidden: int = 64, layers: int = 4) -> ImageModel:
    """Configure a small ViT for small images: patches of 4 pixels, or of an eighth of the side.

    Args:
        classes: names of the classes.
        size: side of the images in pixels.
        channels: 1 or 3.
        hidden: width.
        layers: depth.

    Returns:
        The model.

    Raises:
        ValueError: if patches do not divide the side, or heads of 16 the width.
    """
    patch = max(4, size // 8)
    if size < 4 or size % patch or hidden < 16 or hidden % 16 or layers < 1:
        raise ValueError(
            "A small ViT needs a width that 16 divides, a layer, and images with sides that 4 divides, and 8 from 32 "
            f"on; got {hidden}, {layers} and {size}."
        )
    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        num_channels=channels,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        intermediate_size=2 * hidden,
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
    )
    return ImageModel(partial(AutoModelForImageClassification.from_config, config), size, channels)
