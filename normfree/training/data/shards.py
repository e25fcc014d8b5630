"""Images in webdataset's tar files, found by an index of where each is, so that any of them can be read at any time."""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from normfree.files.whole import require_file
from normfree.images import SUFFIXES, to_rgb


class _Member(NamedTuple):
    """A file in a shard: all of it from `offset` on."""

    shard: int
    offset: int
    size: int
    name: str


class Shards:
    """The samples of some tar files: what goes by one name up to the first dot of the file's is one sample.

    An image (.jpg, .png, …) beside its label as text (.cls) or as "label" in a .json. Only headers and labels are read
    before an image is asked for, and nothing stays open, so processes may share it. Raises ValueError for a file that
    is no uncompressed tar file, and for an image without a label.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.members: list[_Member] = []
        self._labels: list[int] = []
        for shard, path in enumerate(self.paths):
            for image, label in _samples(shard, path):
                self.members.append(image)
                self._labels.append(label)

    @property
    def labels(self) -> Sequence[int]:
        """Labels of all images."""
        return self._labels

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        member = self.members[index]
        with self.paths[member.shard].open("rb") as file:
            data = os.pread(file.fileno(), member.size, member.offset)
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image), self._labels[index]

    def name(self, index: int) -> str:
        """Give the name of the file in its shard."""
        member = self.members[index]
        return f"{self.paths[member.shard]}/{member.name}"


def find_shards(folder: Path, prefix: str, words: Sequence[str]) -> list[Path]:
    """The tar files of a folder whose names begin with `prefix`, and then have the first of the words that any has."""
    names = sorted(path for path in folder.glob("*.tar") if path.name.startswith(prefix))
    having = {path: set(re.findall("[a-z]+", path.name.removeprefix(prefix).lower())) for path in names}
    found = ([path for path in names if word in having[path]] for word in words)
    return next(filter(None, found), [])


def _samples(shard: int, path: Path) -> Iterator[tuple[_Member, int]]:
    """The images of a shard with their labels, in its order."""
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    require_file(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                folder, name = os.path.split(info.name)
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}"
                if not info.isfile() or not stem:
                    continue
                if f".{extension.lower()}" in SUFFIXES:
                    images[key] = _Member(shard, info.offset_data, info.size, info.name)
                elif extension.lower() in ("cls", "json"):
                    labels |= _label(archive, info, path, key)
            end = archive.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no uncompressed tar file ({error})") from error
    with path.open("rb") as file:
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"{path} is cut off or damaged at byte {end}: the archive's end is missing")
    unlabelled = [member.name for key, member in images.items() if key not in labels]
    if unlabelled:
        raise ValueError(
            f"{path} has no label (.cls, or .json with a label) for {unlabelled[0]}, one of {len(unlabelled)}"
        )
    return ((member, labels[key]) for key, member in images.items())


def _label(archive: tarfile.TarFile, info: tarfile.TarInfo, path: Path, key: str) -> dict[str, int]:
    """Read the key's label, if that file has one. Raises ValueError for one that is no integer."""
    file = archive.extractfile(info)
    assert file is not None
    text = file.read().decode("utf-8", "replace")
    try:
        if info.name.lower().endswith(".cls"):
            return {key: int(text)}
        described = json.loads(text)
        if not isinstance(described, dict) or "label" not in described:
            return {}
        label = described["label"]
        if isinstance(label, bool) or (isinstance(label, float) and not label.is_integer()):
            raise ValueError("it is no whole number")
        return {key: int(label)}
    except (OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}/{info.name} holds no label: {text[:40]!r}") from error
