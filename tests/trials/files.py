"""Damaged files: each is refused with its name, or read as it was, or, without a checksum, as what it now says."""

import contextlib
import functools
import gzip
import io
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

import normfree
from normfree.files.csv_tables import Table
from normfree.images import batch_function
from normfree.models.safe_pickle import read_arrays
from normfree.studies.study import TrainingRow
from normfree.studies.trainings import StudyTables
from normfree.training import Recipe, load_run, train
from normfree.training.data import load
from normfree.training.run.checkpoint import find_damage, read_position
from normfree.training.run.curves import read_curves
from normfree.training.run.writer import COLUMNS
from tests.trials.child import Outcome, run_in_child, summary_of
from tests.trials.damage import damages, ran_code

RUN = Recipe(
    model="nf_resnet26", model_args=("width=0.0625", "skip_gain=null"), data="digits", train_images=32, batch=16,
    image_size=32, epochs=1, workers=0, ema=0.5, signal_every=1, checkpoint_every=1, warmup_epochs=0.0,
)  # fmt: skip
CONVERTED = {
    "model": "tests.trials.files:with_batch_norm",
    "model_args": (),
    "convert": True,
    "ema": 0.0,
    "signal_every": 0,
}


class Readable(NamedTuple):
    """A file that is read, in the folder that `make` fills."""

    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]  # of the folder
    checked: bool = False  # it has a checksum


def with_batch_norm(num_classes=4, in_channels=3):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, num_classes),
    )  # fmt: skip


def _saved(folder):
    normfree.create_model("nf_resnet26", width=0.0625, num_classes=4).save_pretrained(folder)


def _loaded(folder):
    network = normfree.from_pretrained(folder)
    return summary_of(network.state_dict()), summary_of(network.config)


def _conversion(folder):
    normfree.convert(with_batch_norm(), torch.randn(4, 3, 16, 16)).save(folder / "free.safetensors")


def _run(**changes):
    def make(folder):
        import dataclasses

        train(dataclasses.replace(RUN, **changes), folder, quiet=True)
        (folder / "step").mkdir()
        newest = max((folder / "checkpoints").iterdir())
        for file in newest.iterdir():
            shutil.copy(file, folder / "step")

    return make


def _tested(folder):
    network = load_run(folder, trusted_model=CONVERTED["model"] if (folder / "plan.json").exists() else None)
    return summary_of(network.state_dict()), summary_of(Recipe.from_json(folder / "config.json"))


def _checkpoint(folder):
    damage = find_damage(folder / "step")
    if damage is not None:
        raise ValueError(damage)
    return summary_of(read_position(folder / "step"))


def _cut_back(file):
    columns = COLUMNS if file == "metrics.csv" else None
    return lambda folder: summary_of(Table(folder / file, columns).cut_back(2))


def _signal(folder):
    with normfree.signal.SignalMonitor(nn.Conv2d(1, 1, 1), every=1, path=folder / "signal.csv", step=3) as monitor:
        return summary_of(monitor.rows)


def _trainings(folder):
    table = StudyTables(folder).trainings
    for seed in range(3):
        table.add(TrainingRow("abc", "a", "b", 0.1, seed, 50.0, 1.0))


def _array_file(folder):
    network = normfree.create_model("nf_resnet26", width=0.0625, num_classes=4)
    arrays = {name: value.detach().numpy() for name, value in list(network.named_parameters())[:6]}
    np.savez(folder / "arrays.npz", **arrays)
    (folder / "arrays.pickle").write_bytes(pickle.dumps(arrays))


def _png(index):
    pixels = np.random.default_rng(index).integers(0, 255, (40, 80, 3), dtype=np.uint8)
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG")
    return packed.getvalue()


def _zipped(folder):
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for index in range(4):
            archive.writestr(f"{index}.png", _png(index))


def _shards(folder):
    for part in ("train", "val"):
        with tarfile.open(folder / f"some-{part}-0.tar", "w") as archive:
            for index in range(4):
                for name, content in ((f"{index}.png", _png(index)), (f"{index}.cls", str(index % 2).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def _folders(folder):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for index in range(2):
                (folder / part / name / f"{index}.png").write_bytes(_png(index))


def _idx(folder):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, values in (("images-idx3", pixels), ("labels-idx1", np.arange(8, dtype=np.uint8))):
            header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
            content = header + values.tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(content)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))


def _unpacked_idx(folder):
    _idx(folder)
    for path in folder.glob("*.gz"):
        path.unlink()


