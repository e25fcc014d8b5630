"""Trainings end to end: what they reach, leave behind, and survive."""

import csv
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from normfree.errors import TrainingError
from normfree.training import RECIPES, engine, evaluate_run, train
from normfree.training.data import Arrays, load
from normfree.training.faults import locate
from tests.training.tiny import TINY

RANDOM = dataclasses.replace(
    TINY, epochs=2, ema=0.9, mixup=0.2, cutmix=1.0, drop_rate=0.2, stochastic_depth_rate=0.2, checkpoint_every=4, seed=7
)


def rows(out):
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))


def same_weights(a, b, name="model.safetensors"):
    one, other = load_file(a / name), load_file(b / name)
    return all(torch.equal(one[key], other[key]) for key in one)


def command(recipe, out, *arguments):
    """The recipe as a process of its own."""
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.parent / f"{out.name}.json"
    config.write_text(recipe.to_json())
    return [sys.executable, "-m", "normfree", "train", "--from", str(config), "--out", str(out), *arguments]


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
    assert same_weights(whole, cut)
    assert same_weights(whole, cut, "model_ema.safetensors")
    bound = ("images_per_second",)
    assert [{k: v for k, v in r.items() if k not in bound} for r in rows(whole)] == [
        {k: v for k, v in r.items() if k not in bound} for r in rows(cut)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_writes_a_checkpoint_and_ends_well(number, tmp_path):
    """Asked with all of its processes, those that load images too, as schedulers and terminals ask."""
    out = tmp_path / "run"
    long = dataclasses.replace(TINY, epochs=500, log_every=1, workers=1)
    process = subprocess.Popen(
        command(long, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (out / "metrics.csv").exists() or len(rows(out)) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert "--resume auto goes on" in printed
    (step,) = (out / "checkpoints").iterdir()
    position = json.loads((step / "position.json").read_text())
    assert position["step"] == len([row for row in rows(out) if row["kind"] == "train"])


def test_one_process_two_and_accumulated_parts_train_alike(tmp_path):
    """Float64, 20 steps of unequal last size, to 1e-10; with BatchNorm the same cut changes the result."""
    double = dataclasses.replace(TINY, precision="double", batch=72, stochastic_depth_rate=0.0)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    train(double, tmp_path / "one", quiet=True)
    differences = {}
    for name, processes, parts in (("accumulated", 1, 4), ("two", 2, 1), ("two, accumulated", 2, 2)):
        recipe = dataclasses.replace(double, accumulate=parts)
        start = torchrun if processes == 2 else [sys.executable]
        subprocess.run(
            start + command(recipe, tmp_path / name, "--quiet")[1:], check=True, capture_output=True, timeout=120
        )
        one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("one", name))
        differences[name] = max((one[key] - other[key]).abs().max().item() for key in one)
    print(differences)
    assert max(differences.values()) < 1e-10, differences
    assert json.loads(next((tmp_path / "two" / "checkpoints").glob("*/position.json")).read_text())["parts"] == 2
    normalized = dataclasses.replace(double, model="bn_resnet26", epochs=1)
    for parts in (1, 4):
        train(dataclasses.replace(normalized, accumulate=parts), tmp_path / f"bn{parts}", quiet=True)
    one, other = (load_file(tmp_path / f"bn{parts}" / "model.safetensors") for parts in (1, 4))
    assert max((one[key] - other[key]).abs().max().item() for key in one if "running" not in key) > 1e-3


def test_parts_of_one_class_change_nothing_but_for_batch_norm(tmp_path):
    """The same batches, cut into parts of one class each or mixed: one normalizer-free network, two with BatchNorm."""
    differences = {}
    small = ("normfree.studies.small_resnets:CifarResNet", ("depth=8", "width=4"))
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
        one, other = (load_file(tmp_path / name / cut / "model.safetensors") for cut in ("by_class", "dealt"))
        differences[name] = max((one[key] - other[key]).abs().max().item() for key in one if "running" not in key)
    print(differences)
    assert max(differences["nf"], differences["converted"]) < 1e-10, differences
    assert min(differences["bn"], differences["unconverted"]) > 1e-3, differences


def test_a_process_that_dies_ends_the_others_and_one_goes_on(tmp_path):
    out = tmp_path / "run"
    recipe = dataclasses.replace(TINY, epochs=40, checkpoint_every=3)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        start + command(recipe, out, "--quiet")[1:], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not list(out.glob("checkpoints/step_*")):
        assert process.poll() is None
        time.sleep(0.1)
    psutil.Process(process.pid).children()[-1].kill()
    begin = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert process.returncode != 0
    assert "normfree: " in told or "Signal 9" in told
    # One process goes on where two stopped.
    done = max(int(path.name.split("_")[1]) for path in out.glob("checkpoints/step_*"))
    alone = subprocess.Popen(command(recipe, out, "--resume", "auto"), stderr=subprocess.PIPE, text=True)
    for line in alone.stderr:
        if line.startswith("step "):
            break
    alone.kill()
    alone.communicate()
    assert int(line.split()[1].rstrip(":")) > done


def test_a_loss_that_is_not_finite_names_the_step_the_layer_and_the_checkpoint(tmp_path):
    wild = dataclasses.replace(TINY, lr=1e6, warmup_epochs=0.5, checkpoint_every=1)
    with pytest.raises(
        TrainingError, match=r"of step \d+ is not finite; first of all, the (norm|output|gradient).*step_0"
    ):
        train(wild, tmp_path / "stop", quiet=True)
    result = train(dataclasses.replace(wild, on_nonfinite="skip"), tmp_path / "skip", quiet=True)
    assert result.finished
    weights = load_file(tmp_path / "skip" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_a_step_that_is_left_out_leaves_nothing(tmp_path):
    recipe = dataclasses.replace(TINY, model="bn_resnet26", on_nonfinite="skip")

    def overflow(module, args):
        if module.training and next(calls) == 3:
            return (args[0] * torch.inf,)
        return args

    calls = itertools.count()
    original = engine.Setup._prepare

    def prepare(setup):
        setup.model.register_forward_pre_hook(overflow)
        original(setup)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Setup, "_prepare", prepare)
        result = train(recipe, tmp_path / "burst", quiet=True)
    assert result.accuracy.loss == pytest.approx(result.accuracy.loss)  # not NaN
    state = load_file(tmp_path / "burst" / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in state.values())


def test_checkpoints_of_which_none_is_whole_are_not_begun_over(tmp_path):
    out = tmp_path / "run"
    train(dataclasses.replace(TINY, checkpoint_every=4), out, quiet=True)
    before = rows(out)
    for path in (out / "checkpoints").glob("step_*"):
        (path / "position.json").write_text("{}")
    with pytest.raises(TrainingError, match="and no other is whole"):
        train(dataclasses.replace(TINY, checkpoint_every=4), out, resume="auto", quiet=True)
    assert rows(out) == before


def test_where_it_first_went_wrong():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    x = torch.tensor([[1.0, float("inf")]])
    assert locate(model, lambda: model(x).sum()) == (0, "the output of 0 (Linear)")
    ones = torch.ones(1, 2)
    with torch.no_grad():
        model[2].bias.fill_(4.0)
        model[2].weight.zero_()
    assert "the gradient at the output of 2" in locate(model, lambda: (model(ones) - 4).abs().sqrt().sum()).words
    assert locate(model, lambda: model(ones).sum() / 0).words == "the loss, of outputs that are finite"
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    assert locate(model, lambda: model(ones).sum()).words == "the parameter 0.bias"


class Broken(Arrays):
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


def test_what_does_not_go_on(tmp_path):
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
    smaller = dataclasses.replace(whole, train=Arrays(whole.train.images[:-5], whole.train.labels[:-5]))
    with pytest.raises(ValueError, match="has 1433 training images, but had 1438"):
        train(TINY, out, resume="auto", quiet=True, data=smaller)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        train(TINY, tmp_path / "file", quiet=True)
