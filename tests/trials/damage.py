"""Damages of a file: what broken downloads, full disks, editors and strangers do to it."""

import functools
import gzip
import itertools
import json
import os
import pickle
import zipfile

import numpy as np
import torch

DEEP = b"[" * 100_000 + b"]" * 100_000
ODD = (None, True, -1, 0, 1.5, 1e300, float("nan"), 10**400, "", "\u0000", "x" * 10_000, [], [[]], {}, {"a": None})


def damages(data, random, count):
    """Yield `count` damages at least, as a name and a function of the path of the file that holds `data`."""
    whole = list(itertools.chain(_replaced(data), _without_a_file(), _hostile()))
    if data[:1] == b"{":
        whole += _edited(data, random)
    random.shuffle(whole)
    kinds = (_cut, _flipped, _zeroed, _removed, _repeated, _scrambled)
    bytewise = (kinds[i % len(kinds)](data, random) for i in range(max(count - len(whole), count // 2)))
    yield from itertools.islice(itertools.chain(_alternating(whole, bytewise)), count)


def _alternating(first, second):
    for pair in itertools.zip_longest(first, second):
        yield from (one for one in pair if one is not None)


def _writing(name, content):
    return name, lambda path: path.write_bytes(content)


def _replaced(data):
    contents = {
        "empty": b"", "one byte": b"\x00", "a letter": b"Dear Sir,\n", "a page": b"<!DOCTYPE html><html></html>",
        "a list": b"[]", "an object": b"{}", "null": b"null", "deep": DEEP, "not UTF-8": b"\xff\xfe" + data,
        "more after it": data + b"\x00" * 100, "twice": data + data, "a mark before it": b"\xef\xbb\xbf" + data,
        "other line ends": data.replace(b"\n", b"\r\n"), "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
    }  # fmt: skip
    return [_writing(name, content) for name, content in contents.items()]


def _without_a_file():
    def gone(path):
        path.unlink()

    def folder(path):
        path.unlink()
        path.mkdir()

    def pipe(path):
        path.unlink()
        os.mkfifo(path)

    def endless(path):
        path.unlink()
        path.symlink_to("/dev/zero")

    def circle(path):
        path.unlink()
        path.symlink_to(path.name)

    def dangling(path):
        path.unlink()
        path.symlink_to("nowhere")

    return [(function.__name__, function) for function in (gone, folder, pipe, endless, circle, dangling)]


class Code:
    """An object whose pickle makes a folder when it is loaded by the standard library."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def ran_code(folder):
    """Tell whether a pickle in the folder was loaded by the standard library."""
    return any(folder.rglob("ran"))


def _hostile():
    def pickled(path):
        path.write_bytes(pickle.dumps(Code(path.parent / "ran")))

    def pickled_array(path):
        with path.open("wb") as file:
            np.save(file, np.array([Code(path.parent / "ran")], dtype=object), allow_pickle=True)

    def torch_archive(path):
        torch.save({"a": Code(path.parent / "ran")}, path)

    def packed_bomb(path):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("0.png", "arr_0.npy"):
                archive.writestr(name, _zeros())

    def gzip_bomb(path):
        path.write_bytes(_gzipped_zeros())

    return [
        (function.__name__, function) for function in (pickled, pickled_array, torch_archive, packed_bomb, gzip_bomb)
    ]


def _zeros():
    return bytes(600 * 2**20)


@functools.cache
def _gzipped_zeros():
    """Pack more than a trial may hold; members of a file may follow each other."""
    return gzip.compress(_zeros(), 1) * 6


def _edited(data, random):
    """Yield a JSON object without a key, and with another value of it."""
    values = json.loads(data)
    found = []
    for key in values:
        rest = {name: value for name, value in values.items() if name != key}
        found.append(_writing(f"without {key}", json.dumps(rest, indent=2).encode()))
        for odd in random.sample(ODD, 4):
            text = json.dumps({**rest, key: odd}, indent=2).encode()
            found.append(_writing(f"{key} is {str(odd)[:20]!r}", text))
    found.append(_writing("one key more", json.dumps({**values, "more": 1}).encode()))
    return found


def _cut(data, random):
    length = random.randrange(len(data))
    return _writing(f"cut to {length}", data[:length])


def _flipped(data, random):
    place, bit = random.randrange(len(data)), random.randrange(8)
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return _writing(f"bit {bit} of {place}", bytes(changed))


def _zeroed(data, random):
    place, length = random.randrange(len(data)), min(len(data), 2 ** random.randrange(13))
    return _writing(f"{length} zeros at {place}", data[:place] + bytes(length) + data[place + length :])


def _removed(data, random):
    place, length = random.randrange(len(data)), 2 ** random.randrange(8)
    return _writing(f"{length} missing at {place}", data[:place] + data[place + length :])


def _repeated(data, random):
    place, length = random.randrange(len(data)), 2 ** random.randrange(8)
    return _writing(f"{length} twice at {place}", data[: place + length] + data[place:])


def _scrambled(data, random):
    place, length = random.randrange(len(data)), min(len(data), 2 ** random.randrange(10))
    return _writing(f"{length} others at {place}", data[:place] + random.randbytes(length) + data[place + length :])
