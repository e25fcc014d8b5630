"""Transforms: an image to bytes of one size, and a batch on its device to normalized numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normfree.training.data.datasets import Description
from normfree.training.recipes import Recipe


def training_transform(recipe: Recipe, data: Description, size: int, channels: int) -> Callable[[Any], Tensor]:
    """Make random crops and what else the recipe asks for (timm's), (channels, size, size), uint8."""
    from timm.data import create_transform

    uncropped = recipe.crop_scale == 1
    try:
        transform = create_transform(
            (channels, size, size), is_training=True, scale=(recipe.crop_scale, 1.0),
            ratio=(1.0, 1.0) if uncropped else (3 / 4, 4 / 3), hflip=0.5 if recipe.flip else 0.0,
            auto_augment=recipe.auto_augment or None, **_common(data, channels),
        )  # fmt: skip
    except AssertionError as error:
        raise ValueError(f"auto_augment is {recipe.auto_augment!r}, which timm does not know {error}") from error
    return _converted(transform, channels)


def testing_transform(data: Description, size: int, channels: int) -> Callable[[Any], Tensor]:
    """Cut out the middle of the image, as the authors do (32 pixels off the resized image); small ones uncut; uint8."""
    from timm.data import create_transform

    transform = create_transform(
        (channels, size, size), crop_pct=size / (size + 32) if size >= 128 else 1.0,
        **_common(data, channels),
    )  # fmt: skip
    return _converted(transform, channels)


class Normalization:
    """Normalization of pixels (N, C, H, W), 0 to 255, to `dtype`, with the data's mean 0 and standard deviation 1."""

    def __init__(self, data: Description, channels: int, dtype: torch.dtype) -> None:
        mean, std = _statistics(data, channels)
        self.mean, self.std = (torch.tensor(values, dtype=dtype)[:, None, None] for values in (mean, std))

    def __call__(self, pixels: Tensor, device: torch.device) -> Tensor:
        """Normalize pixels on the device."""
        mean, std = (values.to(device, non_blocking=True) for values in (self.mean, self.std))
        return pixels.to(device, mean.dtype, non_blocking=True).div(255).sub_(mean).div_(std)


def _common(data: Description, channels: int) -> dict[str, Any]:
    mean, std = _statistics(data, channels)
    return {"interpolation": "bicubic", "color_jitter": None, "mean": mean, "std": std, "normalize": False}


def _statistics(data: Description, channels: int) -> tuple[tuple[float, ...], ...]:
    """Mean and standard deviation of the data, of as many channels as the model takes."""
    if data.channels == channels:
        return data.mean, data.std
    return tuple((sum(values) / len(values),) * channels for values in (data.mean, data.std))


class _Converted:
    """A transform of images of another mode; a class, so that loading workers can be sent it."""

    def __init__(self, transform: Any, mode: str) -> None:
        self.transform = transform
        self.mode = mode

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image.convert(self.mode))


def _converted(transform: Any, channels: int) -> Callable[[Any], Tensor]:
    if channels not in (1, 3):
        raise ValueError(f"the model takes {channels} channels; images have 1 or 3")
    return _Converted(transform, "L" if channels == 1 else "RGB")
