"""Data sets, made by the tests themselves or shipped with packages."""

import gzip
import io
import shutil
import struct
import sys
import warnings
import zipfile
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from normfree.training.data.datasets import ArrayImages, Data, hold_out, load
from normfree.training.data.instances import VIEWS


def picture(seed, size=(64, 48)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def test_digits_have_the_size_mean_and_deviation_that_they_say():
    data = load("digits")
    assert (len(data.train), len(data.test), data.classes, data.channels) == (1438, 359, 10, 1)
    pixels = np.stack([np.asarray(data.train[i][0]) for i in range(len(data.train))]) / 255
    assert pixels.mean() == pytest.approx(data.mean[0], abs=2e-3)
    assert pixels.std() == pytest.approx(data.std[0], abs=2e-3)
    assert {data.test[i][1] for i in range(50)} == set(range(10))


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_read_from_its_original_files(packed, tmp_path):
    for part, count in (("train", 7), ("t10k", 3)):
        images = np.arange(count * 784, dtype=np.uint32).astype(np.uint8)
        for name, header, body in (
            (f"{part}-images-idx3-ubyte", struct.pack(">4i", 2051, count, 28, 28), images.tobytes()),
            (f"{part}-labels-idx1-ubyte", struct.pack(">2i", 2049, count), bytes(range(count))),
        ):
            if packed:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(header + body))
            else:
                (tmp_path / name).write_bytes(header + body)
    data = load(f"fashion_mnist:{tmp_path}")
    assert (len(data.train), len(data.test)) == (7, 3)
    image, label = data.train[1]
    assert label == 1
    assert np.array_equal(np.asarray(image).ravel(), np.arange(784, 2 * 784).astype(np.uint8))


@pytest.mark.parametrize("archive", [True, False])
def test_every_photograph_is_a_class_with_its_left_part_for_training(archive, tmp_path):
    folder = tmp_path / "photos" / "below"
    folder.mkdir(parents=True)
    for seed in range(5):
        picture(seed).save(folder / f"{seed}.png")
    picture(0).save(folder / "again.jpg", quality=97)  # a near-duplicate
    Image.new("RGB", (64, 64), "red").save(folder / "flat.png")
    picture(9, (16, 16)).save(folder / "tiny.png")
    (folder / "broken.png").write_bytes(b"no image")
    palette = picture(4).convert("P")
    palette.info["transparency"] = bytes(range(256))
    palette.save(folder / "4.png")
    path = tmp_path / "photos"
    if archive:
        path = tmp_path / "photos.zip"
        with zipfile.ZipFile(path, "w") as packed:
            for file in sorted(folder.iterdir()):
                packed.write(file, file.name)
    with pytest.warns(UserWarning, match=r"cannot read 1 images of .*broken\.png"):
        data = load(f"instances:{path}")
    assert data.classes == 5
    assert (len(data.train), len(data.test), len(data.validation)) == (5 * VIEWS, 5, 5)
    left, label = data.train[5 + 3]
    assert label == 3
    upper, lower = data.validation[3][0], data.test[3][0]
    assert left.size == (32, 48)
    assert upper.size == lower.size == (32, 32)
    whole = np.asarray(data.train.images[3])
    assert np.array_equal(np.asarray(left), whole[:, :32])
    assert np.array_equal(np.asarray(upper), whole[:32, 32:])
    assert np.array_equal(np.asarray(lower), whole[16:, 32:])


