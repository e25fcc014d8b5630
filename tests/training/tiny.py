"""A training of a second, as a process of its own too, and what it leaves."""

import csv
import dataclasses
import sys

import torch
from safetensors.torch import load_file

from normfree.training import RECIPES

TINY = dataclasses.replace(
    RECIPES["digits"], model_args=("width=0.25",), epochs=1, batch=96, log_every=4, checkpoint_every=0
)


def rows(out):
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))


def same_weights(a, b, name="model.safetensors"):
    one, other = load_file(a / name), load_file(b / name)
    return all(torch.equal(one[key], other[key]) for key in one)


def command(recipe, out, *arguments, processes=0):
    """The recipe as a process of its own, or as so many of torchrun."""
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.parent / f"{out.name}.json"
    config.write_text(recipe.to_json())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    train = ["-m", "normfree", "train", "--from", str(config), "--out", str(out), *arguments]
    return [sys.executable, *torchrun, *train]
