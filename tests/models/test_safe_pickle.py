"""Files that numpy would unpickle: read without running anything."""

import collections
import io
import pickle
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from normfree.models.safe_pickle import read_arrays

WITNESS = Path(tempfile.gettempdir(), "normfree-ran-a-pickle")
PARAMS = {
    "NFNet/~/stem_conv0": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "gain": np.float32(2.5)},
    "NFNet/~/linear": {"b": np.zeros(3, np.float64), "w": np.asfortranarray(np.ones((2, 2), ">f4"))},
}


def write(path, form, params, protocol=4):
    if form == "pickle":
        path.write_bytes(pickle.dumps(params, protocol))
    elif form == "npy":
        with path.open("wb") as file:
            np.save(file, np.array(params, dtype=object), allow_pickle=True)
    elif form == "npz":
        with path.open("wb") as file:
            np.savez(file, np.array(params, dtype=object))
    elif form == "flat npz":
        np.savez(path, **{f"{m}//{n}": value for m, inner in params.items() for n, value in inner.items()})
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("ordered", [False, True])
def test_pickles_of_every_protocol_are_read(protocol, ordered, tmp_path):
    params = collections.OrderedDict(PARAMS) if ordered else PARAMS
    equal(read_arrays(write(tmp_path / "f.npz", "pickle", params, protocol)))


@pytest.mark.parametrize("form", ["npy", "npz"])
def test_object_arrays_are_read(form, tmp_path):
    equal(read_arrays(write(tmp_path / "f.npz", form, PARAMS)))


def test_plain_arrays_are_read(tmp_path):
    arrays = read_arrays(write(tmp_path / "f.npz", "flat npz", PARAMS))
    nested = {module: {} for module in PARAMS}
    for key, value in arrays.items():
        module, name = key.split("//")
        nested[module][name] = value
    equal(nested)


def equal(arrays):
    assert arrays.keys() == PARAMS.keys()
    for module, inner in PARAMS.items():
        assert arrays[module].keys() == inner.keys()
        for name, value in inner.items():
            found = arrays[module][name]
            assert np.array_equal(found, value), f"{module}//{name} is {found}, shape {np.shape(found)}, not {value}"


class Runs:
    def __reduce__(self):
        return (__import__("os").system, (f"touch {WITNESS}",))


class Anything:
    pass


@pytest.mark.parametrize("form", ["pickle", "npy", "npz"])
@pytest.mark.parametrize(
    ("value", "word"),
    [
        (Runs(), "system"),
        (Anything(), "Anything"),
        (np.array([Runs()], dtype=object), "system"),
        (np.ma.array([1.0]), r"numpy\.ma"),
        (np.memmap, "memmap"),
        (print, "print"),
    ],
)
def test_anything_else_is_refused_by_name(form, value, word, tmp_path):
    path = write(tmp_path / "f.npz", form, {"m": {"w": value}})
    with pytest.raises(ValueError, match=word):
        read_arrays(path)
    assert not WITNESS.exists()


def test_arrays_are_not_called_by_a_pickle(tmp_path):
    """The array class is a mark only: a pickle cannot construct one around memory of its choice."""
    crafted = b"cnumpy\nndarray\n(I4\ntR."
    (tmp_path / "f.pkl").write_bytes(crafted)
    with pytest.raises(ValueError, match="cannot be read"):
        read_arrays(tmp_path / "f.pkl")


@pytest.mark.parametrize("form", ["pickle", "npy", "npz", "flat npz"])
def test_damaged_files_are_an_error(form, tmp_path):
    whole = write(tmp_path / "f.npz", form, PARAMS).read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "short").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read"):
            read_arrays(tmp_path / "short")


def test_no_mapping_and_no_file_are_an_error(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(ValueError, match="ndarray; it must be a mapping"):
        read_arrays(tmp_path / "a.npy")
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "none.npz")


def test_objects_inside_an_archive_are_read_by_the_same_reader(tmp_path):
    stream = io.BytesIO()
    np.save(stream, np.array([Runs()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive:
        archive.writestr("w.npy", stream.getvalue())
    with pytest.raises(ValueError, match="system"):
        read_arrays(tmp_path / "f.npz")
    assert not WITNESS.exists()