@pytest.mark.parametrize("damage", ["directory", "encrypted", "method", "no archive"])
def test_an_archive_that_is_damaged_is_refused_with_its_name(damage, tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("0.png", b"no image")
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\x01\x02")
    if damage == "no archive":
        data = b"no archive"
    else:
        data[place + {"directory": 0, "encrypted": 8, "method": 10}[damage]] = {"encrypted": 1}.get(damage, 99)
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the image that cannot be read
        with pytest.raises(ValueError, match=r"photos\.zip (is no \.zip of images|holds 0 distinct images)"):
            load(f"instances:{path}")


def test_images_of_any_format_and_depth_are_read(tmp_path):
    """16 bits of grey are those of 8, no format is left out, and training and test images have names of their own."""
    pixels = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    for part in ("train", "val"):
        for label, suffix in (("a", "png"), ("b", "webp"), ("c", "bmp"), ("d", "tif")):
            (tmp_path / part / label).mkdir(parents=True)
            deep = suffix in ("png", "tif")
            image = Image.fromarray(pixels if deep else (pixels // 257).astype(np.uint8))
            image.save(tmp_path / part / label / f"0.{suffix}")
    data = load(f"imagefolder:{tmp_path}")
    assert data.names == ("a", "b", "c", "d")
    assert len(data.train) == len(data.test) == 4
    for index in (0, 2, 3):
        found = np.asarray(data.train[index][0]).astype(int)
        assert found.shape == (48, 64, 3)
        assert np.abs(found - (pixels / 257)[..., None]).max() <= 1
    assert data.train.name(0) != data.test.name(0)
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "train" / "a" / "0.png", format="TIFF")
    with pytest.raises(ValueError, match="floating-point"):
        load(f"imagefolder:{tmp_path}").train[0]


def test_folders_of_classes_are_timm_s(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                picture(i).save(tmp_path / part / label / f"{i}.png")
    data = load(f"imagefolder:{tmp_path}")
    assert (len(data.train), len(data.test), data.classes) == (6, 4, 2)
    assert data.train[3][1] == 1
    assert data.train.name(3).endswith("0.png")
    assert data.names == ("cat", "dog")
    shutil.rmtree(tmp_path / "val" / "cat")  # a class without test images moves no other's number
    only_dogs = load(f"imagefolder:{tmp_path}").test
    assert {only_dogs[i][1] for i in range(len(only_dogs))} == {1}
    (tmp_path / "val" / "dgo").mkdir()
    picture(9).save(tmp_path / "val" / "dgo" / "9.png")
    with pytest.raises(ValueError, match=r"classes that .*train does not have: dgo"):
        load(f"imagefolder:{tmp_path}")
    shutil.rmtree(tmp_path / "val" / "dgo")
    (tmp_path / "val").rename(tmp_path / "test")
    assert len(load(f"imagefolder:{tmp_path}").test) == 2
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "train").rename(tmp_path / "all")
    with pytest.raises(ValueError, match="no folders train and val"):
        load(f"imagefolder:{tmp_path}")
    (tmp_path / "all").rename(tmp_path / "train")
    (tmp_path / "train" / "dog" / "0.png").write_bytes(b"")
    with pytest.raises(OSError, match="identify"):
        data.train[3]


def test_data_sets_of_torchvision_are_read(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 7), ("t10k", 3)):
        pixels, labels = bytes(count * 784), bytes(range(count))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)
    data = load(f"torch/fashion_mnist:{tmp_path}")
    assert (len(data.train), len(data.test), data.classes) == (7, 3, 10)
    assert data.test[2][0].mode == "RGB"
    assert data.train.labels == list(range(7))


@pytest.mark.parametrize("tested", ["validation", "test"])
def test_data_sets_of_hugging_face_are_read(tested, monkeypatch):
    """As its package `datasets` gives them: timm asks for a split, and reads bytes of images and their labels."""
    packed = io.BytesIO()
    picture(0).save(packed, "png")

    class Split(list):
        info = SimpleNamespace(splits=None, features={"label": SimpleNamespace(names=["a", "b", "c"])})

        def cast_column(self, *_):
            return self

    def load_dataset(name, split, **_):
        if split not in ("train", tested):
            raise ValueError(f'Unknown split "{split}"')
        return Split({"image": {"bytes": packed.getvalue(), "path": None}, "label": i % 3} for i in range(6))

    fake = ModuleType("datasets")
    fake.load_dataset, fake.Image, fake.ClassLabel = load_dataset, lambda **_: None, None
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    data = load("hfds/user/photographs")
    assert (len(data.train), len(data.test), data.classes) == (6, 6, 3)
    assert data.test[5][1] == 2
    assert data.test[5][0].size == (64, 48)


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("fashion_mnist:/none", FileNotFoundError, "dataset-fashion-mnist"),
        ("instances:/none", FileNotFoundError, "folder or .zip"),
        ("imagefolder:/none", FileNotFoundError, "no folder /none"),
        ("digitz", ValueError, "name its folder"),
        ("imagefoldr:/", ValueError, "no data is called 'imagefoldr'; did you mean imagefolder"),
        ("torch/folder:/", ValueError, "no data is called"),
        ("digits:/none", ValueError, "have no path"),
        ("instances", ValueError, "name a folder or .zip"),
        ("tfds/imagenet:/none", ValueError, "is a stream"),
        ("wds/imagenet:/none", FileNotFoundError, "no folder /none for wds"),
    ],
)
def test_what_is_not_there_is_named_with_the_reason(spec, error, words):
    with pytest.raises(error, match=words):
        load(spec)


