"""Data sets by name: images with labels, for training and for testing."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from normfree.arguments import checked
from normfree.errors import suggest
from normfree.files.whole import require_file
from normfree.images import IMAGENET_MEAN, IMAGENET_STD, SUFFIXES, to_rgb
from normfree.training.data.instances import instances
from normfree.training.data.mnist_format import read_idx
from normfree.training.data.shards import Shards, find_shards

FASHION_MNIST = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw")
"""Folders in which fashion_mnist is looked for: Debian's package dataset-fashion-mnist, and torchvision's."""

_CLOTHES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_IMAGENET = IMAGENET_MEAN, IMAGENET_STD


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
    """A data set for training and testing."""

    train: Images
    test: Images


@checked
def load(spec: str) -> Data:
    """Load the data set that `spec` names.

    Args:
        spec: One of

            - `digits`: the 1,797 digits of 8×8 pixels that scikit-learn ships
            - `fashion_mnist`: 60,000 and 10,000 grey images of 28×28; `fashion_mnist:PATH` names the folder of the
              original files
            - `instances:PATH`: every image of a folder or .zip is its own class: training images are left halves, test
              images the upper and the lower square of the right half
            - `wds/NAME:PATH`: the tar files of webdataset in a folder: NAME…train….tar and NAME…val….tar (or test);
              `wds:PATH` takes all names
            - `imagefolder:PATH`: folders `train` and `val` (or `test`) with a folder for each class
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
        train, test = instances(Path(path))
        return Data(len(train.images), *_IMAGENET, train=train, test=test)
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


class Subset:
    """Subset of `count` images, evenly spaced in their order. Raises ValueError where there are not so many."""

    def __init__(self, images: Images, count: int) -> None:
        if count > len(images):
            raise ValueError(f"train_images is {count}; there are {len(images)}")
        self.images = images
        self.chosen = [place * len(images) // count for place in range(count)]

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


class TimmImages:
    """A data set of timm or torchvision with an index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        # timm's own replaces what it cannot read without a word: its reader does not.
        self.reader = getattr(dataset, "reader", None)

    @property
    def classes(self) -> Any:
        """Names -> numbers, of timm's readers; else None."""
        return getattr(self.reader, "class_to_idx", None)

    @property
    def labels(self) -> Sequence[int]:
        """Labels, read without the images where the data set knows them."""
        known = getattr(self.dataset, "targets", None)
        if known is None and self.reader is not None and hasattr(self.reader, "samples"):
            known = [label for _, label in self.reader.samples]
        return [int(label) for label in known] if known is not None else [self[i][1] for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self.reader is None:
            image, label = self.dataset[index]
            return to_rgb(image), int(label)
        if hasattr(self.reader, "samples"):  # files of a folder
            require_file(Path(self.name(index)))
        file, label = self.reader[index]
        with file, Image.open(file) as image:
            return to_rgb(image), int(label)

    def name(self, index: int) -> str:
        """Give the file's name with its folder: training and test images may be called the same."""
        return str(self.reader.filename(index, absolute=True)) if self.reader is not None else f"image {index}"


def _image_folders(path: Path) -> tuple[TimmImages, TimmImages]:
    """Read the folders train, and val, validation or test."""
    test = next((split for split in ("val", "validation", "test") if (path / split).is_dir()), None)
    if test is None or not (path / "train").is_dir():
        raise ValueError(f"{path} has no folders train and val (or test): it would be tested on what it trains on")
    train = _in_folders_of_classes(path / "train")
    here = _in_folders_of_classes(path / test).classes
    unknown = [name for name in here if name not in train.classes]
    if unknown:  # timm would leave them out
        raise ValueError(f"{path / test} has classes that {path / 'train'} does not have: {', '.join(unknown[:5])}")
    # Numbered as in training, also where a class has no test image.
    return train, _create("", str(path / test), "", class_map=train.classes)


def _in_folders_of_classes(path: Path) -> TimmImages:
    """Read the images that lie in the folder of a class, without hidden ones, as Jupyter's copies; warn of others."""
    found = _create("", str(path), "")
    names = [name for name in found.classes if name and not name.startswith(".")]
    if not names:
        raise ValueError(f"{path} has no folder of images for each class")
    if len(names) == len(found.classes):
        return found
    kept = _create("", str(path), "", class_map={name: index for index, name in enumerate(names)})
    warnings.warn(
        f"{len(found) - len(kept)} images of {path} lie in no class's folder, or in a hidden one: they are left out",
        stacklevel=2,
    )
    return kept


def _create(name: str, path: str, split: str, *others: str, **arguments: Any) -> TimmImages:
    """Open the first split that exists. Raises ValueError where timm cannot, FileNotFoundError for an empty folder."""
    from timm.data import create_dataset
    from timm.data.readers import add_img_extensions

    add_img_extensions(SUFFIXES)  # timm by itself would leave out all but .png and .jpg, without a word
    try:
        return TimmImages(create_dataset(name, root=path or None, split=split, **arguments))
    except (AssertionError, RuntimeError, ValueError) as error:
        if others:
            return _create(name, path, *others, **arguments)
        raise ValueError(f"{name or 'imagefolder'} cannot be read from {path}: {error}") from error


def _load_timm(name: str, path: str) -> Data:
    if name.startswith(("tfds/", "hfids/")):
        raise ValueError(f"{name} is a stream; give a data set with an index, such as imagefolder, wds/… or hfds/…")
    if not path and not name.startswith("hfds/"):
        raise ValueError(f"data is {name!r}: name its folder too, as in imagefolder:PATH (or use digits)")
    if path and not os.path.isdir(path):
        raise FileNotFoundError(f"there is no folder {path} for {name}")
    if name == "imagefolder":
        train, test = _image_folders(Path(path))
    elif name.startswith(("torch/", "hfds/")) and name not in ("torch/folder", "torch/image_folder"):
        train, test = _create(name, path, "train"), _create(name, path, "validation", "test")
    else:
        known = ("digits", "fashion_mnist", "instances", "wds", "imagefolder")
        raise ValueError(
            f"no data is called {name!r}{suggest(name, known)}; {', '.join(known)}, torch/… and hfds/… are"
        )
    names = train.classes
    labels = names or getattr(train.dataset, "classes", None)
    classes = len(labels) if labels else 1 + max(train.labels)
    return Data(classes, *_IMAGENET, tuple(map(str, labels or ())), train=train, test=test)
