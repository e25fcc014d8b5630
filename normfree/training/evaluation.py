"""How good a network is: sums over every example of a data set, each counted once."""

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.conversion import Plan
from normfree.errors import TrainingError
from normfree.training.build import build, load_weights, model_channels, sizes
from normfree.training.data import datasets
from normfree.training.data.batches import Batch, Examples, Parts, loader
from normfree.training.data.transforms import Normalization, testing_transform
from normfree.training.run import folder
from normfree.training.setup import accelerated, testing_order


@dataclass(frozen=True)
class Accuracy:
    """Of a network on a data set."""

    examples: int
    loss: float  # cross-entropy, per example
    top1: float  # percent
    top5: float


def accumulator(size: int, device: torch.device) -> Tensor:
    """Zeros to sum up in, float64 where the device has it."""
    return torch.zeros(size, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def totals(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sums over a batch, (4,): weight, cross-entropy, right first guesses, right ones among five."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    losses = F.cross_entropy(logits, labels, reduction="none")
    rows = torch.stack([torch.ones_like(losses), losses, best[:, 0].to(losses), best.any(1).to(losses)])
    return (rows * weights.to(losses)).sum(1)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], accelerator: Any, normalized: Normalization
) -> tuple[Accuracy, list[str]]:
    """The network, in eval mode, on all processes' batches together, and what could not be read.

    Its mode is restored. Buffers are first made those of the first process.
    """
    from accelerate.utils import broadcast, gather_object

    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer))
    training = model.training
    model.eval()
    total = accumulator(4, accelerator.device)
    unreadable: list[str] = []
    try:
        for batch in batches:
            images = normalized(batch.images, accelerator.device)
            labels, weights = (t.to(accelerator.device) for t in batch[1:3])
            with accelerator.autocast():
                logits = model(images)
            total += totals(logits, labels, weights)
            unreadable += batch.unreadable
    finally:
        model.train(training)
    count, loss, first, five = accelerator.reduce(total, "sum").tolist()
    read = max(count, 1)
    return Accuracy(round(count), loss / read, 100 * first / read, 100 * five / read), gather_object(unreadable)


def too_many(unreadable: Sequence[str], limit: int) -> str:
    """In words: more images cannot be read than are allowed to."""
    return f"{len(unreadable)} images cannot be read, more than max_unreadable={limit}: {', '.join(unreadable[:5])}, …"


def load_run(run: str | Path, *, weights: str | Path | None = None, model: str | None = None) -> nn.Module:
    """The network of a run's folder, or of one of its checkpoints, in eval mode.

    The weights are `weights`, or the folder's: the averaged ones where there are any, else the last. A network that is
    made by a function (package.module:factory) is only made if `model` says the same: the folder may be somebody
    else's.

    Raises ValueError for a folder that is no run's and for such a network; FileNotFoundError where there are no
    weights, and TrainingError for weights that do not fit.
    """
    run, holder = _run_of(run), Path(run)
    recipe, described = folder.read(run)
    if ":" in recipe.model and not recipe.model.startswith(("timm:", "torchvision:")) and model != recipe.model:
        raise ValueError(
            f"{run} would import and call {recipe.model}: name it as the model too, if you trust it "
            f"(normfree eval {run} --model {recipe.model}, or load_run({str(run)!r}, model={recipe.model!r}) in Python)"
        )
    if model not in (None, recipe.model):
        raise ValueError(f"model is {model}, but {run} is a run of {recipe.model}")
    network = build(recipe, described)
    if recipe.convert:
        Plan.from_json((run / folder.PLAN).read_text(encoding="utf-8")).apply(network)
    if weights is None:
        found = [holder / name for name in ("model_ema.safetensors", "model.safetensors")]
        weights = next((path for path in found if path.exists()), None)
        if weights is None:
            raise FileNotFoundError(
                f"{holder} holds no model.safetensors: its training has not ended (name a checkpoint, or `weights`), "
                "or it is a checkpoint of sharded parameters"
            )
    network.to(torch.float64 if recipe.precision == "double" else torch.float32)
    load_weights(network, weights)
    return network.eval()


def _run_of(path: str | Path) -> Path:
    """The run's folder, of itself or of a checkpoint in it."""
    path = Path(path)
    return path.resolve().parents[1] if (path / "position.json").exists() else path


def evaluate_run(
    run: str | Path, *, data: str | None = None, weights: str | Path | None = None, model: str | None = None
) -> Accuracy:
    """Test the network of a run's folder, or of one of its checkpoints, on the run's data, or on `data`.

    `weights` and `model` are those of `load_run`. Raises what `load_run` does, ValueError for data with other classes,
    and TrainingError where more images cannot be read than the run's recipe allows.
    """
    recipe, known = folder.read(_run_of(run))
    network = load_run(run, weights=weights, model=model)
    tested = datasets.load(data or recipe.data)
    if tested.classes != known.classes or (tested.names and known.names and tested.names != known.names):
        raise ValueError(f"{data or recipe.data} has other classes than the network was trained on")
    with accelerated(replace(recipe, log=()), _run_of(run)) as accelerator:
        order = testing_order(recipe, tested, accelerator.num_processes)
        size, channels = sizes(recipe, network)[1], model_channels(network, known)
        examples = Examples(tested.test, testing_transform(tested, size, channels), recipe.seed, training=False)
        parts = Parts(order, accelerator.process_index, accelerator.num_processes)
        normalized = Normalization(known, channels, next(network.parameters()).dtype)
        with contextlib.closing(loader(examples, parts, workers=recipe.workers, pin=False)) as batches:
            accuracy, unreadable = evaluate(network.to(accelerator.device), batches, accelerator, normalized)
    names = list(dict.fromkeys(unreadable))
    if len(names) > recipe.max_unreadable:
        raise TrainingError(too_many(names, recipe.max_unreadable))
    for name in names:
        warnings.warn(f"cannot read {name}", stacklevel=2)
    return accuracy