def test_files_that_are_cut_off_are_named(tmp_path):
    header = struct.pack(">4i", 2051, 4, 28, 28)
    for name, text in (("empty", b""), ("short", header + bytes(784)), ("header", header[:7])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-images-idx3-ubyte").write_bytes(text)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte is"):
            load(f"fashion_mnist:{tmp_path / name}")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header)[:-9])
    with pytest.raises(ValueError, match="cut off"):
        load(f"fashion_mnist:{tmp_path / 'packed'}")
    for name, seed in (("a.png", 0), ("b.png", 1), ("c.png", 2)):
        picture(seed).save(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w") as archive:
        for name in ("a.png", "b.png", "c.png"):
            archive.write(tmp_path / name, name)
    content = bytearray((tmp_path / "damaged.zip").read_bytes())
    content[60] ^= 255  # in the first image
    (tmp_path / "damaged.zip").write_bytes(content)
    with pytest.warns(UserWarning, match=r"cannot read 1 images of .*damaged\.zip: a\.png"):
        assert load(f"instances:{tmp_path / 'damaged.zip'}").classes == 2


def idx(values, magic=b"\x00\x00\x08"):
    """A file of MNIST's format."""
    return magic + bytes([values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes()


PIXELS, LABELS = np.zeros((7, 28, 28), np.uint8), np.arange(7, dtype=np.uint8)
DAMAGED = {
    "fewer labels": (idx(PIXELS), idx(LABELS[:4]), r"labels of shape \(4,\) for 7 images"),
    "more labels": (idx(PIXELS), idx(np.zeros(9, np.uint8)), r"labels of shape \(9,\) for 7 images"),
    "a label of no class": (idx(PIXELS), idx(LABELS + 200), "has the label 206; there are 10 classes"),
    "another shape": (idx(PIXELS.reshape(7, 14, 56)), idx(LABELS), r"images of shape \(14, 56\), not \(28, 28\)"),
    "colours": (idx(np.zeros((7, 28, 28, 3), np.uint8)), idx(LABELS), r"images of shape \(28, 28, 3\)"),
    "another type": (idx(PIXELS, b"\x00\x00\x0d"), idx(LABELS), "begins with 00 00 0d, not 00 00 08"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_files_of_mnist_s_format_that_disagree_are_refused(name, tmp_path):
    images, labels, words = DAMAGED[name]
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(ValueError, match=words):
        load(f"fashion_mnist:{tmp_path}")


def in_folders(folder, *files):
    for part in ("train", "val"):
        for name in ("cat/0.png", "dog/0.png"):
            (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
            picture(0).save(folder / part / name)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(1).save(folder / name)
    return f"imagefolder:{folder}"


@pytest.mark.parametrize(
    "name", ["train/stray.png", "train/.ipynb_checkpoints/0-checkpoint.png", "val/a.png", "train/cat/.cache/0.png"]
)
def test_images_of_no_class_s_folder_shift_no_label(name, tmp_path):
    with pytest.warns(
        UserWarning, match=r"1 images of .* lie in no class's folder, or in a hidden one: they are left out"
    ):
        data = load(in_folders(tmp_path, name))
    assert (data.classes, data.names, len(data.train), len(data.test)) == (2, ("cat", "dog"), 2, 2)
    assert [data.train[index][1] for index in range(2)] == [data.test[index][1] for index in range(2)] == [0, 1]


def test_folders_without_folders_of_classes_are_refused(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        picture(0).save(tmp_path / part / "cat.png")
    with pytest.raises(ValueError, match="train has no folder of images for each class"):
        load(f"imagefolder:{tmp_path}")


def test_a_tenth_of_the_training_images_is_held_out_by_a_hash_where_there_are_none_to_validate():
    numbers = np.arange(2000, dtype=np.uint32).view(np.uint8).reshape(-1, 2, 2)
    train = ArrayImages(numbers, [0] * 2000)
    held = hold_out(Data(1, (0.5,), (0.5,), train=train, test=ArrayImages(numbers[:1], [0])))
    parts = [{np.asarray(images[i][0]).tobytes() for i in range(len(images))} for images in (held.train, held.test)]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 2000
    assert 160 < len(held.test) < 240
    # The choice of an image does not depend on how many there are.
    fewer = hold_out(Data(1, (0.5,), (0.5,), train=ArrayImages(numbers[:500], [0] * 500), test=train))
    assert held.test.chosen[: len(fewer.test)] == fewer.test.chosen
    assert [held.test.name(0), held.test.labels[0]] == [f"image {held.test.chosen[0]}", 0]
    with pytest.raises(ValueError, match="1 training images are too few"):
        hold_out(Data(1, (0.5,), (0.5,), train=ArrayImages(numbers[:1], [0]), test=train))


def test_folders_to_validate_and_to_test_are_told_apart(tmp_path):
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(count):
                picture(number).save(tmp_path / part / label / f"{number}.png")
    data = load(f"imagefolder:{tmp_path}")
    assert [len(images) for images in (data.train, data.validation, data.test)] == [6, 4, 2]
    chosen = hold_out(data)
    assert (len(chosen.train), len(chosen.test)) == (6, 4)
    shutil.rmtree(tmp_path / "test" / "b")
    assert load(f"imagefolder:{tmp_path}").test.labels == [0]
    shutil.rmtree(tmp_path / "test" / "a")  # as ImageNet's, without labels
    picture(0).save(tmp_path / "test" / "0.png")
    data = load(f"imagefolder:{tmp_path}")
    assert (len(data.test), data.validation) == (4, None)


def test_test_images_without_labels_are_no_test_set(tmp_path):
    for place in ("train/a", "train/b", "val/a", "test/images", "test/.ipynb_checkpoints"):
        (tmp_path / place).mkdir(parents=True)
        picture(0).save(tmp_path / place / "0.png")
    data = load(f"imagefolder:{tmp_path}")
    assert (data.test.labels, data.validation) == ([0], None)
