"""What the paper's networks share: the plan of their blocks, and stem → stages → pooled head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn.scales import Scales

RESNET_DEPTHS = {
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    288: (24, 24, 24, 24),
    600: (50, 50, 50, 50),
}
"""Blocks per stage, as in the authors' code; 26 is ours."""


@dataclass(frozen=True)
class BlockPlan:
    """What distinguishes one residual block from the next."""

    stage: int
    in_channels: int
    out_channels: int
    stride: int
    first_in_stage: bool
    drop_rate: float  # stochastic depth, growing linearly with the block's index

    @property
    def projects(self) -> bool:
        """Whether the shortcut needs a convolution."""
        return self.stride > 1 or self.in_channels != self.out_channels


def plan_blocks(
    stem: int, widths: Sequence[int], depths: Sequence[int], strides: Sequence[int], stochastic_depth_rate: float
) -> list[BlockPlan]:
    """The blocks of a residual network, in execution order, after a stem of `stem` channels."""
    plans: list[BlockPlan] = []
    channels = stem
    for stage, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True)):
        for position in range(depth):
            first = position == 0
            drop_rate = stochastic_depth_rate * len(plans) / sum(depths)
            plans.append(BlockPlan(stage, channels, width, stride if first else 1, first, drop_rate))
            channels = width
    return plans


def build_stages(plans: Sequence[BlockPlan], build: Callable[[BlockPlan], nn.Module]) -> list[list[nn.Module]]:
    """What `build` makes of every plan, by stage, in execution order."""
    stages: list[list[nn.Module]] = [[] for _ in range(plans[-1].stage + 1)]
    for plan in plans:
        stages[plan.stage].append(build(plan))
    return stages


def plan_resnet(depths: Sequence[int], width: float, stochastic_depth_rate: float) -> list[BlockPlan]:
    """The blocks of a ResNet: stages of 64, 128, 256, 512 times `width` channels after a stem of 16 times."""
    widths = [int(64 * 2**stage * width) for stage in range(len(depths))]
    strides = [1] + [2] * (len(depths) - 1)
    return plan_blocks(int(16 * width), widths, depths, strides, stochastic_depth_rate)


def check_config(config: Any) -> None:
    """Raise ValueError for values that no network of this package can have; the message names the field."""
    for field in ("drop_rate", "stochastic_depth_rate"):
        value = getattr(config, field)
        if not 0 <= value < 1:
            raise ValueError(f"{field} is {value}; it must be in [0, 1)")
    for field, least in {"num_classes": 0, "in_channels": 1}.items():
        value = getattr(config, field)
        if int(value) != value or value < least:
            raise ValueError(f"{field} is {value}; it must be a whole number of at least {least}")
    if int(16 * config.width) < 1:
        raise ValueError(f"width is {config.width}; it must be at least 1/16, for a stem of one channel")
    for field in ("se_ratio", "alpha"):
        value = getattr(config, field, 0)
        if not value >= 0:
            raise ValueError(f"{field} is {value}; it must not be negative")
    if config.padding not in ("same", "symmetric"):
        raise ValueError(f"padding is {config.padding!r}; it must be 'same' or 'symmetric'")


def conv_padding(config: Any, kernel_size: int) -> int | str:
    """The padding of a convolution under `config.padding`."""
    return "same" if config.padding == "same" else kernel_size // 2


class Head(Scales):
    """(N, C, H, W) to (N, num_classes): global average, times γ of the last activation, dropout, linear."""

    in_scale: Tensor

    def __init__(self, channels: int, num_classes: int, *, drop_rate: float, in_scale: float, init_std: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        if isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=init_std)
            nn.init.zeros_(self.fc.bias)
        self._register_scales(torch.empty(0), in_scale=in_scale)
        self.reset_scales()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3)) * self.in_scale.to(x.dtype)
        return pooled if pre_logits else self.fc(self.drop(pooled))


class ResidualNetwork(nn.Module):
    """stem → stages → `final` (the last activation, with a normalizer where the blocks have one) → head.

    Input (N, in_channels, H, W) of any height and width, output (N, num_classes).
    """

    def __init__(
        self, config: Any, stem: nn.Module, stages: Sequence[Sequence[nn.Module]], final: nn.Module, head: Head
    ) -> None:
        super().__init__()
        self.config = config
        self.default_cfg = {"input_size": (config.in_channels, config.train_size, config.train_size)}
        self.stem = stem
        self.stages = nn.Sequential(*(nn.Sequential(*blocks) for blocks in stages))
        self.final = final
        self.head = head

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, H/32, W/32): the last activation, before pooling and before its γ."""
        return self.final(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (N, num_classes), or with `pre_logits` the pooled features (N, C), γ included."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
