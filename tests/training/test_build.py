"""Networks of trainings: anybody's, converted, tested and taken up again from a run's folder."""

import dataclasses
import json
import random
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file

from normfree.cli.arguments import network_factory
from normfree.errors import TrainingError
from normfree.training import evaluate_run, load_run, train
from normfree.training.build import build, check_runs, classifiers
from normfree.training.data.datasets import hold_out, load
from normfree.training.processes import accelerator_for
from normfree.training.run.curves import read_curves
from normfree.training.setup import prepare
from tests.helpers import assert_equal, assert_same_state
from tests.training.tiny import TINY, assert_same_weights, largest_difference, rows


@pytest.mark.parametrize("model", ["timm:resnet18", "torchvision:resnet18", "nf_regnet_b0"])
def test_other_people_s_models_train(model, tmp_path):
    arguments = {"nf_regnet_b0": ("width=0.25",)}.get(model, ())
    recipe = dataclasses.replace(
        TINY, model=model, model_args=arguments, batch=128, train_images=256, stochastic_depth_rate=None,
        channels_last=True, precision="bf16", clip_adaptive=0.01,
    )  # fmt: skip
    assert train(recipe, tmp_path / "run", quiet=True).finished


def test_precisions_may_follow_each_other_in_a_process(tmp_path):
    for precision in ("bf16", "no", "double"):
        out = tmp_path / precision
        train(dataclasses.replace(TINY, precision=precision, batch=720), out, quiet=True)
        assert evaluate_run(out).examples == 359


