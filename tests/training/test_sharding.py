"""Parameters sharded over two processes train like whole ones on one."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.utils import adaptive_clip_grad
from torch import nn

from normfree.errors import TrainingError
from normfree.training import RECIPES, train
from normfree.training.step import clip_adaptive
from tests.helpers import assert_equal
from tests.training.tiny import assert_same_weights, largest_difference

pytestmark = pytest.mark.slow

RECIPE = dataclasses.replace(
    RECIPES["digits"], model_args=("width=0.25", "skip_gain=0.5"), epochs=1, batch=72, stochastic_depth_rate=0.0,
    precision="double", checkpoint_every=10, ema=0.9, mixup=0.2, cutmix=1.0, clip_adaptive=0.01, signal_every=9,
    channels_last=True,
)  # fmt: skip
BY_BLOCK = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "PreActivationBlock"}


SHARDED = [str(Path(__file__).with_name("fsdp_on_cpus.py"))]


def train_on_two(recipe, out, *arguments, start=SHARDED, **environment):
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.parent / f"{out.name}.json"
    config.write_text(recipe.to_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *start]
    command += ["train", "--from", str(config), "--out", str(out), "--quiet", *arguments]
    told = {"OMP_NUM_THREADS": "1"}
    if start is SHARDED:
        told |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    told |= environment
    return subprocess.run(command, env=os.environ | told, capture_output=True, text=True, timeout=200, check=False)


def test_it_trains_like_one_process_and_goes_on_where_it_stopped(tmp_path):
    """Averaged parameters, adaptive clipping, mixed labels and the signal monitor with it; float64, to 1e-12."""
    train(RECIPE, tmp_path / "whole", quiet=True)
    out = tmp_path / "sharded"
    done = train_on_two(RECIPE, out, **BY_BLOCK)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "model_ema.safetensors"):
        found = largest_difference(tmp_path / "whole", out, name)
        assert found < 1e-12, f"{name}: {found}"
    assert (out / "signal.csv").read_text().count("\n") == (tmp_path / "whole" / "signal.csv").read_text().count("\n")
    # Killed after step 10.
    cut = tmp_path / "cut"
    shutil.copytree(out, cut, ignore=shutil.ignore_patterns("step_00000020"))
    for weights in cut.glob("model*"):
        weights.unlink()
    with pytest.raises(TrainingError, match="was written with sharded parameters"):
        train(RECIPE, cut, resume="auto", quiet=True)
    done = train_on_two(RECIPE, cut, "--resume", "auto", **BY_BLOCK)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "model_ema.safetensors"):
        assert_same_weights(out, cut, name)


def test_mixed_precision_is_that_of_whole_parameters(tmp_path):
    """Bit for bit that of two processes: weights are rounded after they are standardized."""
    recipe = dataclasses.replace(RECIPE, precision="bf16", clip_adaptive=0.0, channels_last=False)
    for name, start in (("sharded", SHARDED), ("whole", ["-m", "normfree"])):
        done = train_on_two(recipe, tmp_path / name, start=start)
        assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "model_ema.safetensors"):
        assert_same_weights(tmp_path / "whole", tmp_path / "sharded", name)


def test_a_converted_network_trains_sharded_like_one_process(tmp_path):
    recipe = dataclasses.replace(
        RECIPE, model="normfree.studies.cifar_resnets:CifarResNet", model_args=("depth=8", "width=4"), convert=True,
        ema=0.0, clip_adaptive=0.0, clip_norm=0.5, accumulate=2,
    )  # fmt: skip
    train(recipe, tmp_path / "whole", quiet=True)
    done = train_on_two(recipe, tmp_path / "sharded")
    assert done.returncode == 0, done.stderr
    found = largest_difference(tmp_path / "whole", tmp_path / "sharded")
    assert found < 1e-12, found


@pytest.mark.parametrize(
    ("changes", "environment", "words"),
    [
        ({"lr": 1e6, "warmup_epochs": 0.0}, {}, r"of step \d+ is not finite; first of all, (the output of|a gradient)"),
        ({}, {"FSDP_VERSION": "1"}, "only FSDP 2 is supported"),
        ({}, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "launch without --fsdp_activation_checkpointing"),
    ],
    ids=["not finite", "version 1", "activation checkpointing"],
)
def test_what_goes_wrong_ends_all_processes(changes, environment, words, tmp_path):
    done = train_on_two(dataclasses.replace(RECIPE, **changes), tmp_path / "run", **environment)
    assert done.returncode != 0
    assert re.search(f"normfree: .*{words}", done.stderr), done.stderr


def test_adaptive_clipping_is_timm_s():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    theirs.load_state_dict(ours.state_dict())
    nn.init.zeros_(ours[0].bias)
    nn.init.zeros_(theirs[0].bias)
    images = torch.randn(8, 3, 6, 6)
    for model in (ours, theirs):
        model(images).square().sum().backward()
    before = [parameter.grad.clone() for parameter in ours.parameters()]
    clip_adaptive(ours.parameters(), 0.05)
    adaptive_clip_grad(theirs.parameters(), 0.05)
    for one, other, unclipped in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert_equal(one.grad, other.grad)
        assert not torch.equal(one.grad, unclipped), f"{unclipped} is not clipped, shape {tuple(unclipped.shape)}"
