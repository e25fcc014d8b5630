"""Costs of a network before it is built: parameters and multiply-accumulates."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from normfree.models.registry import create_model


@dataclass(frozen=True)
class Cost:
    """Counts of a network of the registry."""

    name: str
    parameters: int
    macs: int  # multiply-accumulates of one forward pass of one image of `size`, padding included
    size: int | tuple[int, int]  # pixels: height and width that the network is trained at, or that were asked for
    test_size: int
    drop_rate: float
    weight_decay: float


def cost(name: str, *, size: int | tuple[int, int] | None = None, **overrides: Any) -> Cost:
    """Count `create_model(name, **overrides)` for images of `size`: (height, width) or one number; None: as trained.

    Convolutions and matrix products are counted, by torch's own flop counter, as in the authors' tables; nothing is
    allocated.

    Raises ValueError as `create_model` does.
    """
    model: Any = create_model(name, device="meta", **overrides)
    config = model.config
    size = config.train_size if size is None else size
    return Cost(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=multiply_accumulates(model, config.in_channels, size),
        size=size,
        test_size=config.test_size,
        drop_rate=config.drop_rate,
        weight_decay=config.weight_decay,
    )


def multiply_accumulates(model: nn.Module, channels: int, size: int | tuple[int, int]) -> int:
    """Count those of convolutions and matrix products, for one image; `model` is on the meta device."""
    height, width = (size, size) if isinstance(size, int) else size
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.eval()(torch.empty(1, channels, height, width, device="meta"))
    return counter.get_total_flops() // 2
