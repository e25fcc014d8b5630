"""Files of arrays that numpy would unpickle, read without running anything that they hold."""

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from normfree.files.whole import read_whole

_LARGEST = 2**34  # bytes
_MOST_PACKED = 100  # times that an archive of arrays may be smaller than they are


def read_arrays(path: str | Path) -> dict[str, Any]:
    """The mapping of names to arrays (or to such mappings) in an .npz, .npy or pickle file.

    The authors published their checkpoints as pickled object arrays, which may run any code when they are loaded. Here
    nothing but numpy arrays and scalars, dict, OrderedDict, list, tuple, strings and numbers is admitted.

    Raises ValueError for a file that holds anything else (it names the type), that is damaged, or that holds no
    mapping; OSError where it cannot be read.
    """
    data = read_whole(Path(path), largest=_LARGEST)
    try:
        content = _read_zip(data) if zipfile.is_zipfile(io.BytesIO(data)) else _read_one(data)
    except _RefusedError as error:
        raise ValueError(f"{path} holds {error}; only numpy arrays and plain containers are read") from None
    except Exception as error:  # what a damaged pickle or archive raises is not documented
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    content = _unwrapped(content)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must be a mapping of names to arrays")
    return content


class _RefusedError(Exception):
    pass


def _read_zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > max(_MOST_PACKED * len(data), 2**28):
            raise ValueError(f"it would be unpacked to {unpacked:,} bytes")
        members = {name.removesuffix(".npy"): _read_one(archive.read(name)) for name in archive.namelist()}
    return members["arr_0"] if list(members) == ["arr_0"] else members


def _read_one(data: bytes) -> Any:
    if not data.startswith(np.lib.format.MAGIC_PREFIX):
        return _Unpickler(io.BytesIO(data)).load()
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = header(stream)
    if dtype.hasobject:
        return _Unpickler(stream).load()
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _unwrapped(value: Any) -> Any:
    """Mappings without the object arrays that hold them."""
    if isinstance(value, np.ndarray) and value.dtype == object and value.size == 1:
        return _unwrapped(value.item())
    if isinstance(value, dict):
        return {str(key): _unwrapped(item) for key, item in value.items()}
    return value


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        place = module.replace("numpy._core", "numpy.core"), name
        if place not in _ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        return _ADMITTED[place]

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError(f"a persistent object ({pid!r})")


def _empty_array(subtype: object, shape: Any, typecode: Any) -> np.ndarray:
    """Make the empty array with which numpy begins, whose state follows; never a subclass."""
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _from_buffer(buffer: Any, dtype: np.dtype, shape: Any, order: Any) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype=dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    """Read bytes as old protocols write them."""
    return text.encode("latin1")


# numpy's own functions are replaced by narrower ones, and its array class by a mark that cannot be called.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
}
