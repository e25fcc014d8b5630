"""Layers of a normalizer-free network."""

from normfree.nn.blocks import Bias, PostActivationBlock, PreActivationBlock, SkipInit
from normfree.nn.channel_affine import ChannelAffine
from normfree.nn.conv import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d
from normfree.nn.gains import gain, make_activation
from normfree.nn.gates import EfficientChannelAttention, SqueezeExcite
from normfree.nn.linear import ScaledWSLinear
from normfree.nn.pooling import AveragePool2d, MaxPool2d
from normfree.nn.standardization import standardize
from normfree.nn.transposed import ScaledWSConvTranspose1d, ScaledWSConvTranspose2d, ScaledWSConvTranspose3d
from normfree.nn.variance import VarianceLedger
from normfree.nn.weight_pass import recompute_weights, shared_weights

__all__ = [
    "AveragePool2d",
    "Bias",
    "ChannelAffine",
    "EfficientChannelAttention",
    "MaxPool2d",
    "PostActivationBlock",
    "PreActivationBlock",
    "ScaledWSConv1d",
    "ScaledWSConv2d",
    "ScaledWSConv3d",
    "ScaledWSConvTranspose1d",
    "ScaledWSConvTranspose2d",
    "ScaledWSConvTranspose3d",
    "ScaledWSLinear",
    "SkipInit",
    "SqueezeExcite",
    "VarianceLedger",
    "gain",
    "make_activation",
    "recompute_weights",
    "shared_weights",
    "standardize",
]
