"""Real images: how files are read, and batches to run a network on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.files.whole import require_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels in [0, 1], per channel of RGB."""

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".tga"}


def photographs(shape: tuple[int, ...], batch: int) -> Tensor:
    """Random crops, (batch, C, H, W), of the two photographs that scikit-learn ships; C is 1 or 3.

    Drawn with torch's random state; each crop is at least half as large as its photograph and may be mirrored. Raises
    ImportError without scikit-learn and pillow.
    """
    try:
        from sklearn.datasets import load_sample_images

        images = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    except ImportError as error:
        raise ImportError("photographs need scikit-learn and pillow: pip install 'normfree[demo]'") from error
    _require_image(shape)
    return torch.stack([_random_crop(images[i % len(images)], shape) for i in range(batch)])


def from_folder(folder: Path, shape: tuple[int, ...], batch: int) -> Tensor:
    """Center crops, (batch, C, H, W), of images drawn from a folder and those below it; C is 1 or 3.

    Raises ValueError where the folder is missing, holds fewer images than `batch`, or one that cannot be read.
    """
    _require_image(shape)
    if not folder.is_dir():
        raise ValueError(f"there is no folder of images at {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no images (of the suffixes {', '.join(sorted(SUFFIXES))})")
    if len(files) < batch:
        raise ValueError(f"{folder} holds {len(files)} images, fewer than a batch of {batch}")
    chosen = [files[i] for i in torch.randperm(len(files))[:batch].tolist()]
    return torch.stack([_center_crop(_read(path), shape) for path in chosen])


def batch_function(source: str, batch: int, shape: Callable[[Any], tuple[int, ...]]) -> Callable[[Any], Tensor]:
    """A function of a model that draws a batch of images, of its dtype: `source` is "photos" or a folder's path."""
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")

    def draw(model: Any) -> Tensor:
        wanted = shape(model)
        images = photographs(wanted, batch) if source == "photos" else from_folder(Path(source), wanted, batch)
        return images.to(next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype))

    return draw


def _require_image(shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"the model's input has shape {shape}; images have (1 or 3, height, width)")


def to_rgb(image: Any) -> Any:
    """A PIL image in RGB; 16 bits of grey are scaled to 8, where Pillow would cut them off.

    Raises ValueError for floating-point pixels, of which nobody knows the range.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of an unknown range")
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 257).convert("L")
    if "transparency" in image.info:  # palettes with transparent colours warn unless they go by way of RGBA
        image = image.convert("RGBA")
    return image.convert("RGB")


def _read(path: Path) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs pillow: pip install 'normfree[demo]'") from error
    try:
        require_file(path)
        with Image.open(path) as image:
            rgb = to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def _random_crop(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    _, height, width = image.shape
    scale = min(height / shape[-2], width / shape[-1]) * float(torch.empty(()).uniform_(0.5, 1))
    h, w = max(1, int(shape[-2] * scale)), max(1, int(shape[-1] * scale))
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    crop = image[:, top : top + h, left : left + w]
    return _finish(crop.flip(2) if torch.rand(()) < 0.5 else crop, shape)


def _center_crop(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    _, height, width = image.shape
    scale = min(height / shape[-2], width / shape[-1])
    h, w = max(1, round(shape[-2] * scale)), max(1, round(shape[-1] * scale))
    top, left = (height - h) // 2, (width - w) // 2
    return _finish(image[:, top : top + h, left : left + w], shape)


def _finish(crop: Tensor, shape: tuple[int, ...]) -> Tensor:
    x = F.interpolate(crop[None].float() / 255, size=shape[1:], mode="bilinear", antialias=True, align_corners=False)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    x = (x - mean) / std
    return x if shape[0] == 3 else x.mean(0, keepdim=True)
