"""Accuracy and its sums over batches."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Accuracy and loss of a network on a data set."""

    examples: int
    loss: float  # cross-entropy, per example
    top1: float  # percent
    top5: float
    balanced: float  # mean over the classes that occur of the percentage of a class's images that are right


def accumulator(*size: int, device: torch.device) -> Tensor:
    """Make zeros to sum up in, float64 where the device has it."""
    return torch.zeros(size, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def batch_totals(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum over a batch, (4,): weight, cross-entropy, right first guesses, right ones among five."""
    rows = _scores(logits, labels)
    return (rows * weights.to(rows)).sum(1)


def class_totals(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum over the images of each class, (classes, 4), what `batch_totals` sums over all."""
    rows = _scores(logits, labels)
    return rows.new_zeros(logits.shape[1], 4).index_add_(0, labels, (rows * weights.to(rows)).T)


def accuracy_of(totals: Tensor) -> Accuracy:
    """Make the accuracy out of `class_totals` over all batches, (classes, 4)."""
    count, loss, first, five = totals.sum(0).tolist()
    read = max(count, 1)
    occurring = totals[totals[:, 0] > 0]
    balanced = (occurring[:, 2] / occurring[:, 0]).mean().item() if len(occurring) else 0.0
    return Accuracy(round(count), loss / read, 100 * first / read, 100 * five / read, 100 * balanced)


def _scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (4, images): 1, cross-entropy, whether the first guess is right, whether one of five is."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    losses = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack([torch.ones_like(losses), losses, best[:, 0].to(losses), best.any(1).to(losses)])
