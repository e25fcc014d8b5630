"""Trainings end to end: what they reach, leave behind, and survive."""

import dataclasses
import errno
import itertools
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from normfree.errors import TrainingError
from normfree.training import RECIPES, evaluate_run, setup, train
from normfree.training.data.datasets import ArrayImages, load
from normfree.training.nonfinite import locate_nonfinite
from tests.training.tiny import TINY, assert_same_weights, command, largest_difference, rows

RANDOM = dataclasses.replace(
    TINY, epochs=2, ema=0.9, mixup=0.2, cutmix=1.0, drop_rate=0.2, stochastic_depth_rate=0.2, checkpoint_every=4, seed=7
)


@pytest.mark.slow
def test_digits_are_learned_and_a_run_is_a_folder(tmp_path):
    out = tmp_path / "run"
    result = train(dataclasses.replace(RECIPES["digits"], signal_every=50), out, quiet=True)
    assert result.finished
    assert result.accuracy.top1 > 80, f"{result.accuracy}"
    assert result.accuracy.examples == 359
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "data.json", "metrics.csv", "signal.csv", "checkpoints", "model.safetensors", "curves.png",
        "signal.png",
    }  # fmt: skip
    assert len(list((out / "checkpoints").iterdir())) == 2
    logged = rows(out)
    assert [row["step"] for row in logged if row["kind"] == "eval"] == ["90", "180", "270"]
    assert float(logged[-1]["top1"]) == pytest.approx(result.accuracy.top1)
    again = evaluate_run(out)
    assert again.top1 == pytest.approx(result.accuracy.top1)


