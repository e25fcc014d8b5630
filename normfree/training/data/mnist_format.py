"""Files in MNIST's format: arrays of bytes behind a header, gzipped or not."""

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np

from normfree.files.whole import read_whole

_LARGEST = 2**30  # bytes


def read_idx(path: Path) -> np.ndarray:
    """Read the bytes of a file, or of the one with .gz behind its name, in their shape.

    Raises ValueError, with the path, for another file and one that is cut off, OSError where it cannot be read.
    """
    packed = path.with_name(path.name + ".gz")
    try:
        if path.exists():
            data = read_whole(path, largest=_LARGEST)
        else:
            with gzip.GzipFile(fileobj=io.BytesIO(read_whole(packed, largest=_LARGEST))) as unpacked:
                data = unpacked.read(_LARGEST)
        # A magic number (0, 0, the type, the number of dimensions), and a number per dimension.
        if data[:3] != bytes((0, 0, 8)):
            raise ValueError(f"it begins with {data[:3].hex(' ')}, not 00 00 08, unsigned bytes")
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
        shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    except (EOFError, IndexError, ValueError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no file of MNIST's format, or cut off: {error}") from error
    if values.size != math.prod(shape.tolist()):
        raise ValueError(f"{path} is cut off: {values.size} values, not {math.prod(shape.tolist())}")
    return values.reshape(shape.tolist())
