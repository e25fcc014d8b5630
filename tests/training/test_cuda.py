"""Training on a GPU: in float64 what a CPU does, step for step."""

import dataclasses
import os
import shutil
import subprocess

import pytest
import torch

from normfree.errors import NotFiniteError
from normfree.training import RECIPES, train
from normfree.training.run.restored import evaluate_run
from tests.training.tiny import TINY, command, largest_difference, rows

pytestmark = pytest.mark.gpu

# Smooth: on the constant background of digits, standardized filters give zeros but for rounding, where ReLU has a kink.
EXACT = dataclasses.replace(
    TINY, model_args=("width=0.25", "skip_gain=0.5", "activation=silu"), precision="double",
    stochastic_depth_rate=0.0, accumulate=2, checkpoint_every=5, keep=9, ema=0.9, mixup=0.2, cutmix=1.0,
    clip_adaptive=0.01, signal_every=5, channels_last=True,
)  # fmt: skip
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "PreActivationBlock",
}


def run(recipe, out, *arguments, processes=0, **environment):
    """As processes of their own."""
    done = subprocess.run(
        command(recipe, out, *arguments, "--quiet", processes=processes), env=os.environ | environment,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    out = tmp_path_factory.mktemp("cpu") / "run"
    run(EXACT, out, ACCELERATE_USE_CPU="true")
    return out


def test_it_trains_as_a_cpu_does(on_cpu, tmp_path):
    """Averaged parameters, adaptive clipping, mixed labels, accumulation and the signal monitor with it."""
    train(EXACT, tmp_path / "run", quiet=True)
    for name in ("model.safetensors", "model_ema.safetensors"):
        found = largest_difference(on_cpu, tmp_path / "run", name)
        assert found < 1e-10, f"{name}: {found}"
    ours, theirs = ((out / "signal.csv").read_text().splitlines() for out in (tmp_path / "run", on_cpu))
    assert len(ours) == len(theirs) > 9
    assert float(ours[-1].split(",")[-1]) == pytest.approx(float(theirs[-1].split(",")[-1]), rel=1e-6)
    assert evaluate_run(tmp_path / "run").loss == pytest.approx(float(rows(tmp_path / "run")[-1]["loss"]), rel=1e-4)


def test_sharded_parameters_train_as_a_cpu_does_and_go_on_where_they_stopped(on_cpu, tmp_path):
    """Over all devices: the parts of a batch are as many as on the CPU only where there is one."""
    out, devices = tmp_path / "run", torch.cuda.device_count()
    recipe = dataclasses.replace(EXACT, accumulate=1)
    run(recipe, out, processes=devices, **SHARDED)
    for name in ("model.safetensors", "model_ema.safetensors"):
        found = largest_difference(on_cpu, out, name)
        assert found < 1e-10, f"{name}: {found}"
    first, *others = sorted((out / "checkpoints").glob("step_*"))
    assert (first / "pytorch_model_fsdp.bin").exists()
    for later in others:
        shutil.rmtree(later)
    run(recipe, out, "--resume", "auto", processes=devices, **SHARDED)
    for name in ("model.safetensors", "model_ema.safetensors"):
        found = largest_difference(on_cpu, out, name)
        assert found < 1e-10, f"{name}: {found}"


def test_it_goes_on_where_it_stopped(tmp_path):
    """The device's random numbers with it: those of dropout and stochastic depth."""
    recipe = dataclasses.replace(EXACT, stochastic_depth_rate=0.3, drop_rate=0.3, mixup=0.0, cutmix=0.0)
    out, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe, out, quiet=True)
    shutil.copytree(out, cut)
    for later in sorted((cut / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(later)
    train(recipe, cut, resume="auto", quiet=True)
    found = largest_difference(out, cut)
    assert found < 1e-10, found


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_precisions_learn(precision, tmp_path):
    recipe = dataclasses.replace(RECIPES["digits"], epochs=3, precision=precision, signal_every=20, channels_last=True)
    result = train(recipe, tmp_path / "run", quiet=True)
    assert result.accuracy.top1 > 80
    variances = [float(line.split(",")[5]) for line in (tmp_path / "run" / "signal.csv").read_text().splitlines()[1:]]
    assert 0 < min(variances) < max(variances) < 100


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_loss_that_is_not_finite_is_located(precision, tmp_path):
    recipe = dataclasses.replace(TINY, lr=1e8, warmup_epochs=0.0, precision=precision, epochs=9)
    with pytest.raises(NotFiniteError, match=r"is not finite; first of all, (the output of|a gradient)"):
        train(recipe, tmp_path / "run", quiet=True)
