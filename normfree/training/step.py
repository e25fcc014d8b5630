"""The step: its parts forward and backward, one reduction over the processes, one update."""

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from normfree.errors import SingleValueError
from normfree.nn import shared_weights
from normfree.signal.monitor import SignalMonitor
from normfree.training.data.batches import Batch
from normfree.training.metrics import accumulator, batch_totals
from normfree.training.setup import Setup
from normfree.training.sharding import full_tensor

# A loss scale is found by trying: so many steps in a row may overflow.
_OVERFLOWS = 20


@dataclass(frozen=True)
class Outcome:
    """Outcome of a step, over all processes."""

    loss: float
    top1: float | None  # percent; None where labels are mixed
    top5: float | None
    gradient_norm: float
    finite: bool  # else nothing was updated
    stop_requested: bool  # by a signal, on any process
    unreadable: int  # images that could not be read for the first time


class Step:
    """Takes the steps of a training."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.overflows = 0

    def __call__(
        self, number: int, batches: Sequence[Batch], count: int, *, stop_requested: bool, unreadable: int,
        monitor: SignalMonitor | None,
    ) -> Outcome:  # fmt: skip
        """Take the step after `number` others, on this process's parts of a batch of `count` examples."""
        setup, accelerator = self.setup, self.setup.accelerator
        setup.optimizer.schedule.step_update(number)
        sums = accumulator(6, device=accelerator.device)
        before = self._statistics()
        mixed = batches[0].targets.ndim > 1
        with shared_weights(setup.network.model) if len(batches) > 1 else contextlib.nullcontext():
            for position, batch in enumerate(batches):
                last = position + 1 == len(batches)
                with contextlib.nullcontext() if last else accelerator.no_sync(setup.network.wrapped):
                    if monitor is not None:
                        monitor.step = number
                        monitor.loss_scale = self._loss_scale()
                    logits, targets, weights = self._forward(setup.network.wrapped, batch)
                    loss = self._loss(logits, targets, weights, count)
                    # Processes' gradients are averaged, and the loss is a sum over all of them.
                    accelerator.backward(loss * accelerator.num_processes)
                with torch.no_grad():
                    sums[0] += loss * count
                    if not mixed:
                        sums[1:3] += batch_totals(logits.detach(), targets, weights)[2:4]
        sums[3], sums[4] = float(stop_requested), float(unreadable)
        accelerator.unscale_gradients()
        gradients = [p.grad for p in setup.network.model.parameters() if p.grad is not None]
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
        sums = accelerator.reduce(sums, "sum")
        sums[5] = norm
        loss_sum, first, five, stops, new, norm_value = sums.tolist()
        finite = self._update(number, loss_sum, norm)
        if monitor is not None:
            monitor.collect()
        if not finite:
            for buffer, value in before:
                buffer.copy_(value)
        return Outcome(
            loss_sum / count, None if mixed else 100 * first / count, None if mixed else 100 * five / count, norm_value,
            finite, stops > 0, round(new),
        )  # fmt: skip

    def part_loss(self, batch: Batch, count: int) -> Tensor:
        """Compute a part's share of the loss, of the network as this process has it."""
        return self._loss(*self._forward(self.setup.network.model, batch), count)

    def _forward(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, targets and weights."""
        setup, device = self.setup, self.setup.accelerator.device
        images = setup.data.normalized(batch.images, device)
        if setup.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        try:
            with setup.accelerator.autocast():
                logits = model(images)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise SingleValueError(
                f"a part of {len(images)} image(s) gives a normalizer one value per channel, which has no variance: "
                "take larger batches, or a network without BatchNorm"
            ) from error
        return logits, batch.targets.to(device, non_blocking=True), batch.weights.to(device, non_blocking=True)

    def _loss(self, logits: Tensor, targets: Tensor, weights: Tensor, count: int) -> Tensor:
        """Compute a part's share of the mean over all examples of the step."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = targets.to(logits.dtype) if targets.ndim > 1 else targets
        smoothing = self.setup.recipe.label_smoothing
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        return (losses * weights.to(losses.dtype)).sum() / count

    def _statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Copy what a forward pass may change, where a step may be left out: BatchNorm's running statistics."""
        if self.setup.recipe.on_nonfinite != "skip":
            return []
        return [(buffer, buffer.clone()) for buffer in self.setup.network.model.buffers()]

    def _loss_scale(self) -> float:
        scaler = self.setup.accelerator.scaler
        return self.setup.accelerator.num_processes * (1.0 if scaler is None else scaler.get_scale())

    def _update(self, number: int, loss: float, norm: Tensor) -> bool:
        """Clip and step, if everything is finite; tell whether it was, or is at least no fault."""
        setup = self.setup
        finite = math.isfinite(loss) and math.isfinite(norm.item())
        self.overflows = 0 if finite else self.overflows + 1
        scaler = setup.accelerator.scaler
        if finite:
            self._clip(norm)
        if finite or scaler is not None:
            setup.optimizer.optimizer.step()  # without effect, but on the loss scale, where a scaled gradient overflows
        if finite and setup.network.ema is not None:
            setup.network.ema.update(setup.network.model, step=number)
        setup.optimizer.optimizer.zero_grad()
        return finite or (scaler is not None and math.isfinite(loss) and self.overflows <= _OVERFLOWS)

    def _clip(self, norm: Tensor) -> None:
        recipe = self.setup.recipe
        if recipe.clip_adaptive:
            clip_adaptive(self.setup.network.clipped, recipe.clip_adaptive)
        elif recipe.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(list(self.setup.network.model.parameters()), recipe.clip_norm, norm)


@torch.no_grad()
def clip_adaptive(parameters: Iterable[torch.nn.Parameter], factor: float, eps: float = 1e-3) -> None:
    """Shrink each unit's gradient to `factor` times the unit's norm, or times `eps` if that is more.

    A unit is a filter, a row of a matrix, or a whole vector (Brock et al. 2021, arXiv 2102.06171, equation 3). timm's
    function, but parameters may be sharded.
    """
    pairs = [(parameter.detach(), parameter.grad) for parameter in parameters if parameter.grad is not None]
    # One reduction for all vectors; the shards of the others are complete units.
    vectors = [torch.stack([vector_norm(t) for t in pair]) for pair in pairs if pair[0].ndim <= 1]
    norms = iter(full_tensor(torch.stack(vectors)) if vectors else ())
    for weight, gradient in pairs:
        axes = tuple(range(1, weight.ndim))
        size, norm = (vector_norm(t, dim=axes, keepdim=True) for t in (weight, gradient)) if axes else next(norms)
        limit = size.clamp(min=eps) * factor
        gradient.mul_(torch.where(norm < limit, 1.0, limit / norm.clamp(min=1e-6)))
