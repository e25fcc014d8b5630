"""The layers of a converted network, made from those that they replace."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn import ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d
from normfree.nn.conv import SameConv2d, ScaledWS

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SCALED = (ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d)
_LEFT = {nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear}


@dataclass(frozen=True)
class Planned:
    """How one weight layer is replaced."""

    path: str
    norm: str | None  # path of the normalizer whose scale and shift become its gain and bias
    bias: bool
    skip_gain: bool
    standardize: bool


def refusal(module: nn.Module) -> str:
    """Why a weight layer cannot be replaced; "" if it can."""
    if isinstance(module, ScaledWS):
        return "it is scaled and weight-standardized already"
    if type(module) in _LEFT:
        return f"a {type(module).__name__} is not supported"
    if not isinstance(module, _CONVOLUTIONS):
        return f"its weight is used by a {type(module).__name__}, which is no layer of torch.nn: a functional call"
    if _is_same(module):
        return ""
    kind: Any = next(c for c in _CONVOLUTIONS if isinstance(module, c))
    if type(module).forward is not kind.forward or type(module)._conv_forward is not kind._conv_forward:
        return f"a {type(module).__name__} computes something of its own"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized"
    return ""


@dataclass(frozen=True)
class Removed:
    """How one normalizer is taken away."""

    path: str
    copied: bool  # what follows writes into its input, which others need


class Copy(nn.Module):
    """What stands for a normalizer whose output is written into."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def scaled(conv: Any, planned: Planned) -> ScaledWS:
    """The convolution with scaled weight standardization; it holds the same weight."""
    kind = _SCALED[conv.weight.ndim - 3]
    weight = conv.weight
    with torch.random.fork_rng(devices=[]):
        layer = kind(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
            "same" if _is_same(conv) else conv.padding, conv.dilation, conv.groups, planned.bias, conv.padding_mode,
            device=weight.device, dtype=weight.dtype, skip_gain=1.0 if planned.skip_gain else None,
            standardize=planned.standardize,
        )  # fmt: skip
    layer.weight = weight
    if planned.bias and conv.bias is not None:
        layer.bias = conv.bias
    return layer.train(conv.training)


def without(norm: Any, removed: Removed) -> nn.Module:
    """What is left of a normalizer: its dropout and its activation where it has them, else the identity."""
    rest: list[nn.Module] = [Copy()] if removed.copied else []
    rest += [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(part, nn.Module)]
    rest = [part for part in rest if not isinstance(part, nn.Identity)]
    left = nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)
    return left.train(norm.training)


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """`new` wherever `old` stands."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _is_same(conv: nn.Module) -> bool:
    """Whether it pads as TensorFlow does."""
    if type(conv) is SameConv2d:
        return conv.padding == "same"
    return type(conv).__name__ == "Conv2dSame" and isinstance(conv, nn.Conv2d)
