"""Plan of a residual network's blocks: stages, channels, strides, stochastic depth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Properties that distinguish one residual block from the next."""

    stage: int
    in_channels: int
    out_channels: int
    stride: int
    first_in_stage: bool
    drop_rate: float  # stochastic depth, growing linearly with the block's index
    dilation: int = 1  # of 3×3 convolutions, but for the first one
    first_dilation: int = 1

    @property
    def projects(self) -> bool:
        """True where the shortcut needs a convolution."""
        return self.stride > 1 or self.in_channels != self.out_channels or self.dilation != self.first_dilation


def plan_blocks(
    stem: int, widths: Sequence[int], depths: Sequence[int], strides: Sequence[int], stochastic_depth_rate: float,
    output_stride: int = 32,
) -> list[BlockPlan]:  # fmt: skip
    """The blocks of a residual network, in execution order, after a stem of `stem` channels.

    Strides that would lead beyond `output_stride` become dilations, as in timm.
    """
    plans: list[BlockPlan] = []
    channels, dilation, reduction = stem, 1, 32 // math.prod(strides)
    for stage, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True)):
        dilated = reduction * stride > output_stride
        dilation *= stride if dilated else 1
        reduction *= 1 if dilated else stride
        first_dilation = 1 if dilation <= 2 else 2
        for position in range(depth):
            first = position == 0
            drop_rate = stochastic_depth_rate * len(plans) / sum(depths)
            step = stride if first and not dilated else 1
            plans.append(BlockPlan(stage, channels, width, step, first, drop_rate, dilation, first_dilation))
            channels, first_dilation = width, dilation
    return plans


def plan_resnet(
    depths: Sequence[int], width: float, stochastic_depth_rate: float, output_stride: int = 32
) -> list[BlockPlan]:
    """The blocks of a ResNet: stages of 64, 128, 256, 512 times `width` channels after a stem of 16 times."""
    widths = [int(64 * 2**stage * width) for stage in range(len(depths))]
    strides = [1] + [2] * (len(depths) - 1)
    return plan_blocks(int(16 * width), widths, depths, strides, stochastic_depth_rate, output_stride)
