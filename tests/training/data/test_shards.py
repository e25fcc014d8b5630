"""Tar files of webdataset's form, made by the tests."""

import dataclasses
import io
import json
import multiprocessing
import tarfile

import numpy as np
import pytest
from PIL import Image

from normfree.training import RECIPES, train
from normfree.training.data.datasets import load


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8))


def png(seed):
    out = io.BytesIO()
    picture(seed).save(out, "png")
    return out.getvalue()


def shard(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def folder(tmp_path):
    """Two training shards of three and two images, a test shard of two."""
    samples = {seed: {f"a/{seed}.png": png(seed), f"a/{seed}.cls": str(seed % 3).encode()} for seed in range(5)}
    shard(tmp_path / "pets-train-0.tar", samples[0] | samples[1] | samples[2])
    as_json = {"b/4.v1.png": b"", "b/4.json": json.dumps({"label": 1, "more": 2}).encode(), "b/4.png": png(4)}
    shard(tmp_path / "pets-train-1.tar", samples[3] | as_json)
    shard(tmp_path / "pets-val-0.tar", samples[1] | samples[2])
    return tmp_path


def pixels(item):
    image, label = item
    return np.asarray(image), label


def test_samples_are_found_at_any_place(folder):
    data = load(f"wds/pets:{folder}")
    assert (len(data.train), len(data.test), data.classes, data.channels) == (5, 2, 3, 3)
    assert list(data.train.labels) == [0, 1, 2, 0, 1]
    for index in (4, 0, 3):
        image, label = pixels(data.train[index])
        assert np.array_equal(image, np.asarray(picture(index)))
        assert label == data.train.labels[index]
    assert data.train.name(4).endswith("pets-train-1.tar/b/4.png")
    assert len(load(f"wds:{folder}").train) == 5


def test_processes_that_share_an_archive_read_their_own_samples(folder):
    train = load(f"wds/pets:{folder}").train
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for index, (image, _) in enumerate(pool.map(train.__getitem__, list(range(5)) * 20)):
            assert np.array_equal(np.asarray(image), np.asarray(picture(index % 5)))


def test_a_network_trains_on_them(folder, tmp_path):
    recipe = dataclasses.replace(
        RECIPES["digits"], data=f"wds/pets:{folder}", model_args=("width=0.25",), batch=4, epochs=1, workers=1
    )
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result.finished
    assert result.accuracy.examples == 2


def test_labels_below_0_are_refused(folder):
    shard(folder / "pets-train-2.tar", {"9.png": png(9), "9.cls": b"-1"})
    with pytest.raises(ValueError, match="have the label -1; labels count from 0"):
        load(f"wds/pets:{folder}")


def test_what_cannot_be_read_is_refused_and_named(folder):
    with pytest.raises(FileNotFoundError, match=r"has no shards cars\*train\*\.tar"):
        load(f"wds/cars:{folder}")
    broken = {"1.png": b"no image", "1.cls": b"0"}
    shard(folder / "pets-train-2.tar", broken)
    with pytest.raises(OSError, match="identify"):
        load(f"wds/pets:{folder}").train[5]
    for files, words in (
        ({"1.png": png(1)}, r"no label .* for 1\.png, one of 1"),
        ({"1.png": png(1), "1.cls": b"cat"}, r"1\.cls holds no label: 'cat'"),
        ({"1.png": png(1), "1.json": b"{"}, r"1\.json holds no label"),
    ):
        shard(folder / "pets-train-2.tar", files)
        with pytest.raises(ValueError, match=words):
            load(f"wds/pets:{folder}")
    for data in ((folder / "pets-train-0.tar").read_bytes()[:1500], b"no tar file"):
        (folder / "pets-train-2.tar").write_bytes(data)
        with pytest.raises(ValueError, match=r"pets-train-2\.tar (is no uncompressed tar file|is cut off)"):
            load(f"wds/pets:{folder}")
    shard(folder / "pets-train-2.tar", broken, "w:gz")
    with pytest.raises(ValueError, match="is no uncompressed tar file"):
        load(f"wds/pets:{folder}")


def test_a_shard_that_is_cut_off_anywhere_is_refused(folder):
    path = folder / "pets-train-0.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1].offset_data + 512
    assert len(load(f"wds/pets:{folder}").train) == 5
    for size in range(512, end + 1, 256):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"pets-train-0\.tar"):
            load(f"wds/pets:{folder}")
    path.write_bytes(whole[: end + 512])  # one of two closing blocks
    assert len(load(f"wds/pets:{folder}").train) == 5


def test_a_shard_that_is_damaged_between_two_files_is_refused(folder):
    path = folder / "pets-train-0.tar"
    whole = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        second = archive.getmembers()[2].offset
    whole[second : second + 8] = b"\xff" * 8
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"is cut off or damaged at byte {second}: the archive's end is missing"):
        load(f"wds/pets:{folder}")


@pytest.mark.parametrize("label", ["1e400", "1.7", "true", "[1]", '"one"', "null", "[" * 100_000])
def test_labels_that_are_no_whole_numbers_are_refused(label, folder):
    shard(folder / "pets-train-2.tar", {"9.png": png(9), "9.json": f'{{"label": {label}}}'.encode()})
    with pytest.raises(ValueError, match=r"pets-train-2\.tar/9\.json holds no label"):
        load(f"wds/pets:{folder}")


def test_labels_that_are_whole_in_another_form_are_taken(folder):
    shard(folder / "pets-train-2.tar", {"9.png": png(9), "9.json": b'{"label": 2.0}'})
    assert load(f"wds/pets:{folder}").train.labels[-1] == 2


def test_ids_are_no_labels(folder):
    shard(folder / "pets-train-2.tar", {"9.png": png(9), "9.cls": b"1000000000"})
    with pytest.raises(ValueError, match="have the label 1000000000, and 4 labels in all: number the classes from 0"):
        load(f"wds/pets:{folder}")
    shard(folder / "pets-train-2.tar", {"9.png": png(9), "9.cls": b"999"})
    assert load(f"wds/pets:{folder}").classes == 1000
