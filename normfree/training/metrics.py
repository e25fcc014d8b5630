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


def accumulator(size: int, device: torch.device) -> Tensor:
    """Make zeros to sum up in, float64 where the device has it."""
    return torch.zeros(size, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def batch_totals(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum over a batch, (4,): weight, cross-entropy, right first guesses, right ones among five."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    losses = F.cross_entropy(logits, labels, reduction="none")
    rows = torch.stack([torch.ones_like(losses), losses, best[:, 0].to(losses), best.any(1).to(losses)])
    return (rows * weights.to(losses)).sum(1)