def test_a_function_of_a_package_is_not_called_for_a_strangers_folder(tmp_path, monkeypatch):
    (tmp_path / "a_stranger_s.py").write_text(
        "from normfree import create_model\n\n"
        "def net():\n    return create_model('nf_resnet26', width=0.25, num_classes=10, in_channels=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    train(dataclasses.replace(TINY, model="a_stranger_s:net", model_args=(), batch=720), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="would import and call a_stranger_s:net"):
        evaluate_run(tmp_path / "run")
    assert evaluate_run(tmp_path / "run", trusted_model="a_stranger_s:net").examples == 359


@pytest.mark.slow
def test_a_converted_network_trains_and_goes_on(tmp_path):
    recipe = dataclasses.replace(
        TINY, model="timm:resnet10t", model_args=(), convert=True, batch=256, lr=0.01, epochs=2
    )
    whole = train(recipe, tmp_path / "run", quiet=True)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert not any("running_mean" in name for name in weights)
    assert sum(name.endswith("in_scale") for name in weights) > 8
    assert evaluate_run(tmp_path / "run") == whole.accuracy
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000012")
    again = train(recipe, tmp_path / "run", resume="auto", quiet=True)
    assert again.accuracy == whole.accuracy
    with pytest.raises(ValueError, match="nothing in NFResNet can be converted"):
        train(dataclasses.replace(TINY, convert=True), tmp_path / "other", quiet=True)


def test_a_trained_network_is_converted_and_trained_on(tmp_path):
    """From its weights, by the project's own example, a part of the images at a time."""
    narrow = dataclasses.replace(
        TINY, model="normfree.studies.cifar_resnets:CifarResNet", model_args=("depth=8", "width=4"), train_images=240
    )
    train(narrow, tmp_path / "original", quiet=True)
    weights = tmp_path / "original" / "model.safetensors"
    converted = dataclasses.replace(
        narrow, initial=str(weights), convert=True, convert_args=("alpha=0.5",), lr=0.0, weight_decay=0.0
    )
    result = train(converted, tmp_path / "converted", quiet=True)
    assert result.step == 3  # 240 images, 96 at a time
    before, after = load_file(weights), load_file(tmp_path / "converted" / "model.safetensors")
    assert_equal(after["fc.weight"], before["fc.weight"])
    assert after["layers.0.0.conv2.out_scale"] == 0.5
    with pytest.raises(FileNotFoundError, match=r"there is no file none\.safetensors"):
        train(dataclasses.replace(converted, initial="none.safetensors"), tmp_path / "a", quiet=True)
    with pytest.raises(TrainingError, match="does not fit CifarResNet"):
        train(dataclasses.replace(converted, model_args=("depth=14", "width=4")), tmp_path / "b", quiet=True)
    with pytest.raises(ValueError, match=r"cannot be converted: .*'alhpa'"):
        train(dataclasses.replace(converted, convert_args=("alhpa=1",)), tmp_path / "c", quiet=True)
    with pytest.raises(ValueError, match="train_images is 2400; there are 1438"):
        train(dataclasses.replace(converted, train_images=2400), tmp_path / "d", quiet=True)
    with pytest.raises(ValueError, match="convert_args are given, but convert is not"):
        dataclasses.replace(converted, convert=False)


@pytest.mark.slow
def test_the_example_of_fine_tuning_says_the_accuracy_of_each_kind(tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[2] / "examples" / "finetune_converted.py"
    arguments = ["--epochs", "0.5", "--then", "0.25", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [example.name, *arguments])
    runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    number = r"\d+\.\d %"
    assert re.search(f"seed 0: with BatchNorm, 0.5 epochs: {number}", said)
    kinds = rf"{number} \(its function kept\), {number} \(its weights kept\), {number} \(new\)"
    assert re.search(f"  converted, 0.25 epochs: {kinds}", said)
    shortened = json.loads((tmp_path / "seed_0" / "function_0.25" / "config.json").read_text())
    assert shortened["train_images"] == 360


def test_models_that_cannot_be_built_are_refused_and_named(tmp_path):
    for changes, words in (
        ({"model": "nf_resnet27"}, "no model is called"),
        ({"model_args": ("widht=1",)}, "no argument 'widht'"),
        ({"model": "torchvision:resnet18", "model_args": ("width=1",)}, "cannot be built"),
        ({"model": "torchvision:resnet18", "drop_rate": 0.2}, "has no such argument"),
        ({"model_args": ("num_classes=3",)}, "which the data decides"),
        ({"model": "os:getcwd", "model_args": ()}, "made a str"),
        ({"auto_augment": "nonsense"}, "auto_augment is 'nonsense'"),
        ({"precision": "fp16"}, "in which CPUs do not train"),
    ):
        with pytest.raises(ValueError, match=words):
            train(dataclasses.replace(TINY, **changes), tmp_path / "run", quiet=True)


def test_classifiers_are_found_where_there_is_one_none_named_and_two():
    linear = dataclasses.replace(TINY, model="timm:vgg11", model_args=())
    model = build(dataclasses.replace(linear, stochastic_depth_rate=0.0), load("digits"))
    assert classifiers(model)[0].out_features == 10
    (last,) = classifiers(build(dataclasses.replace(linear, model="torchvision:resnet18"), load("digits")))
    assert last.out_features == 10
    distilled = build(
        dataclasses.replace(linear, model="timm:deit_tiny_distilled_patch16_224", stochastic_depth_rate=None),
        load("digits"),
    )
    assert [head.out_features for head in classifiers(distilled)] == [10, 10]


def test_a_run_is_tested_on_other_data_by_the_numbers_of_its_own(tmp_path):
    train(TINY, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="is a run of nf_resnet26"):
        evaluate_run(tmp_path / "run", trusted_model="timm:resnet18")
    digits = load("digits")
    for part, images in (("train", digits.train), ("val", digits.test)):
        for i in range(len(images)):
            image, label = images[i]
            folder = tmp_path / "folder" / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
    # The same images: what they are normalized by is what the network was trained with.
    files, arrays = (evaluate_run(tmp_path / "run", data=d) for d in (f"imagefolder:{tmp_path / 'folder'}", None))
    assert files.examples == arrays.examples
    assert files.loss == pytest.approx(arrays.loss, rel=1e-3)


def test_a_run_s_network_is_had_without_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = load("digits")
    for part, images in (("train", digits.train), ("val", digits.test)):
        for i in range(60):
            image, label = images[i]
            folder = tmp_path / "photographs" / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
    recipe = dataclasses.replace(TINY, data="imagefolder:photographs", ema=0.5, batch=30)
    result = train(recipe, tmp_path / "run", quiet=True)
    (tmp_path / "photographs").rename(tmp_path / "moved")
    assert evaluate_run("run", data="imagefolder:moved") == result.accuracy
    with pytest.raises(FileNotFoundError, match="no folder photographs"):
        evaluate_run("run")
    network, expected = load_run("run"), load_file(tmp_path / "run" / "model_ema.safetensors")
    assert not network.training
    assert_same_state(network.state_dict(), expected)
    images = torch.ones(1, 3, 32, 32)
    (last,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    for name in ("run", str(last)):
        assert_equal(network_factory(name)()(images), network(images), name)
    spoiled = last / "model_ema.safetensors"
    spoiled.write_bytes(spoiled.read_bytes()[:-4] + bytes(4))
    for refused in ({"run": last}, {"run": "run", "weights": spoiled}):
        with pytest.raises(TrainingError, match=r"is damaged: model_ema\.safetensors is not what was written"):
            load_run(**refused)
    (tmp_path / "run" / "model_ema.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model_ema\.safetensors.*or run/model\.safetensors, which are not"):
        load_run("run")
    (tmp_path / "run" / "data.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no data\.json of a run"):
        load_run("run")


@pytest.mark.slow
def test_the_checkpoints_of_a_run_are_tested_too(tmp_path):
    recipe = dataclasses.replace(TINY, epochs=2, lr=0.05, ema=0.5, convert=True, model="timm:resnet18", model_args=())
    train(recipe, tmp_path / "run", quiet=True)
    first, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    logged = [float(row["top1"]) for row in rows(tmp_path / "run") if row["kind"] == "eval_ema"]
    assert [evaluate_run(path).top1 for path in (first, last)] == pytest.approx(logged)
    assert evaluate_run(tmp_path / "run") == evaluate_run(last)
    assert evaluate_run(first, weights=last / "model_ema.safetensors") == evaluate_run(last)


@pytest.mark.parametrize(
    ("model", "arguments"), [("nf_resnet26", TINY.model_args), ("timm:nf_resnet26", ()), ("timm:nfnet_f0", ())]
)
def test_gains_do_not_decay(model, arguments, tmp_path):
    recipe = dataclasses.replace(TINY, model=model, model_args=arguments)
    with accelerator_for(recipe, tmp_path) as accelerator:
        setup = prepare(recipe, accelerator, load("digits"))
    decaying = {
        id(p) for group in setup.optimizer.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]
    }
    names = {name.rpartition(".")[2] for name, p in setup.network.model.named_parameters() if id(p) in decaying}
    assert names == {"weight"}


def ten_classes_more(num_classes, in_channels):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes + 10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "timm:vit_tiny_patch16_224"}, "does not run on training images of 32 pixels"),
        ({"model": "torchvision:vgg11", "image_size": 64, "test_size": 16}, "does not run on testing images of 16"),
        ({"model": "timm:resnet18", "model_args": ("width=0.25",)}, "model_args, all of them the recipe's"),
        ({"model": "tests.training.test_build:ten_classes_more"}, r"gives \(2, 20\) in training, not logits \(2 i"),
        ({"model": "torchvision:googlenet"}, "gives a GoogLeNetOutputs in training, not logits"),
    ],
)
def test_a_model_that_cannot_be_trained_is_found_before_anything_is_written(changes, message, tmp_path):
    recipe = dataclasses.replace(TINY, **{"model_args": (), "stochastic_depth_rate": 0.0} | changes)
    with pytest.raises((TrainingError, ValueError), match=message):
        train(recipe, tmp_path / "run", quiet=True)
    assert train(dataclasses.replace(TINY, batch=720), tmp_path / "run", quiet=True).finished


