"""How good a network is: sums over every example of a data set, each counted once."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import Tensor, nn

from normfree.errors import TrainingError
from normfree.training import data as datasets
from normfree.training.batches import Batch, Examples, Order, Parts, loader
from normfree.training.model import build, model_channels, sizes
from normfree.training.recipe import Recipe
from normfree.training.transforms import testing_transform


@dataclass(frozen=True)
class Accuracy:
    """Of a network on a data set."""

    examples: int
    loss: float  # cross-entropy, per example
    top1: float  # percent
    top5: float


def totals(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sums over a batch, float64, (4,): weight, cross-entropy, right first guesses, right ones among five."""
    best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    losses = F.cross_entropy(logits.double(), labels, reduction="none")
    rows = torch.stack([torch.ones_like(losses), losses, best[:, 0].double(), best.any(1).double()])
    return (rows * weights.double()).sum(1)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], accelerator: Any, dtype: torch.dtype) -> Accuracy:
    """The network, in eval mode, on all processes' batches together; its mode is restored."""
    training = model.training
    model.eval()
    total = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    try:
        for batch in batches:
            images, labels, weights = (t.to(accelerator.device) for t in batch[:3])
            with accelerator.autocast():
                logits = model(images.to(dtype))
            total += totals(logits, labels, weights)
    finally:
        model.train(training)
    count, loss, first, five = accelerator.reduce(total, "sum").tolist()
    return Accuracy(round(count), loss / max(count, 1), 100 * first / max(count, 1), 100 * five / max(count, 1))


def evaluate_run(run: str | Path, *, data: str | None = None, weights: str | Path | None = None) -> Accuracy:
    """Test the network of a run's folder on the run's data, or on `data`.

    The weights are `weights`, or the averaged ones where there are any, or the last. Raises ValueError for a folder
    without a config.json and for data with other classes, FileNotFoundError where there are no weights, and
    TrainingError for weights that do not fit.
    """
    from accelerate import Accelerator

    run = Path(run)
    recipe = Recipe.from_json(run / "config.json")
    known = datasets.load(recipe.data)
    tested = known if data is None else datasets.load(data)
    if tested.classes != known.classes:
        raise ValueError(f"{data} has {tested.classes} classes, the network {known.classes}")
    model = build(recipe, known)
    if weights is None:
        found = [run / name for name in ("model_ema.safetensors", "model.safetensors")]
        weights = next((path for path in found if path.exists()), None)
        if weights is None:
            raise FileNotFoundError(f"{run} holds no model.safetensors: its training has not ended (name `weights`)")
    try:
        load_model(model, str(weights))
    except Exception as error:  # safetensors has an error of its own
        raise TrainingError(f"{weights} does not fit {recipe.model}: {error}") from error
    accelerator: Any = Accelerator()
    order = Order(len(tested.test), recipe.batch, accelerator.num_processes, recipe.seed, shuffle=False)
    transform = testing_transform(tested, sizes(recipe, model)[1], model_channels(model, known))
    batches = loader(
        Examples(tested.test, transform, recipe.seed, training=False),
        Parts(order, accelerator.process_index, accelerator.num_processes),
        workers=recipe.workers, pin=False,
    )  # fmt: skip
    return evaluate(model.to(accelerator.device), batches, accelerator, torch.float32)
