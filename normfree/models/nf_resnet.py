"""NF-ResNets: pre-activation ResNets without activation normalization (Brock et al. 2021, section 4)."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from normfree.models.trunk import RESNET_DEPTHS, Head, ResidualNetwork, check_config, conv_padding, plan_resnet
from normfree.nn import (
    MaxPool2d,
    PreActivationBottleneck,
    ScaledWSConv2d,
    SqueezeExcite,
    VarianceLedger,
    gain,
    make_activation,
)
from normfree.nn.gain import GainSource


@dataclass(frozen=True)
class NFResNetConfig:
    """The arguments of the authors' `NF_ResNet`."""

    depths: tuple[int, ...]  # blocks per stage
    width: float = 4  # the stem has 16 · width channels, the stages 64, 128, 256, 512 · width
    activation: str = "relu"  # a name of `normfree.nn.gain.ACTIVATIONS`
    se_ratio: float = 0.0  # hidden width of squeeze-excite over its channels; 0: none (the authors use 0.25)
    alpha: float = 0.2  # what a branch of unit variance is multiplied by
    skip_gain: float = 0.0  # initial SkipInit gain: every block starts as its shortcut
    drop_rate: float = 0.0  # dropout before the classifier
    stochastic_depth_rate: float = 0.1  # of the last block, growing linearly from 0
    num_classes: int = 1000  # 0: pooled features
    in_channels: int = 3
    padding: Literal["same", "symmetric"] = "same"  # "same" is the authors' (TensorFlow's); "symmetric" is PyTorch's
    gains: GainSource = "exact"  # γ by quadrature, or the authors' Monte-Carlo constants
    standardize: bool = True  # False is the ablation: He initialisation and γ = 1, α and β kept


VARIANTS = {f"nf_resnet{depth}": NFResNetConfig(depths) for depth, depths in RESNET_DEPTHS.items()} | {
    f"nf_resnet{depth}_unstandardized": NFResNetConfig(depths, standardize=False)
    for depth, depths in RESNET_DEPTHS.items()
}


class NFResNet(ResidualNetwork):
    """A normalizer-free ResNet; see `NFResNetConfig` for what can be chosen.

    The same function as the authors' `NF_ResNet`, with every scalar carried by a convolution's weight: the activation's
    γ and the block's β in `in_scale`, the branch's α and SkipInit gain in the last convolution (or the gate).
    """

    def __init__(self, config: NFResNetConfig) -> None:
        check_config(config)
        gamma = gain(config.activation, source=config.gains) if config.standardize else 1.0
        act = functools.partial(make_activation, config.activation)
        ledger = VarianceLedger(config.alpha)
        stages: list[list[nn.Module]] = [[] for _ in config.depths]
        channels = int(16 * config.width)
        stem = nn.Sequential(
            _conv(config, config.in_channels, channels, 7, stride=2),
            MaxPool2d(config.padding),
        )
        for plan in plan_resnet(config.depths, config.width, config.stochastic_depth_rate):
            in_scale = gamma * ledger.enter_block(first_in_stage=plan.first_in_stage)
            channels, inner = plan.out_channels, plan.out_channels // 4
            branch_end: dict[str, Any] = {"out_scale": config.alpha, "skip_gain": config.skip_gain}
            gate = None
            if config.se_ratio:
                gate = SqueezeExcite(channels, config.se_ratio, gate_scale=2.0, **branch_end)
            stages[plan.stage].append(
                PreActivationBottleneck(
                    pre=(act(), act(), act()),
                    conv=(
                        _conv(config, plan.in_channels, inner, 1, in_scale=in_scale),
                        _conv(config, inner, inner, 3, stride=plan.stride, in_scale=gamma),
                        _conv(config, inner, channels, 1, in_scale=gamma, **({} if gate else branch_end)),
                    ),
                    shortcut=_conv(config, plan.in_channels, channels, 1, stride=plan.stride, in_scale=in_scale)
                    if plan.projects
                    else None,
                    gate=gate,
                    drop_rate=plan.drop_rate,
                    expected_variance=ledger.variance,
                )
            )
        super().__init__(
            config,
            stem,
            stages,
            act(),
            Head(channels, config.num_classes, drop_rate=config.drop_rate, in_scale=gamma, init_std=0.01),
        )


def _conv(
    config: NFResNetConfig, in_channels: int, out_channels: int, kernel_size: int, **arguments: Any
) -> ScaledWSConv2d:
    padding = conv_padding(config, kernel_size)
    return ScaledWSConv2d(
        in_channels, out_channels, kernel_size, padding=padding, standardize=config.standardize, **arguments
    )
