"""The network of a run's folder, to be used and tested again."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from normfree.arguments import checked
from normfree.conversion.replacement import apply_plan
from normfree.errors import TrainingError
from normfree.training.build import build, image_sizes, load_weights, model_channels
from normfree.training.data import load
from normfree.training.data.batches import watching_workers
from normfree.training.data.datasets import Data
from normfree.training.data.transforms import Normalization
from normfree.training.evaluation import evaluate, testing_loader, too_many_unreadable
from normfree.training.metrics import Accuracy
from normfree.training.processes import accelerator_for
from normfree.training.run import folder
from normfree.training.run.checkpoint import find_damage


@checked
def load_run(run: str | Path, *, weights: str | Path | None = None, trusted_model: str | None = None) -> nn.Module:
    """Load the network of a run's folder, or of one of its checkpoints, in eval mode.

    Args:
        run: Folder of a run, or of one of its checkpoints.
        weights: Another .safetensors file than the folder's averaged weights or, where there are none, its last.
        trusted_model: The run's model again, where that is a function (package.module:factory): the folder may be
            somebody else's, and only a model that is named again is imported and called.

    Returns:
        The trained network.

    Raises:
        ValueError: For a folder that is no run's, and for a function that is not named again.
        FileNotFoundError: Where there are no weights.
        TrainingError: For weights that do not fit.
    """
    run, holder = _run_of(run), Path(run)
    recipe, described = folder.read_run(run)
    if ":" in recipe.model and not recipe.model.startswith(("timm:", "torchvision:")) and trusted_model != recipe.model:
        raise ValueError(
            f"{run} would import and call {recipe.model}: name it too, if you trust it (normfree eval {run} "
            f"--trusted-model {recipe.model}, or load_run({str(run)!r}, trusted_model={recipe.model!r}) in Python)"
        )
    if trusted_model not in (None, recipe.model):
        raise ValueError(f"trusted_model is {trusted_model}, but {run} is a run of {recipe.model}")
    network = build(recipe, described)
    if recipe.convert:
        apply_plan(folder.read_plan(run), network)
    if weights is None:
        weights = holder / ("model_ema.safetensors" if recipe.ema else "model.safetensors")
        if not weights.exists():
            other = f", or {holder / 'model.safetensors'}, which are not averaged" if recipe.ema else ""
            raise FileNotFoundError(
                f"{holder} holds no {weights.name}: its training has not ended (name a checkpoint, or "
                f"`weights`{other}), or it is a checkpoint of sharded parameters"
            )
    sealed = Path(weights).parent
    if (sealed / "position.json").exists() and (damage := find_damage(sealed)) is not None:
        raise TrainingError(f"{sealed} is damaged: {damage}; take another checkpoint")
    network.to(torch.float64 if recipe.precision == "double" else torch.float32)
    load_weights(network, weights)
    return network.eval()


def _run_of(path: str | Path) -> Path:
    """Find the run's folder, given itself or a checkpoint in it."""
    path = Path(path)
    return path.resolve().parents[1] if (path / "position.json").exists() else path


@checked
def evaluate_run(
    run: str | Path,
    *,
    data: str | Data | None = None,
    weights: str | Path | None = None,
    trusted_model: str | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Accuracy:
    """Test the network of a run's folder, or of one of its checkpoints, on the run's test set, or that of `data`.

    Args:
        run: Folder of a run, or of one of its checkpoints.
        data: Another data set, with the same classes, named as in a recipe or loaded already.
        weights: Another .safetensors file.
        trusted_model: The run's model again, as for `load_run`.
        advance: Function that is called with the number of batches done and their total.

    Returns:
        Accuracy and loss.

    Raises:
        ValueError: As `load_run` does, and for data with other classes.
        FileNotFoundError: Where there are no weights.
        TrainingError: Where more images cannot be read than the run's recipe allows.
    """
    recipe, known = folder.read_run(_run_of(run))
    network = load_run(run, weights=weights, trusted_model=trusted_model)
    tested = data if isinstance(data, Data) else load(data or recipe.data)
    if tested.classes != known.classes or (tested.names and known.names and tested.names != known.names):
        named = data if isinstance(data, str) else recipe.data
        raise ValueError(f"{named} has other classes than the network was trained on")
    with accelerator_for(replace(recipe, log=()), _run_of(run)) as accelerator:
        size, channels = image_sizes(recipe, network)[1], model_channels(network, known)
        normalized = Normalization(known, channels, next(network.parameters()).dtype)
        loaded = testing_loader(recipe, tested, size, channels, accelerator)
        with watching_workers(str), contextlib.closing(loaded) as batches:
            accuracy, unreadable = evaluate(
                network.to(accelerator.device), batches, accelerator, normalized, classes=known.classes, advance=advance
            )
    names = list(dict.fromkeys(unreadable))
    if len(names) > recipe.max_unreadable:
        raise TrainingError(too_many_unreadable(names, recipe.max_unreadable))
    for name in names:
        warnings.warn(f"cannot read {name}", stacklevel=2)
    return accuracy
