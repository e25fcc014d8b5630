"""What a normalizer-free network is made of."""

from normfree.nn.blocks import (
    AveragePool2d,
    Bias,
    EfficientChannelAttention,
    MaxPool2d,
    PostActivationBlock,
    PreActivationBlock,
    SkipInit,
    SqueezeExcite,
)
from normfree.nn.conv import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d
from normfree.nn.gain import gain, make_activation
from normfree.nn.standardize import standardize
from normfree.nn.variance import VarianceLedger

__all__ = [
    "AveragePool2d",
    "Bias",
    "EfficientChannelAttention",
    "MaxPool2d",
    "PostActivationBlock",
    "PreActivationBlock",
    "ScaledWSConv1d",
    "ScaledWSConv2d",
    "ScaledWSConv3d",
    "SkipInit",
    "SqueezeExcite",
    "VarianceLedger",
    "gain",
    "make_activation",
    "standardize",
]
