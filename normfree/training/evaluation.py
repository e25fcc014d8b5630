"""The test of a network: sums over every example of a data set, each counted once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from normfree.trace.preparation import in_eval_mode
from normfree.training.data.batches import Examples, Loader, Order, Parts, loader
from normfree.training.data.datasets import Data
from normfree.training.data.transforms import Normalization, testing_transform
from normfree.training.metrics import Accuracy, accumulator, accuracy_of, class_totals
from normfree.training.recipes import Recipe


def testing_loader(recipe: Recipe, data: Data, size: int, channels: int, accelerator: Any) -> Loader:
    """Load this process's part of the test set, in order, as images of `size` pixels.

    Batches are no larger than those of training, and of 256 images a process at most.
    """
    processes = accelerator.num_processes
    batch = min(max(recipe.batch // recipe.accumulate, processes), 256 * processes)
    order = Order(len(data.test), batch, processes, recipe.seed, shuffle=False)
    examples = Examples(data.test, testing_transform(data, size, channels), recipe.seed, training=False)
    parts = Parts(order, accelerator.process_index, processes)
    return loader(examples, parts, workers=recipe.workers, pin=accelerator.device.type == "cuda")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Loader,
    accelerator: Any,
    normalized: Normalization,
    *,
    classes: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Accuracy, list[str]]:
    """Test the network, in eval mode, on all processes' batches together; also name what could not be read.

    Its mode is restored. Buffers are first made those of the first process. `advance` is called with the number of
    batches done and their total.
    """
    from accelerate.utils import broadcast, gather_object

    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer))
    total = accumulator(classes, 4, device=accelerator.device)
    unreadable: list[str] = []
    with in_eval_mode(model):
        for done, batch in enumerate(batches, start=1):
            images = normalized(batch.images, accelerator.device)
            labels, weights = (t.to(accelerator.device) for t in batch[1:3])
            with accelerator.autocast():
                logits = model(images)
            total += class_totals(logits, labels, weights)
            unreadable += batch.unreadable
            advance(done, len(batches))
    return accuracy_of(accelerator.reduce(total, "sum")), gather_object(unreadable)


def too_many_unreadable(unreadable: Sequence[str], limit: int) -> str:
    """Say that more images cannot be read than are allowed to."""
    return f"{len(unreadable)} images cannot be read, more than max_unreadable={limit}: {', '.join(unreadable[:5])}, …"
