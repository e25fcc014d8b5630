"""Files that are whole, and on the disk, or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from normfree.errors import TrainingError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of `path` at the end; after a failure that is as it was.

    Raises TrainingError where it cannot be written.
    """
    temporary = path.with_name(f"new.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except Exception as error:  # safetensors has an error of its own for a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise TrainingError(f"cannot write {path}: {error}") from error


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such thing
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
