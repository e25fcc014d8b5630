"""NF-RegNets: normalizer-free networks across compute budgets (Brock et al. 2021, section 5)."""

from dataclasses import dataclass

from torch import nn

from normfree.models.block_plan import BlockPlan, plan_blocks
from normfree.models.network import Head, ResidualNetwork
from normfree.models.nf_blocks import NFBlocks, NFConfig
from normfree.nn import PreActivationBlock


@dataclass(frozen=True, kw_only=True)
class NFRegNetConfig(NFConfig):
    """The arguments of the authors' `NF_RegNet`."""

    widths: tuple[int, ...]  # channels per stage, before `width`; the stem has as many as the first stage
    width: float = 0.75  # multiplies all widths
    expansion: float = 2.25  # inner width of a block over its input's channels, but for the first block, where it is 1
    group_size: int = 8  # channels per group of the 3×3 convolutions
    activation: str = "silu"
    se_ratio: float = 0.5  # of the inner width


# widths, depths, train and test size, dropout; weight decay is 5e-5 + 1e-5 · level (the paper's, continued from B6 on).
_LEVELS = (
    ((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
    ((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
    ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
    ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
    ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
    ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
    ((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
    ((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
    ((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
)
VARIANTS = {
    f"nf_regnet_b{level}": NFRegNetConfig(
        widths=widths,
        depths=depths,
        train_size=train_size,
        test_size=test_size,
        drop_rate=drop_rate,
        weight_decay=5e-5 + 1e-5 * level,
    )
    for level, (widths, depths, train_size, test_size, drop_rate) in enumerate(_LEVELS)
}


class NFRegNet(ResidualNetwork):
    """A normalizer-free RegNet; see `NFRegNetConfig`. The same function as the authors' `NF_RegNet`."""

    def __init__(self, config: NFRegNetConfig) -> None:
        nf = NFBlocks(config)
        widths = [int(width * config.width) for width in config.widths]
        rate, strides = config.stochastic_depth_rate, [2] * len(widths)
        plans = plan_blocks(widths[0], widths, config.depths, strides, rate, config.output_stride)

        def block(plan: BlockPlan) -> PreActivationBlock:
            expansion = 1 if plan is plans[0] else config.expansion
            groups = int(plan.in_channels * expansion) // config.group_size
            return nf.block(plan, groups * config.group_size, groups=groups, gate="inner", pooled_shortcut=True)

        features = 1280 * widths[-1] // 440
        super().__init__(
            config,
            [nf.conv(config.in_channels, widths[0], 3, stride=2)],
            plans,
            [block(plan) for plan in plans],
            nn.Sequential(nf.conv(widths[-1], features, 1), nf.activation()),
            Head(features, config.num_classes, drop_rate=config.drop_rate, in_scale=nf.gamma, init_std=0.0),
            stem_tap=1,
            stem_tap_channels=widths[0],
        )
