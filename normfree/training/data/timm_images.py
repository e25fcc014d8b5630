"""Data sets of timm, torchvision and Hugging Face, and folders of images: those with an index."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from normfree.files.whole import require_file
from normfree.images import SUFFIXES, to_rgb


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


def image_folders(path: Path) -> tuple[TimmImages, TimmImages, TimmImages | None]:
    """Read the images to train, to test and, where `val` (or `validation`) and `test` are both there, to validate."""
    validation = next((path / split for split in ("val", "validation") if (path / split).is_dir()), None)
    has_test = _has_classes(path / "test", path / "train") or (validation is None and (path / "test").is_dir())
    test = path / "test" if has_test else validation
    if test is None or not (path / "train").is_dir():
        raise ValueError(f"{path} has no folders train and val (or test): it would be tested on what it trains on")
    train = _in_folders_of_classes(path / "train")
    tested = _numbered_as(train, test)
    return train, tested, None if validation in (None, test) else _numbered_as(train, validation)


def _has_classes(path: Path, train: Path) -> bool:
    """Tell whether a folder has one of a class; test images without labels, as ImageNet's, are in none."""
    return path.is_dir() and any(entry.is_dir() and (train / entry.name).is_dir() for entry in path.iterdir())


def _numbered_as(train: TimmImages, path: Path) -> TimmImages:
    """Read images of the same classes, numbered as in training also where a class has no image."""
    unknown = [name for name in _in_folders_of_classes(path).classes if name not in train.classes]
    if unknown:  # timm would leave them out
        raise ValueError(f"{path} has classes that {path.parent / 'train'} does not have: {', '.join(unknown[:5])}")
    return create_timm("", str(path), "", class_map=train.classes)


def _in_folders_of_classes(path: Path) -> TimmImages:
    """Read the images that lie in the folder of a class, without hidden ones, as Jupyter's copies; warn of others."""
    found = create_timm("", str(path), "")
    names = [name for name in found.classes if name and not name.startswith(".")]
    if not names:
        raise ValueError(f"{path} has no folder of images for each class")
    if len(names) == len(found.classes):
        return found
    kept = create_timm("", str(path), "", class_map={name: index for index, name in enumerate(names)})
    warnings.warn(
        f"{len(found) - len(kept)} images of {path} lie in no class's folder, or in a hidden one: they are left out",
        stacklevel=2,
    )
    return kept


def create_timm(name: str, path: str, split: str, *others: str, **arguments: Any) -> TimmImages:
    """Open the first split that exists. Raises ValueError where timm cannot, FileNotFoundError for an empty folder."""
    from timm.data import create_dataset
    from timm.data.readers import add_img_extensions

    add_img_extensions(SUFFIXES)  # timm by itself would leave out all but .png and .jpg, without a word
    try:
        return TimmImages(create_dataset(name, root=path or None, split=split, **arguments))
    except (AssertionError, RuntimeError, ValueError) as error:
        if others:
            return create_timm(name, path, *others, **arguments)
        raise ValueError(f"{name or 'imagefolder'} cannot be read from {path}: {error}") from error
