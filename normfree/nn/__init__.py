"""What a normalizer-free network is made of."""

from normfree.nn.blocks import MaxPool2d, PreActivationBottleneck, SqueezeExcite
from normfree.nn.conv import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d
from normfree.nn.gain import gain, make_activation
from normfree.nn.standardize import standardize
from normfree.nn.variance import VarianceLedger

__all__ = [
    "MaxPool2d",
    "PreActivationBottleneck",
    "ScaledWSConv1d",
    "ScaledWSConv2d",
    "ScaledWSConv3d",
    "SqueezeExcite",
    "VarianceLedger",
    "gain",
    "make_activation",
    "standardize",
]
