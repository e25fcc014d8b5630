"""NFNets (Brock, De, Smith & Simonyan 2021, arXiv 2102.06171): the successor of the paper's networks."""

from dataclasses import dataclass, replace

from torch import nn

from normfree.models.block_plan import BlockPlan, plan_blocks
from normfree.models.network import Head, ResidualNetwork
from normfree.models.nf_blocks import NFBlocks, NFConfig
from normfree.nn import PreActivationBlock


@dataclass(frozen=True, kw_only=True)
class NFNetConfig(NFConfig):
    """The arguments of the authors' `NFNet`."""

    widths: tuple[int, ...] = (256, 512, 1536, 1536)  # channels per stage, before `width`
    width: float = 1.0  # multiplies the widths of the stages
    expansion: float = 0.5  # inner width of a block over its output's channels
    group_size: int = 128  # channels per group of the 3×3 convolutions
    middle: int = 2  # 3×3 convolutions per block
    activation: str = "gelu_tanh"
    se_ratio: float = 0.5
    weight_decay: float = 2e-5


# train and test size, dropout
_LEVELS = (
    (192, 256, 0.2),
    (224, 320, 0.3),
    (256, 352, 0.4),
    (320, 416, 0.4),
    (384, 512, 0.5),
    (416, 544, 0.5),
    (448, 576, 0.5),
    (480, 608, 0.5),
)
VARIANTS = {
    f"nfnet_f{level}": NFNetConfig(
        depths=tuple(depth * (level + 1) for depth in (1, 2, 6, 3)),
        train_size=train_size,
        test_size=test_size,
        drop_rate=drop_rate,
    )
    for level, (train_size, test_size, drop_rate) in enumerate(_LEVELS)
}
VARIANTS |= {f"{name}_plus": replace(config, widths=(384, 768, 2048, 2048)) for name, config in VARIANTS.items()}


class NFNet(ResidualNetwork):
    """A normalizer-free network of the F-series; see `NFNetConfig`. The same function as the authors' `NFNet`."""

    def __init__(self, config: NFNetConfig) -> None:
        nf = NFBlocks(config)
        stem_channels = (config.in_channels, 16, 32, 64, config.widths[0] // 2)
        stem: list[nn.Module] = []
        for index, stride in enumerate((2, 1, 1, 2)):
            stem += [nf.activation()] if index else []
            in_scale = nf.gamma if index else 1.0
            stem += [nf.conv(stem_channels[index], stem_channels[index + 1], 3, stride=stride, in_scale=in_scale)]
        widths = [int(width * config.width) for width in config.widths]
        rate, strides = config.stochastic_depth_rate, (1, 2, 2, 2)
        plans = plan_blocks(stem_channels[-1], widths, config.depths, strides, rate, config.output_stride)

        def block(plan: BlockPlan) -> PreActivationBlock:
            groups = int(plan.out_channels * config.expansion) // config.group_size
            width = groups * config.group_size
            return nf.block(plan, width, groups=groups, middle=config.middle, pooled_shortcut=True)

        features = 2 * widths[-1]
        super().__init__(
            config,
            stem,
            plans,
            [block(plan) for plan in plans],
            nn.Sequential(nf.conv(widths[-1], features, 1), nf.activation()),
            Head(features, config.num_classes, drop_rate=config.drop_rate, in_scale=nf.gamma, init_std=0.01),
            stem_tap=5,
            stem_tap_channels=stem_channels[3],
        )
