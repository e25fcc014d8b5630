"""The layers of a converted network, made from those that they replace."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.nn import (
    ScaledWSConv1d,
    ScaledWSConv2d,
    ScaledWSConv3d,
    ScaledWSConvTranspose1d,
    ScaledWSConvTranspose2d,
    ScaledWSConvTranspose3d,
    ScaledWSLinear,
)
from normfree.nn.conv import SameConv2d
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.surgery import arguments_of, kind_of, take_place
from normfree.trace.preparation import is_quantized

_SCALED: dict[type[nn.Module], type[ScaledWS]] = {
    layer.__bases__[-1]: layer
    for layer in (
        ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, ScaledWSConvTranspose1d, ScaledWSConvTranspose2d,
        ScaledWSConvTranspose3d, ScaledWSLinear,
    )
}  # fmt: skip
_CONVOLUTION = nn.modules.conv._ConvNd
_OWN_FORWARD = "its forward was replaced"
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_SPACE: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (), nn.BatchNorm2d: (2, 2), nn.BatchNorm3d: (2, 2, 2)}


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
    if is_quantized(module):
        return f"it is quantized ({type(module).__module__}.{type(module).__name__})"
    kind = kind_of(module)
    if kind is None:
        return f"its weight is used by a {type(module).__name__}, which is no layer of torch.nn: a functional call"
    if "weight" not in module._parameters:
        return "its weight is parametrized"
    weight: Any = module.weight
    if weight.numel() > 1 and bool((weight == weight.flatten()[0]).all()):
        return "its weight is constant: without its mean it is zero"
    if "forward" in vars(module):
        return _OWN_FORWARD
    own = (module._parameters.keys() | module._buffers.keys() | module._modules.keys()) - {"weight", "bias"}
    if own:
        return f"it holds {', '.join(sorted(own))} besides weight and bias"
    if _is_same(module):
        return ""
    if any(getattr(type(module), name, None) is not getattr(kind, name, None) for name in ("forward", "_conv_forward")):
        return f"a {type(module).__name__} computes something of its own"
    return ""


def norm_refusal(norm: Any) -> str:
    """Why a normalizer cannot be taken away; "" if it can.

    Classes that add an activation to BatchNorm, or compute it faster, are many: what theirs do is tried on numbers.
    """
    if "forward" in vars(norm):
        return _OWN_FORWARD
    if not isinstance(norm, _BATCH_NORM) or type(norm).forward is _BATCH_NORM.forward:
        return ""
    trial: Any = copy.deepcopy(norm).eval().float()
    mean, variance, weight, bias = trial.running_mean, trial.running_var, trial.weight, trial.bias
    space = next((space for kind, space in _SPACE.items() if isinstance(norm, kind)), (2, 2))
    like = next((t for t in (mean, weight) if t is not None), torch.empty(0))
    x = torch.randn(8, trial.num_features, *space, generator=torch.Generator().manual_seed(0)).to(like.device)
    with torch.no_grad():
        try:
            found = type(trial).forward(trial, x.clone())
            expected = F.batch_norm(x, mean, variance, weight, bias, training=mean is None, eps=trial.eps)
            expected = without(trial, Removed("", copied=False))(expected)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        except (AssertionError, RuntimeError, TypeError, ValueError):
            return f"a {type(norm).__name__} computes something of its own"
    return ""


def is_depthwise(module: Any) -> bool:
    """Whether it is a convolution with one channel per group."""
    return isinstance(module, _CONVOLUTION) and module.groups == module.in_channels > 1


def fan_in(module: Any) -> int:
    """Weights of a filter, of a weight layer that is not refused."""
    return int(module.weight.numel()) // out_channels(module)


def out_channels(module: Any) -> int:
    """Of a weight layer that is not refused."""
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


@dataclass(frozen=True)
class Removed:
    """How one normalizer is taken away."""

    path: str
    copied: bool  # what follows writes into its input, which others need


class Copy(nn.Module):
    """What stands for a normalizer whose output is written into."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def scaled(plain: Any, planned: Planned) -> ScaledWS:
    """The layer with scaled weight standardization; it holds the same weight."""
    weight = plain.weight
    kind = kind_of(plain)
    if kind is None:
        raise ValueError(f"{planned.path} is a {type(plain).__name__}, no weight layer")
    arguments = arguments_of(plain)
    if _is_same(plain):
        arguments["padding"] = "same"
    with torch.random.fork_rng(devices=[]):
        layer = _SCALED[kind](
            **arguments, bias=planned.bias, device=weight.device, dtype=weight.dtype,
            skip_gain=1.0 if planned.skip_gain else None, standardize=planned.standardize,
        )  # fmt: skip
    layer.weight = weight
    if planned.bias and plain.bias is not None:
        layer.bias = plain.bias
    for parameter in layer.parameters():  # of a frozen layer the new ones are frozen too
        if parameter is not plain.bias:
            parameter.requires_grad_(weight.requires_grad)
    return layer.train(plain.training)


def without(norm: Any, removed: Removed) -> nn.Module:
    """What is left of a normalizer: its dropout and its activation where it has them, else the identity."""
    rest: list[nn.Module] = [Copy()] if removed.copied else []
    rest += [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(part, nn.Module)]
    rest = [part for part in rest if not isinstance(part, nn.Identity)]
    left = nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)
    return left.train(norm.training)


def put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """`new` wherever `old` stands, with what was hung on that."""
    take_place(old, new)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _is_same(conv: nn.Module) -> bool:
    """Whether it pads as TensorFlow does."""
    if type(conv) is SameConv2d:
        return conv.padding == "same"
    return type(conv).__name__ == "Conv2dSame" and isinstance(conv, nn.Conv2d)