def _packed_idx(folder):
    _idx(folder)
    for path in folder.iterdir():
        if path.suffix != ".gz":
            path.unlink()


def _images(spec):
    def read(folder):
        data = load(spec.format(folder))
        found = [summary_of(np.asarray(image)) for part in (data.train, data.test) for image, _ in _readable(part)]
        return data.classes, list(data.train.labels), list(data.test.labels), found

    return read


def _readable(part):
    for index in range(len(part)):
        with contextlib.suppress(OSError, ValueError, SyntaxError, EOFError):  # it is named and left out in training
            yield part[index]


def _batch(folder):
    def shape(model):
        return 3, 32, 32

    torch.manual_seed(0)
    return summary_of(batch_function(str(folder), 2, shape)(nn.Linear(1, 1)))


def _one_image(folder):
    for index in range(2):
        (folder / f"{index}.png").write_bytes(_png(index))


READABLE = (
    *(Readable(file, _saved, _loaded, checked=True) for file in ("config.json", "model.safetensors")),
    Readable(
        "free.safetensors", _conversion,
        lambda folder: summary_of(
            normfree.load_converted(with_batch_norm(), folder / "free.safetensors").state_dict()
        ), checked=True,
    ),
    *(Readable(file, _run(), _tested, checked=True) for file in ("config.json", "data.json", "model_ema.safetensors")),
    *(
        Readable(file, _run(**CONVERTED), _tested, checked=True)
        for file in ("config.json", "plan.json", "model.safetensors")
    ),
    *(
        Readable(f"step/{file}", _run(), _checkpoint, checked=True)
        for file in (
            "manifest.json", "position.json", "config.json", "model.safetensors", "model_ema.safetensors",
            "optimizer.bin", "random_states_0.pkl",
        )
    ),
    Readable("metrics.csv", _run(), _cut_back("metrics.csv")),
    Readable("metrics.csv", _run(), lambda folder: summary_of(read_curves(folder))),
    Readable("signal.csv", _run(), _signal),
    Readable("trainings.csv", _trainings, lambda folder: summary_of(StudyTables(folder).trainings.rows())),
    *(
        Readable(file, _array_file, lambda folder, file=file: summary_of(read_arrays(folder / file)))
        for file in ("arrays.npz", "arrays.pickle")
    ),
    Readable("images.zip", _zipped, _images("instances:{}/images.zip")),
    Readable("some-train-0.tar", _shards, _images("wds:{}")),
    Readable("train/cat/0.png", _folders, _images("imagefolder:{}")),
    *(
        Readable(f"train-{kind}-ubyte{ending}", make, _images("fashion_mnist:{}"))
        for make, ending in ((_unpacked_idx, ""), (_packed_idx, ".gz"))
        for kind in ("images-idx3", "labels-idx1")
    ),
    Readable("0.png", _one_image, _batch),
)  # fmt: skip


def try_files(random, count, scratch, advance=lambda words: None):
    """Damage each kind of file in ways that are drawn; yield (kind, verdict, words), the verdict "" for a fault."""
    good_folders: dict[Any, Path] = {}
    each = -(-count // len(READABLE))
    for readable in READABLE:
        good = good_folders.get(readable.make)
        if good is None:
            good = good_folders[readable.make] = scratch / f"good{len(good_folders)}"
            good.mkdir()
            readable.make(good)
        expected = run_in_child(functools.partial(readable.read, good))
        assert expected.end == "returned", f"{readable.file}: {expected.words}"
        for name, damage in damages((good / readable.file).read_bytes(), random, each):
            folder = scratch / "damaged"
            shutil.copytree(good, folder, symlinks=True)
            damage(folder / readable.file)
            outcome = run_in_child(functools.partial(readable.read, folder))
            if ran_code(folder):
                outcome = Outcome("ran code", words=outcome.words)
            shutil.rmtree(folder)
            yield readable.file, *_judge(readable, outcome, expected.value, name)
        advance(readable.file)


def _judge(readable, outcome, expected, name):
    if outcome.end == "returned":
        if outcome.value == expected:
            return "read as it was", name
        return ("" if readable.checked else "read as what it says now"), f"{name}: accepted though it differs"
    named = Path(readable.file).name.split("-ubyte")[0] in outcome.words or "damaged" in outcome.words
    if outcome.is_a("ValueError", "OSError", "TrainingError") and named:
        return "refused with its name", name
    return "", f"{name}: {outcome.end} {outcome.words[:300]}"
