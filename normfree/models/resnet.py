"""What NF-ResNets are compared with: pre-activation ResNets with BatchNorm, with SkipInit, and with nothing."""

import functools
from dataclasses import dataclass
from typing import Literal

from torch import nn

from normfree.models.trunk import (
    RESNET_DEPTHS,
    BlockPlan,
    Head,
    ResidualNetwork,
    build_stages,
    check_config,
    conv_padding,
    plan_resnet,
)
from normfree.nn import MaxPool2d, PreActivationBlock, SkipInit, SqueezeExcite, make_activation
from normfree.nn.blocks import init_truncated_normal
from normfree.nn.conv import SameConv2d

Order = Literal["bn_act", "act_bn", "act"]


@dataclass(frozen=True)
class ResNetConfig:
    """The arguments of the authors' `ResNet` (pre-activation), and what its ablations need."""

    depths: tuple[int, ...]  # blocks per stage
    order: Order = "bn_act"  # what comes before each convolution; "act": no normalizer
    width: float = 4  # the stem has 16 · width channels, the stages 64, 128, 256, 512 · width
    activation: str = "relu"  # a name of `normfree.nn.gain.ACTIVATIONS`
    se_ratio: float = 0.0  # hidden width of squeeze-excite over its channels; 0: none
    drop_rate: float = 0.0  # dropout before the classifier
    stochastic_depth_rate: float = 0.0  # of the last block, growing linearly from 0
    num_classes: int = 1000  # 0: pooled features
    in_channels: int = 3
    padding: Literal["same", "symmetric"] = "same"  # "same" is the authors' (TensorFlow's); "symmetric" is PyTorch's
    train_size: int = 224  # pixels
    test_size: int = 256
    weight_decay: float = 5e-5  # without biases, scales and skip gains
    skip_gain: float | None = None  # initial SkipInit gain of every block; None: there are no such gains
    init: Literal["he", "reference"] = "he"  # N(0, 2/fan_in), or the authors' truncated normal of 0.774/fan_in


_ORDERS: dict[str, Order] = {
    "bn_resnet{}": "bn_act",
    "bn_resnet{}_relu_bn": "act_bn",
    "unnormalized_resnet{}": "act",
}
VARIANTS = {
    name.format(depth): ResNetConfig(depths, order=order)
    for name, order in _ORDERS.items()
    for depth, depths in RESNET_DEPTHS.items()
} | {
    f"skipinit_resnet{depth}": ResNetConfig(
        depths, order="act", skip_gain=0.0, stochastic_depth_rate=0.1, init="reference"
    )
    for depth, depths in RESNET_DEPTHS.items()
}


class ResNet(ResidualNetwork):
    """A pre-activation ResNet with BatchNorm in either order, SkipInit, or neither; see `ResNetConfig`."""

    def __init__(self, config: ResNetConfig) -> None:
        check_config(config)
        if config.order not in ("bn_act", "act_bn", "act"):
            raise ValueError(f"order is {config.order!r}; it must be 'bn_act', 'act_bn' or 'act'")
        if config.init not in ("he", "reference"):
            raise ValueError(f"init is {config.init!r}; it must be 'he' or 'reference'")
        plans = plan_resnet(config.depths, config.width, config.stochastic_depth_rate)
        stem = _conv(config, config.in_channels, plans[0].in_channels, 7, 2, bias=False)
        features = plans[-1].out_channels
        init_std = 0.01 if config.init == "he" else 0.0
        super().__init__(
            config,
            nn.Sequential(stem, MaxPool2d(config.padding)),
            build_stages(plans, functools.partial(_block, config)),
            _pre(config, features),
            Head(features, config.num_classes, drop_rate=config.drop_rate, in_scale=1.0, init_std=init_std),
        )


def _block(config: ResNetConfig, plan: BlockPlan) -> PreActivationBlock:
    channels, width = plan.out_channels, plan.out_channels // 4
    gates: list[nn.Module] = []
    if config.se_ratio:
        gates.append(SqueezeExcite(channels, config.se_ratio))
    if config.skip_gain is not None:
        gates.append(SkipInit(config.skip_gain))
    return PreActivationBlock(
        pre=[_pre(config, plan.in_channels), _pre(config, width), _pre(config, width)],
        conv=[
            _conv(config, plan.in_channels, width, 1),
            _conv(config, width, width, 3, plan.stride),
            _conv(config, width, channels, 1),
        ],
        shortcut=_conv(config, plan.in_channels, channels, 1, plan.stride) if plan.projects else None,
        gate=nn.Sequential(*gates) if gates else None,
        drop_rate=plan.drop_rate,
    )


def _pre(config: ResNetConfig, channels: int) -> nn.Module:
    activation = make_activation(config.activation)
    if config.order == "act":
        return activation
    norm = nn.BatchNorm2d(channels)
    return nn.Sequential(norm, activation) if config.order == "bn_act" else nn.Sequential(activation, norm)


def _conv(
    config: ResNetConfig, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = True
) -> nn.Conv2d:
    bias = bias and config.order == "act"  # a normalizer would take it away again
    padding = conv_padding(config, kernel_size)
    conv = SameConv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
    if config.init == "he":
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    else:
        init_truncated_normal(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
