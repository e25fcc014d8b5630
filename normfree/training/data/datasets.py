"""Data sets by name: images with labels, for training and for testing."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from normfree.arguments import checked
from normfree.errors import suggest
from normfree.images import IMAGENET_MEAN, IMAGENET_STD
from normfree.training.data.instances import instances
from normfree.training.data.mnist_format import read_idx
from normfree.training.data.shards import Shards, find_shards
from normfree.training.data.timm_images import create_timm, image_folders

FASHION_MNIST = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw")
"""Folders in which fashion_mnist is looked for: Debian's package dataset-fashion-mnist, and torchvision's."""

_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_IMAGENET = IMAGENET_MEAN, IMAGENET_STD
_HELD_OUT = round(0.1 * 2**32).to_bytes(4, "big")  # hashes below this: a tenth


class Images(Protocol):
    """A sequence of (image, label), and what to call each of them in an error."""

    @property
    def labels(self) -> Sequence[int]:
        """Labels of all images."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...
    def name(self, index: int) -> str:
        """Say where the image came from."""
        ...


@dataclass(frozen=True)
class Description:
    """Description of the data that a network keeps; mean and std are those of the pixels in [0, 1], per channel."""

    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    names: tuple[str, ...] = ()  # of the classes, where they have some

    @property
    def channels(self) -> int:
        """Channels: 1 for grey images, 3 for RGB."""
        return len(self.mean)


@dataclass(frozen=True, kw_only=True)
class Data(Description):
    """A data set for training and testing, and for choosing between trainings, where it has images for that."""

    train: Images
    test: Images
    validation: Images | None = None


@checked
def load(spec: str) -> Data:
    """Load the data set that `spec` names.

    Args:
        spec: One of

            - `digits`: the 1,797 digits of 8×8 pixels that scikit-learn ships
            - `fashion_mnist`: 60,000 and 10,000 grey images of 28×28; `fashion_mnist:PATH` names the folder of the
              original files
            - `instances:PATH`: every image of a folder or .zip is its own class: training images are left halves, test
              images the lower squares of the right halves, validation images the upper ones
            - `wds/NAME:PATH`: the tar files of webdataset in a folder: NAME…train….tar and NAME…val….tar (or test);
              `wds:PATH` takes all names
            - `imagefolder:PATH`: folders `train` and `val` (or `test`) with a folder for each class; where both are
              there, `val` holds the validation images
            - `torch/NAME:PATH`, `hfds/NAME`: torchvision's and Hugging Face's data sets, through timm

    Returns:
        Images with labels, for training and for testing.

    Raises:
        ValueError: For a name that is not known.
        FileNotFoundError: Where the data is not.
        ImportError: Where a package is missing.
    """
    name, _, path = spec.partition(":")
    if name == "digits":
        if path:
            raise ValueError(f"data is {spec!r}; digits come with scikit-learn and have no path")
        return _load_digits()
    if name == "fashion_mnist":
        return _load_fashion_mnist(path)
    if name == "instances":
        if not path:
            raise ValueError("data is 'instances': name a folder or .zip of images too, as in instances:PATH")
        train, test, validation = instances(Path(path))
        return Data(len(train.images), *_IMAGENET, train=train, test=test, validation=validation)
    if name == "wds" or name.startswith("wds/"):
        return _load_shards(Path(path), name.removeprefix("wds").removeprefix("/"))
    return _load_timm(name, path)


