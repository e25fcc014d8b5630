"""Initial weights that torch.nn.init does not have."""

from torch import Tensor, nn


def truncated_normal_(weight: Tensor) -> None:
    """Fill with Haiku's default: a normal of variance 1/fan_in, cut at two deviations (which leaves 0.774/fan_in)."""
    std = weight[0].numel() ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
