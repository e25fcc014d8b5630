"""Photographs without labels as a data set: every image is its own class."""

import functools
import io
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from normfree.files.whole import require_file
from normfree.images import SUFFIXES, to_rgb

_LARGEST = 2**28  # bytes of an image in an archive

# What a file that is no image, a truncated one, or one of a broken format raises in Pillow.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class Instances:
    """Parts of images, each image a class."""

    def __init__(
        self, images: Sequence[Image.Image], names: Sequence[str], parts: Sequence[Callable[..., Any]]
    ) -> None:
        self.images = images
        self.names = names
        self.parts = parts

    @property
    def labels(self) -> Sequence[int]:
        """Numbers of the images that the parts are cut from."""
        return list(range(len(self.images))) * len(self.parts)

    def __len__(self) -> int:
        return len(self.images) * len(self.parts)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        part, label = divmod(index, len(self.images))
        image = self.images[label]
        return image.crop(self.parts[part](*image.size)), label

    def name(self, index: int) -> str:
        """Give the name of the image that the part is cut from."""
        return self.names[index % len(self.names)]


def _left(width: int, height: int) -> tuple[int, int, int, int]:
    return 0, 0, width // 2, height


def _right_square(lower: bool, width: int, height: int) -> tuple[int, int, int, int]:
    side = min(width - width // 2, height)
    top = height - side if lower else 0
    return width // 2, top, width // 2 + side, top + side


VIEWS = 8
"""Number of times that an epoch of instances shows each image, every time another crop of its left half."""


def instances(path: Path) -> tuple[Instances, Instances, Instances]:
    """Training images, left halves, test and validation images, the lower and the upper squares of the right halves.

    The images are those of a folder or a .zip; near-duplicates and flat ones are left out, and those that cannot be
    read, with a warning. Raises FileNotFoundError where there is neither, ValueError for fewer than two images and for
    an archive that is damaged.
    """
    images, names = _distinct(_images_of(path))
    if len(images) < 2:
        raise ValueError(f"{path} holds {len(images)} distinct images; instances need at least 2")
    test, validation = (Instances(images, names, [functools.partial(_right_square, low)]) for low in (True, False))
    return Instances(images, names, [_left] * VIEWS), test, validation


def _images_of(path: Path) -> list[tuple[str, Image.Image]]:
    """Read the images of a folder or an archive, RGB, in the order of their names, at most 256 pixels high."""
    found, unreadable = [], []
    for name, read in _files_of(path):
        try:
            with Image.open(read()) as opened:
                image = to_rgb(opened)
        except (*UNREADABLE, zipfile.BadZipFile, zlib.error):
            unreadable.append(name)
            continue
        if min(image.size) < 32:
            continue
        if image.height > 256:
            image = image.resize((max(1, round(image.width * 256 / image.height)), 256), Image.Resampling.BICUBIC)
        found.append((name, image))
    if unreadable:
        warnings.warn(f"cannot read {len(unreadable)} images of {path}: {', '.join(unreadable[:5])}", stacklevel=2)
    return found


def _files_of(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of every image's file, and a function that gives what Pillow opens."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in SUFFIXES and file.is_file():
                yield str(file), functools.partial(Path, file)
        return
    if not path.exists():
        raise FileNotFoundError(f"there is no folder or .zip of images at {path}")
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(n for n in archive.namelist() if Path(n).suffix.lower() in SUFFIXES):
                yield name, functools.partial(_member, archive, name)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no .zip of images, or a damaged one: {error}") from error


def _member(archive: zipfile.ZipFile, name: str) -> io.BytesIO:
    """Read one file of an archive. Raises OSError for one that is larger than an image is, or that is encrypted."""
    if archive.getinfo(name).file_size > _LARGEST:
        raise OSError(f"{name} is unpacked larger than {_LARGEST:,} bytes")
    try:
        with archive.open(name) as member:
            return io.BytesIO(member.read(_LARGEST))
    except RuntimeError as error:  # encrypted, or NotImplementedError: of an unusual compression
        raise OSError(f"{name} cannot be unpacked: {error}") from error


def _distinct(images: list[tuple[str, Image.Image]]) -> tuple[list[Image.Image], list[str]]:
    """Leave out near-duplicates (the same 16×16 pixels, but for 2 % of the range on average) and flat images."""
    kept: list[tuple[str, Image.Image]] = []
    small = np.empty((len(images), 16 * 16 * 3), np.float32)
    for name, image in images:
        pixels = np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32).ravel() / 255
        flat = pixels.reshape(-1, 3).std(0).max() < 0.02
        if not flat and not (np.abs(small[: len(kept)] - pixels).mean(1) < 0.02).any():
            small[len(kept)] = pixels
            kept.append((name, image))
    return [image for _, image in kept], [name for name, _ in kept]