@pytest.fixture
def two_threads(monkeypatch):
    """Here and in the processes that a test starts."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.slow
def test_killed_at_any_moment_and_taken_up_again_it_ends_the_same(tmp_path):
    """Optimizer, averaged weights, schedule, order, dropout, stochastic depth, mixup: bit for bit."""
    whole = tmp_path / "whole"
    train(RANDOM, whole, quiet=True)
    cut = tmp_path / "cut"
    for moment in (0.0, 0.4):
        process = subprocess.Popen(command(RANDOM, cut, "--resume", "auto", "--quiet"))
        before = len(list((cut / "checkpoints").glob("step_*"))) if cut.exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            newest = sorted((cut / "checkpoints").glob("step_*")) if cut.exists() else []
            if len(newest) > before or (before and newest and newest[-1].stat().st_mtime > time.time() - 0.5):
                break
            time.sleep(0.01)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert not (cut / "model.safetensors").exists()
    train(dataclasses.replace(RANDOM, workers=1), cut, resume="auto", quiet=True)
    assert_same_weights(whole, cut)
    assert_same_weights(whole, cut, "model_ema.safetensors")
    bound = ("images_per_second",)
    assert [{k: v for k, v in r.items() if k not in bound} for r in rows(whole)] == [
        {k: v for k, v in r.items() if k not in bound} for r in rows(cut)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_writes_a_checkpoint_and_ends_well(number, tmp_path):
    """Asked with all of its processes, those that load images too, as schedulers and terminals ask."""
    out = tmp_path / "run"
    long = dataclasses.replace(TINY, epochs=500, log_every=1, workers=1)
    process = subprocess.Popen(
        command(long, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120  # against hanging
    while not (out / "metrics.csv").exists() or len(rows(out)) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert "--resume auto goes on" in printed
    (step,) = (out / "checkpoints").iterdir()
    position = json.loads((step / "position.json").read_text())
    assert position["step"] == len([row for row in rows(out) if row["kind"] == "train"])


@pytest.mark.slow
def test_parts_of_one_class_change_nothing_but_for_batch_norm(tmp_path):
    """The same batches, cut into parts of one class each or mixed: one normalizer-free network, two with BatchNorm."""
    differences = {}
    small = ("normfree.studies.cifar_resnets:CifarResNet", ("depth=8", "width=4"))
    for name, (model, arguments), converted in (
        ("nf", ("nf_resnet26", TINY.model_args), False),
        ("bn", ("bn_resnet26", TINY.model_args), False),
        ("converted", small, True),
        ("unconverted", small, False),
    ):
        recipe = dataclasses.replace(
            TINY, model=model, model_args=arguments, convert=converted, precision="double", batch=64, accumulate=8,
            stochastic_depth_rate=0.0, lr=0.2,
        )  # fmt: skip
        for cut in ("by_class", "dealt"):
            train(dataclasses.replace(recipe, cut=cut), tmp_path / name / cut, quiet=True)
        differences[name] = largest_difference(tmp_path / name / "by_class", tmp_path / name / "dealt")
    print(differences)
    assert max(differences["nf"], differences["converted"]) < 1e-10, differences
    assert min(differences["bn"], differences["unconverted"]) > 1e-3, differences


def test_a_loss_that_is_not_finite_names_the_step_the_layer_and_the_checkpoint(tmp_path):
    wild = dataclasses.replace(TINY, lr=1e6, warmup_epochs=0.5, checkpoint_every=1)
    with pytest.raises(
        TrainingError, match=r"of step \d+ is not finite; first of all, the (norm|output|gradient).*step_0"
    ):
        train(wild, tmp_path / "stop", quiet=True)
    result = train(dataclasses.replace(wild, on_nonfinite="skip"), tmp_path / "skip", quiet=True)
    assert result.finished
    weights = load_file(tmp_path / "skip" / "model.safetensors")
    assert weights
    assert [name for name, value in weights.items() if not value.isfinite().all()] == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_that_fails_ends_with_the_processes_that_load_its_images(workers, tmp_path):
    wild = dataclasses.replace(TINY, lr=1e6, warmup_epochs=0.5, workers=workers)
    failed = subprocess.run(command(wild, tmp_path / "run"), capture_output=True, text=True, timeout=60, check=False)
    assert failed.returncode == 2
    assert "is not finite" in failed.stderr.splitlines()[-1]


def test_a_step_that_is_left_out_leaves_nothing(tmp_path, capsys):
    recipe = dataclasses.replace(TINY, model="bn_resnet26", on_nonfinite="skip")

    def overflow(module, args):
        if module.training and next(calls) == 3:
            return (args[0] * torch.inf,)
        return args

    calls = itertools.count()
    original = setup._build_model

    def build_model(*args):
        model = original(*args)
        model.register_forward_pre_hook(overflow)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "_build_model", build_model)
        result = train(recipe, tmp_path / "burst")
    assert capsys.readouterr().err.count("is not finite: the step is skipped") == 1
    assert math.isfinite(result.accuracy.loss)
    state = load_file(tmp_path / "burst" / "model.safetensors")
    assert sum("running_var" in name for name in state) > 9
    assert [name for name, value in state.items() if not value.isfinite().all()] == []


def test_checkpoints_of_which_none_is_whole_are_not_begun_over(tmp_path):
    out = tmp_path / "run"
    train(dataclasses.replace(TINY, checkpoint_every=4), out, quiet=True)
    before = rows(out)
    for path in (out / "checkpoints").glob("step_*"):
        (path / "position.json").write_text("{}")
    with pytest.raises(TrainingError, match="and no other is whole"):
        train(dataclasses.replace(TINY, checkpoint_every=4), out, resume="auto", quiet=True)
    assert rows(out) == before


def test_the_first_of_all_that_is_not_finite_is_located():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    x = torch.tensor([[1.0, float("inf")]])
    assert locate_nonfinite(model, lambda: model(x).sum()) == (0, "the output of 0 (Linear)")
    ones = torch.ones(1, 2)
    with torch.no_grad():
        model[2].bias.fill_(4.0)
        model[2].weight.zero_()
    assert (
        "the gradient at the output of 2" in locate_nonfinite(model, lambda: (model(ones) - 4).abs().sqrt().sum()).words
    )
    assert locate_nonfinite(model, lambda: model(ones).sum() / 0).words == "the loss, of outputs that are finite"
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    assert locate_nonfinite(model, lambda: model(ones).sum()).words == "the parameter 0.bias"


class Broken(ArrayImages):
    def __getitem__(self, index):
        if index % 100 == 1:
            raise OSError("truncated")
        return super().__getitem__(index)


def test_unreadable_images_are_named_and_counted(tmp_path, capsys):
    whole = load("digits")
    data = dataclasses.replace(whole, train=Broken(whole.train.images, whole.train.labels))
    result = train(TINY, tmp_path / "run", data=data)
    assert result.finished
    told = capsys.readouterr().err
    assert told.count("cannot read") == 15
    assert "image 101 (OSError)" in told
    with pytest.raises(TrainingError, match="more than max_unreadable=3"):
        train(dataclasses.replace(TINY, max_unreadable=3), tmp_path / "limit", quiet=True, data=data)


def test_unreadable_images_are_named_and_counted_by_eval(tmp_path, monkeypatch):
    train(dataclasses.replace(TINY, max_unreadable=3), tmp_path / "run", quiet=True)
    whole = load("digits")
    for last, spoiled in ((300, 3), (359, 4)):
        data = dataclasses.replace(whole, test=Broken(whole.test.images[:last], whole.test.labels[:last]))
        monkeypatch.setattr("normfree.training.run.restored.load", lambda spec, data=data: data)
        if spoiled > 3:
            with pytest.raises(TrainingError, match="4 images cannot be read, more than max_unreadable=3: image 1 "):
                evaluate_run(tmp_path / "run")
        else:
            with pytest.warns(UserWarning, match=r"cannot read image \d+ \(OSError\)"):
                assert evaluate_run(tmp_path / "run").examples == last - spoiled


def test_a_disk_that_is_full_at_the_end_leaves_the_files_before(tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(TINY, out, quiet=True)
    before = (out / "model.safetensors").read_bytes()

    def full(weights, path, **arguments):
        path.write_bytes(before[:100])
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("normfree.files.tensors.save_file", full)
        with pytest.raises(TrainingError, match=r"cannot write .*model\.safetensors: No space left"):
            train(TINY, out, resume="auto", quiet=True)
    assert (out / "model.safetensors").read_bytes() == before

    def full_of_charts(path, content):
        before_it_is_full(path, content[:7] if path.suffix == ".png" else content)
        if path.suffix == ".png":
            raise OSError(errno.ENOSPC, "No space left on device")

    before_it_is_full = Path.write_bytes

    chart = (out / "curves.png").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_of_charts)
        with pytest.raises(TrainingError, match=r"cannot write .*curves\.png: .*No space left"):
            train(TINY, out, resume="auto", quiet=True)
    assert (out / "curves.png").read_bytes() == chart
    assert not list(out.glob("new.*"))


def test_a_run_of_another_recipe_or_data_does_not_go_on(tmp_path):
    out = tmp_path / "run"
    train(TINY, out, quiet=True)
    with pytest.raises(ValueError, match="holds a run already"):
        train(TINY, out, quiet=True)
    with pytest.raises(ValueError, match=r"lr is 0\.2, was 0\.4"):
        train(dataclasses.replace(TINY, lr=0.2), out, resume="auto", quiet=True)
    others = dataclasses.replace(TINY, log_every=2, accumulate=2, on_nonfinite="skip", max_unreadable=1)
    assert train(others, out, resume="auto", quiet=True).accuracy is not None
    (out / "config.json").rename(out / "elsewhere.json")
    with pytest.raises(ValueError, match=r"no config\.json"):
        train(TINY, out, resume="auto", quiet=True)
    (out / "elsewhere.json").rename(out / "config.json")
    whole = load("digits")
    smaller = dataclasses.replace(whole, train=ArrayImages(whole.train.images[:-5], whole.train.labels[:-5]))
    known = (out / "data.json").read_bytes()
    for changed, words in (
        (smaller, "digits has 1433 training images, but had 1438 when"),
        (dataclasses.replace(whole, test=smaller.train), "has 1433 test images, but had 359 when"),
        (dataclasses.replace(whole, classes=11, names=()), "has 11 classes, but had 10; other names when"),
    ):
        with pytest.raises(ValueError, match=words):
            train(TINY, out, resume="auto", quiet=True, data=changed)
    assert (out / "data.json").read_bytes() == known
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        train(TINY, tmp_path / "file", quiet=True)
