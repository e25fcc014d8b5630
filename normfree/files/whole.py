"""Files that are complete and on the disk, or as they were before; and files read whole, none of which is endless."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from normfree.errors import WritingError

# What a full disk is not to blame for.
_NOT_FOR_WANT_OF_SPACE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `path` at the end; after a failure that is as it was.

    Raises WritingError where it cannot be written, ImportError where a package is missing.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f"new.{path.name}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except ImportError:
        raise
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        raise WritingError(f"cannot write {path}: {reason(error, path)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file at once. Raises WritingError where it cannot be written; the one that was there is as it was."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def reason(error: Exception, path: Path) -> str:
    """Say why `path` was not written, and how much space there is where that may be why."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno in _NOT_FOR_WANT_OF_SPACE:
        return words
    while not path.exists():
        path = path.parent
    return f"{words} ({shutil.disk_usage(path).free:,} bytes are free there)"


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such thing
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_whole(path: Path, *, largest: int) -> bytes:
    """Read a file of at most `largest` bytes. Raises what `require_file` does, and OSError where it cannot be read."""
    require_file(path, largest=largest)
    return path.read_bytes()


def require_file(path: Path, *, largest: int | None = None) -> None:
    """Raise FileNotFoundError where there is nothing, ValueError for what is no file or larger than `largest` bytes.

    Pipes and devices are no files here: they may have no end.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no file {path}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no file but a {'folder' if stat.S_ISDIR(found.st_mode) else 'device or a pipe'}")
    if largest is not None and found.st_size > largest:
        raise ValueError(f"{path} has {found.st_size:,} bytes; such a file has at most {largest:,}")