class ArrayImages:
    """Images in memory: (N, H, W) or (N, H, W, C), uint8."""

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        self.images = images
        self.labels = [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.labels[index]

    def name(self, index: int) -> str:
        """Give its number."""
        return f"image {index}"


def hold_out(data: Data) -> Data:
    """Return the data with its validation images in the place of the test set.

    Where there are none, a tenth of the training images, by a hash of their index, is held out of training for it.
    """
    if data.validation is not None:
        return replace(data, test=data.validation)
    held = [hashlib.sha256(b"%d" % index).digest() < _HELD_OUT for index in range(len(data.train))]
    parts = [[index for index, is_held in enumerate(held) if is_held is wanted] for wanted in (False, True)]
    if not all(parts):
        raise ValueError(f"{len(data.train)} training images are too few to hold some of them out")
    train, test = (Subset(data.train, part) for part in parts)
    return replace(data, train=train, test=test)


class Subset:
    """Images of a data set, by their indices."""

    def __init__(self, images: Images, chosen: Sequence[int]) -> None:
        self.images = images
        self.chosen = chosen

    @classmethod
    def spaced(cls, images: Images, count: int) -> "Subset":
        """Choose `count` images, evenly spaced in their order. Raises ValueError where there are not so many."""
        if count > len(images):
            raise ValueError(f"train_images is {count}; there are {len(images)}")
        return cls(images, [place * len(images) // count for place in range(count)])

    @property
    def labels(self) -> Sequence[int]:
        """Labels of the chosen images."""
        labels = self.images.labels
        return [labels[index] for index in self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[self.chosen[index]]

    def name(self, index: int) -> str:
        """Give the name of the image among all."""
        return self.images.name(self.chosen[index])


def _load_digits() -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"digits needs scikit-learn: pip install 'normfree[demo]' ({error})") from error
    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    test = np.arange(len(images)) % 5 == 4
    train, tested = (ArrayImages(images[part], digits.target[part]) for part in (~test, test))
    return Data(10, (0.305,), (0.376,), tuple(map(str, range(10))), train=train, test=tested)


def _load_fashion_mnist(path: str) -> Data:
    folders = [Path(path)] if path else [Path(p) for p in FASHION_MNIST]
    folder = next((f for f in folders if list(f.glob("train-images-idx3-ubyte*"))), None)
    if folder is None:
        raise FileNotFoundError(
            f"there is no Fashion-MNIST in {' or '.join(map(str, folders))}: install Debian's dataset-fashion-mnist, "
            "or name a folder that holds train-images-idx3-ubyte.gz and the others (fashion_mnist:PATH)"
        )

    def part(prefix: str) -> ArrayImages:
        paths = folder / f"{prefix}-images-idx3-ubyte", folder / f"{prefix}-labels-idx1-ubyte"
        images, labels = map(read_idx, paths)
        if images.shape[1:] != (28, 28):
            raise ValueError(f"{paths[0]} holds images of shape {images.shape[1:]}, not (28, 28)")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{paths[1]} has labels of shape {labels.shape} for {len(images)} images")
        if labels.max(initial=0) >= len(_CLOTHES):
            raise ValueError(f"{paths[1]} has the label {labels.max()}; there are {len(_CLOTHES)} classes")
        return ArrayImages(images, labels.tolist())

    return Data(10, (0.286,), (0.353,), _CLOTHES, train=part("train"), test=part("t10k"))


def _load_shards(folder: Path, prefix: str) -> Data:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} for wds")
    paths = [find_shards(folder, prefix, words) for words in (("train", "training"), ("val", "validation", "test"))]
    for found, word in zip(paths, ("train", "val"), strict=True):
        if not found:
            raise FileNotFoundError(f"{folder} has no shards {prefix}*{word}*.tar")
    train, test = map(Shards, paths)
    if not len(train) or not len(test):
        raise ValueError(f"the shards of {folder} hold {len(train)} training and {len(test)} test images")
    labels = {*train.labels, *test.labels}
    if min(labels) < 0:
        raise ValueError(f"the shards of {folder} have the label {min(labels)}; labels count from 0")
    if 1 + max(labels) > max(1000, 100 * len(labels)):
        raise ValueError(
            f"the shards of {folder} have the label {max(labels)}, and {len(labels)} labels in all: number the classes "
            "from 0 on"
        )
    return Data(1 + max(labels), *_IMAGENET, train=train, test=test)


def _load_timm(name: str, path: str) -> Data:
    if name.startswith(("tfds/", "hfids/")):
        raise ValueError(f"{name} is a stream; give a data set with an index, such as imagefolder, wds/… or hfds/…")
    if not path and not name.startswith("hfds/"):
        raise ValueError(f"data is {name!r}: name its folder too, as in imagefolder:PATH (or use digits)")
    if path and not os.path.isdir(path):
        raise FileNotFoundError(f"there is no folder {path} for {name}")
    validation = None
    if name == "imagefolder":
        train, test, validation = image_folders(Path(path))
    elif name.startswith(("torch/", "hfds/")) and name not in ("torch/folder", "torch/image_folder"):
        train, test = create_timm(name, path, "train"), create_timm(name, path, "validation", "test")
    else:
        known = ("digits", "fashion_mnist", "instances", "wds", "imagefolder")
        raise ValueError(
            f"no data is called {name!r}{suggest(name, known)}; {', '.join(known)}, torch/… and hfds/… are"
        )
    names = train.classes
    labels = names or getattr(train.dataset, "classes", None)
    classes = len(labels) if labels else 1 + max(train.labels)
    return Data(classes, *_IMAGENET, tuple(map(str, labels or ())), train=train, test=test, validation=validation)
