"""Functions that were proposed in the place of normalizers after the paper, to be compared with it."""

from typing import Any

import torch
from torch import Tensor, nn

from normfree.models import create_model


class DynamicTanh(nn.Module):
    """DyT, (N, C, …) to the same: γ tanh(α x) + β (Zhu et al. 2025, arXiv 2503.10622), α one number, 0.5 at first."""

    def __init__(self, channels: int, *_: Any, **__: Any) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def bounded(self, x: Tensor) -> Tensor:
        """Return the function before scale and shift."""
        return (self.alpha * x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        """Bound, then multiply and add per channel."""
        shape = [-1] + [1] * (x.dim() - 2)
        return self.bounded(x) * self.weight.view(shape) + self.bias.view(shape)


class DynamicErf(DynamicTanh):
    """Derf: γ erf(α x + s) + β (Chen et al. 2025, arXiv 2512.10938), α 0.5 and s 0 at first, each one number."""

    def __init__(self, channels: int, *_: Any, **__: Any) -> None:
        super().__init__(channels)
        self.shift = nn.Parameter(torch.zeros(1))

    def bounded(self, x: Tensor) -> Tensor:
        """Return the function before scale and shift."""
        return (self.alpha * x + self.shift).erf()


SUCCESSORS: dict[str, type[nn.Module]] = {"dyt": DynamicTanh, "derf": DynamicErf}
"""The functions by name."""


def bn_resnet(
    norm: str,
    depth: int = 26,
    width: float = 1.0,
    num_classes: int = 1000,
    in_channels: int = 3,
    stochastic_depth_rate: float = 0.0,
    drop_rate: float = 0.0,
) -> nn.Module:
    """Make the BatchNorm ResNet of a depth with one of the functions in the place of each BatchNorm.

    Raises ValueError for another `norm` or depth.
    """
    if norm not in SUCCESSORS:
        raise ValueError(f"norm is {norm!r}; it must be {' or '.join(SUCCESSORS)}")
    model = create_model(
        f"bn_resnet{depth}", width=width, num_classes=num_classes, in_channels=in_channels,
        stochastic_depth_rate=stochastic_depth_rate, drop_rate=drop_rate,
    )  # fmt: skip
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, SUCCESSORS[norm](child.num_features))
    return model
