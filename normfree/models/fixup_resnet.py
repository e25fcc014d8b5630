"""FixUp ResNets (Zhang, Dauphin & Ma 2019, arXiv 1901.09321): trainable without normalization by initialisation."""

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn

from normfree.models.block_plan import RESNET_DEPTHS, BlockPlan, plan_resnet
from normfree.models.config import NetworkConfig
from normfree.models.network import Head, ResidualNetwork
from normfree.nn import Bias, MaxPool2d, PostActivationBlock, SkipInit, make_activation
from normfree.nn.initialization import truncated_normal_
from normfree.nn.padding import SameConv2d


@dataclass(frozen=True, kw_only=True)
class FixUpResNetConfig(NetworkConfig):
    """The arguments of the authors' `FixUp_ResNet`."""

    width: float = 4  # the stem has 16 · width channels, the stages 64, 128, 256, 512 · width


VARIANTS = {f"fixup_resnet{depth}": FixUpResNetConfig(depths=depths) for depth, depths in RESNET_DEPTHS.items()}


class FixUpResNet(ResidualNetwork):
    """A post-activation ResNet with FixUp; see `FixUpResNetConfig`. The same function as the authors' `FixUp_ResNet`.

    The last convolution of every branch starts at 0, the others small by the number of blocks, and scalar biases and
    scales stand between them.
    """

    def __init__(self, config: FixUpResNetConfig) -> None:
        plans = plan_resnet(config.depths, config.width, config.stochastic_depth_rate)
        stem = _conv(config, config.in_channels, plans[0].in_channels, 7, 2)
        truncated_normal_(stem.weight)
        features = plans[-1].out_channels
        super().__init__(
            config,
            [stem, Bias(), make_activation(config.activation), MaxPool2d(config.padding)],
            plans,
            [_block(config, plan, len(plans)) for plan in plans],
            nn.Identity(),
            Head(features, config.num_classes, drop_rate=config.drop_rate, init_std=0.0, bias=Bias()),
            stem_tap=3,
            stem_tap_channels=plans[0].in_channels,
        )


def _block(config: FixUpResNetConfig, plan: BlockPlan, blocks: int) -> PostActivationBlock:
    """The layers are named as the authors name them."""
    channels, width = plan.out_channels, plan.out_channels // 4
    conv0 = _conv(config, plan.in_channels, width, 1)
    conv1 = _conv(config, width, width, 3, plan.stride)
    conv2 = _conv(config, width, channels, 1)
    nn.init.normal_(conv0.weight, std=(2 / width) ** 0.5 * blocks**-0.25)
    nn.init.normal_(conv1.weight, std=(2 / (9 * width)) ** 0.5 * blocks**-0.25)
    nn.init.zeros_(conv2.weight)
    branch = OrderedDict[str, nn.Module](
        conv0=conv0, bias1b=Bias(), activation0=make_activation(config.activation),
        bias2a=Bias(), conv1=conv1, bias2b=Bias(), activation1=make_activation(config.activation),
        bias3a=Bias(), conv2=conv2, scale=SkipInit(1.0), bias3b=Bias(),
    )  # fmt: skip
    shortcut = None
    if plan.projects:
        shortcut = _conv(config, plan.in_channels, channels, 1, plan.stride)
        nn.init.normal_(shortcut.weight, std=(2 / channels) ** 0.5)
    return PostActivationBlock(
        entry=Bias(),
        branch=nn.Sequential(branch),
        shortcut=shortcut,
        activation=make_activation(config.activation),
        drop_rate=plan.drop_rate,
    )


def _conv(config: FixUpResNetConfig, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return SameConv2d(in_channels, out_channels, kernel, stride, config.conv_padding(kernel), bias=False)
