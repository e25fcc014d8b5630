"""NF-ResNets: pre-activation ResNets without activation normalization (Brock et al. 2021, section 4)."""

from dataclasses import dataclass, replace

from normfree.models.block_plan import RESNET_DEPTHS, plan_resnet
from normfree.models.network import Head, ResidualNetwork
from normfree.models.nf_blocks import NFBlocks, NFConfig
from normfree.nn import MaxPool2d


@dataclass(frozen=True, kw_only=True)
class NFResNetConfig(NFConfig):
    """The arguments of the authors' `NF_ResNet`; they use squeeze-excite with `se_ratio=0.25`."""

    width: float = 4  # the stem has 16 · width channels, the stages 64, 128, 256, 512 · width


VARIANTS = {f"nf_resnet{depth}": NFResNetConfig(depths=depths) for depth, depths in RESNET_DEPTHS.items()}
VARIANTS |= {f"{name}_unstandardized": replace(config, standardize=False) for name, config in VARIANTS.items()}


class NFResNet(ResidualNetwork):
    """A normalizer-free ResNet; see `NFResNetConfig` for what can be chosen.

    The same function as the authors' `NF_ResNet`, with every scalar carried by a convolution's weight: the activation's
    γ and the block's β in `in_scale`, the branch's α and SkipInit gain in the last convolution (or the gate).
    """

    def __init__(self, config: NFResNetConfig) -> None:
        nf = NFBlocks(config)
        rate = config.stochastic_depth_rate
        plans = plan_resnet(config.depths, config.width, rate, config.output_stride)
        super().__init__(
            config,
            [nf.conv(config.in_channels, plans[0].in_channels, 7, stride=2), MaxPool2d(config.padding)],
            plans,
            [nf.block(plan, plan.out_channels // 4) for plan in plans],
            nf.activation(),
            Head(
                plans[-1].out_channels,
                config.num_classes,
                drop_rate=config.drop_rate,
                in_scale=nf.gamma,
                init_std=0.01,
            ),
            stem_tap=1,
            stem_tap_channels=plans[0].in_channels,
        )
