"""Baselines of NF-ResNets: ResNets with BatchNorm, with SkipInit, and with nothing."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from torch import nn

from normfree.models.block_plan import RESNET_DEPTHS, BlockPlan, plan_resnet
from normfree.models.config import NetworkConfig
from normfree.models.network import Head, ResidualNetwork
from normfree.nn import MaxPool2d, PostActivationBlock, PreActivationBlock, SkipInit, SqueezeExcite, make_activation
from normfree.nn.initialization import truncated_normal_
from normfree.nn.padding import SameConv2d

Order = Literal["bn_act", "act_bn", "act"]


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(NetworkConfig):
    """The arguments of the authors' `ResNet` and `SkipInit_ResNet`, and what their ablations need."""

    width: float = 4  # the stem has 16 · width channels, the stages 64, 128, 256, 512 · width
    order: Order = "bn_act"  # of what stands between convolutions; "act": no normalizer
    preactivation: bool = True  # False: the original residual block, activated after its addition; needs "bn_act"
    stochastic_depth_rate: float = 0.0  # of the last block, growing linearly from 0
    se_ratio: float = 0.0  # hidden width of squeeze-excite over its channels; 0: none
    skip_gain: float | None = None  # initial SkipInit gain of every block; None: there are no such gains
    init: Literal["he", "reference"] = "he"  # N(0, 2/fan_in), or the authors' truncated normal of 0.774/fan_in

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("bn_act", "act_bn", "act"):
            raise ValueError(f"order is {self.order!r}; it must be 'bn_act', 'act_bn' or 'act'")
        if not self.preactivation and (self.order != "bn_act" or self.skip_gain is not None):
            raise ValueError("preactivation is False; it needs order 'bn_act' and skip_gain None")
        if self.init not in ("he", "reference"):
            raise ValueError(f"init is {self.init!r}; it must be 'he' or 'reference'")


_ORDERS: dict[str, Order] = {
    "bn_resnet{}": "bn_act",
    "bn_resnet{}_relu_bn": "act_bn",
    "unnormalized_resnet{}": "act",
}
VARIANTS = {
    name.format(depth): ResNetConfig(depths=depths, order=order)
    for name, order in _ORDERS.items()
    for depth, depths in RESNET_DEPTHS.items()
}
VARIANTS |= {
    f"bn_resnet{depth}_postact": ResNetConfig(depths=depths, preactivation=False)
    for depth, depths in RESNET_DEPTHS.items()
}
VARIANTS |= {
    f"skipinit_resnet{depth}": ResNetConfig(
        depths=depths, order="act", skip_gain=0.0, stochastic_depth_rate=0.1, init="reference"
    )
    for depth, depths in RESNET_DEPTHS.items()
}


class ResNet(ResidualNetwork):
    """A ResNet with BatchNorm in either order, SkipInit, or neither; see `ResNetConfig`."""

    def __init__(self, config: ResNetConfig) -> None:
        plans = plan_resnet(config.depths, config.width, config.stochastic_depth_rate)
        channels, features = plans[0].in_channels, plans[-1].out_channels
        stem: list[nn.Module] = [_conv(config, config.in_channels, channels, 7, 2, bias=False)]
        if not config.preactivation:
            stem.append(_between(config, channels))
        super().__init__(
            config,
            [*stem, MaxPool2d(config.padding)],
            plans,
            [_block(config, plan) for plan in plans],
            _between(config, features) if config.preactivation else nn.Identity(),
            Head(
                features,
                config.num_classes,
                drop_rate=config.drop_rate,
                init_std=0.01 if config.init == "he" else 0.0,
            ),
            stem_tap=len(stem),
            stem_tap_channels=channels,
        )


def _block(config: ResNetConfig, plan: BlockPlan) -> nn.Module:
    channels, width = plan.out_channels, plan.out_channels // 4
    conv = [
        _conv(config, plan.in_channels, width, 1),
        _conv(config, width, width, 3, plan.stride),
        _conv(config, width, channels, 1),
    ]
    shortcut: nn.Module | None = None
    if plan.projects:
        shortcut = _conv(config, plan.in_channels, channels, 1, plan.stride)
    gates: list[nn.Module] = []
    if config.se_ratio:
        gates.append(SqueezeExcite.of_ratio(channels, config.se_ratio))
    if config.skip_gain is not None:
        gates.append(SkipInit(config.skip_gain))
    if config.preactivation:
        return PreActivationBlock(
            pre=[_between(config, plan.in_channels), _between(config, width), _between(config, width)],
            conv=conv,
            shortcut=shortcut,
            gate=nn.Sequential(*gates) if gates else None,
            drop_rate=plan.drop_rate,
        )
    branch = OrderedDict[str, nn.Module](
        conv0=conv[0], post0=_between(config, width), conv1=conv[1], post1=_between(config, width),
        conv2=conv[2], bn2=nn.BatchNorm2d(channels),
    )  # fmt: skip
    if gates:
        branch["gate"] = gates[0]
    return PostActivationBlock(
        branch=nn.Sequential(branch),
        shortcut=None if shortcut is None else nn.Sequential(shortcut, nn.BatchNorm2d(channels)),
        activation=make_activation(config.activation),
        drop_rate=plan.drop_rate,
    )


def _between(config: ResNetConfig, channels: int) -> nn.Module:
    """Make the modules between two convolutions."""
    activation = make_activation(config.activation)
    if config.order == "act":
        return activation
    norm = nn.BatchNorm2d(channels)
    return nn.Sequential(norm, activation) if config.order == "bn_act" else nn.Sequential(activation, norm)


def _conv(
    config: ResNetConfig, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = True
) -> nn.Conv2d:
    bias = bias and config.order == "act"  # a normalizer would take it away again
    padding = config.conv_padding(kernel_size)
    conv = SameConv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
    if config.init == "he":
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    else:
        truncated_normal_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
