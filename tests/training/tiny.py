"""Training of a second, as a process of its own too, and what it leaves."""

import csv
import dataclasses
import sys

from safetensors.torch import load_file

from normfree.training import RECIPES
from tests.helpers import assert_same_state

TINY = dataclasses.replace(
    RECIPES["digits"], model_args=("width=0.25",), epochs=1, batch=96, log_every=4, checkpoint_every=0
)


def rows(out):
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))


def assert_same_weights(a, b, name="model.safetensors"):
    """The parameters of two runs, bit for bit."""
    assert_same_state(load_file(b / name), load_file(a / name))


def largest_difference(a, b, name="model.safetensors"):
    """The largest one between the parameters of two runs, running statistics left out."""
    one, other = load_file(a / name), load_file(b / name)
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one if "running" not in key)


def command(recipe, out, *arguments, processes=0):
    """The recipe as a process of its own, or as so many of torchrun."""
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.parent / f"{out.name}.json"
    config.write_text(recipe.to_json())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    train = ["-m", "normfree", "train", "--from", str(config), "--out", str(out), *arguments]
    return [sys.executable, *torchrun, *train]