def test_a_trial_run_leaves_every_module_in_its_own_mode_and_its_buffers_as_they_were():
    """A BatchNorm that its user has frozen stays frozen."""
    model = torchvision.models.resnet18(num_classes=10).train()
    model.bn1.eval()
    before = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    check_runs(model, "resnet18", torch.zeros(2, 3, 32, 32), 32, 10)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def drawn_from_numpy(num_classes, in_channels):
    model = torch.nn.Sequential(torch.nn.Conv2d(in_channels, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model.append(torch.nn.Linear(4, num_classes))
    with torch.no_grad():
        model[0].bias.copy_(torch.from_numpy(np.random.randn(4)))
        model[3].bias.fill_(random.random())
    return model


def test_a_model_that_draws_from_numpy_or_python_is_decided_by_the_recipe(tmp_path):
    recipe = dataclasses.replace(
        TINY, model="tests.training.test_build:drawn_from_numpy", model_args=(), train_images=96,
        stochastic_depth_rate=None,
    )  # fmt: skip
    for name in ("first", "second"):
        train(recipe, tmp_path / name, quiet=True)
    assert_same_weights(tmp_path / "first", tmp_path / "second")
    train(dataclasses.replace(recipe, seed=1), tmp_path / "other", quiet=True)
    assert largest_difference(tmp_path / "first", tmp_path / "other") > 1e-3


def test_what_is_chosen_by_validation_images_is_tested_once_on_others(tmp_path):
    recipe = dataclasses.replace(TINY, test_on="validation")
    result = train(recipe, tmp_path / "run", quiet=True)
    held, data = hold_out(load("digits")), load("digits")
    assert result.accuracy.examples == len(held.test) == len(data.train) - len(held.train)
    found = evaluate_run(tmp_path / "run")
    assert found.examples == len(data.test)
    assert found == evaluate_run(tmp_path / "run", data=data)
    assert 0 <= found.balanced <= 100
    assert {point["of"] for point in read_curves(tmp_path / "run")} == {"training", "validation"}
    with pytest.raises(ValueError, match="test_on is 'test', was 'validation'"):
        train(dataclasses.replace(recipe, test_on="test"), tmp_path / "run", resume="auto", quiet=True)
    with pytest.raises(ValueError, match="test_on"):
        dataclasses.replace(recipe, test_on="training")
