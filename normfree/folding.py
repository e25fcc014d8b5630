"""Effective weights baked into plain layers: the same network, for inference and export."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from normfree.arguments import checked
from normfree.nn.padding import SameConv1d, SameConv2d, SameConv3d
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.surgery import constructor_arguments, copied, kind_of, refuse_sharded, replace_modules
from normfree.nn.weight_pass import detach

# Torch's classes know SAME padding without a stride only.
_STRIDED_SAME: dict[type[nn.Module], Any] = {nn.Conv1d: SameConv1d, nn.Conv2d: SameConv2d, nn.Conv3d: SameConv3d}
# timm's: gain · scale · (W − mean(W)) · rsqrt(var(W) + eps), and the same without gain and scale.
_TIMM_SCALED = ("ScaledStdConv2d", "ScaledStdConv2dSame")
_TIMM_STANDARDIZED = ("StdConv2d", "StdConv2dSame")

# Attributes of our layers and of timm's, which mean nothing to a plain one.
_DROPPED = (
    "_digits", "_initial_skip_gain", "eps", "gain_init", "pads_same", "recompute_weight", "same_pad", "scale",
    "standardize", "written",
)  # fmt: skip


@checked
def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Put a plain layer in the place of every `ScaledWS…` and of timm's `ScaledStdConv2d` and `StdConv2d`.

    The plain layer holds the effective weight and bias, so outputs are equal up to rounding and nothing is computed
    from weights any more. It is of torch's own class (`SameConv2d` where it pads as TensorFlow with a stride), so that
    tools that look for that find it, and TorchScript reads it. The result is in eval mode and its folded parameters
    need no gradient: train the network that it was made from.

    Args:
        model: Network of ours, converted, or of timm's with standardized weights.
        inplace: Fold the model itself rather than a copy.

    Returns:
        The folded network.

    Raises:
        ValueError: Where there is nothing to fold, and for sharded parameters; the model is then as it was.
        TypeError: For a model that cannot be copied.
    """
    refuse_sharded(model)
    model = model if inplace else copied(model)
    replacements: dict[nn.Module, Any] = {}  # a module that stands in several places stays one module
    for module in list(model.modules()):
        if (plain := _folded(module)) is not None:
            replacements[module] = plain
    if not replacements:
        raise ValueError(f"{type(model).__name__} has no layer with scaled standardized weights: nothing to fold")
    detach(model)
    return replace_modules(model, replacements, dropped=_DROPPED).eval()


def has_scaled_layers(model: nn.Module) -> bool:
    """Tell whether `fold` has something to fold."""
    return any(isinstance(module, ScaledWS) or _folded(module) is not None for module in model.modules())


def _folded(module: Any) -> nn.Module | None:
    """Return the plain layer that computes what a module does; None where that is nothing to fold."""
    if isinstance(module, ScaledWS):
        return _plain(module)
    if not isinstance(module, nn.Conv2d) or type(module).__name__ not in _TIMM_SCALED + _TIMM_STANDARDIZED:
        return None
    # Copies of timm's layers under the same name are many: what this one computes is tried.
    plain: Any = _plain(module)
    size = [4 * dilation * kernel for kernel, dilation in zip(module.kernel_size, module.dilation, strict=True)]
    x = torch.randn(1, module.in_channels, *size, generator=torch.Generator().manual_seed(0)).to(module.weight)
    with torch.no_grad():
        same = torch.allclose(plain.forward(x), module.forward(x), rtol=1e-2, atol=1e-2)
    return plain if same else None


def _plain(layer: Any) -> nn.Module:
    with torch.no_grad():
        weight, bias = layer.effective_parameters() if isinstance(layer, ScaledWS) else _timm_parameters(layer)
    if getattr(layer, "written", None) is not None:
        return _written(layer, weight, bias)
    kind: Any = kind_of(layer)
    arguments = constructor_arguments(layer)
    if getattr(layer, "same_pad", False):  # timm's Same variants pad like TensorFlow where their padding is no constant
        arguments["padding"] = "same"
    if arguments.get("padding") == "same" and max(arguments["stride"]) > 1:
        kind = _STRIDED_SAME[kind]
    with torch.device("meta"):
        plain: Any = kind(**arguments, bias=bias is not None)
    plain.weight = nn.Parameter(torch.empty_like(layer.weight).copy_(weight), requires_grad=False)  # in its layout
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain.eval()


def _written(layer: ScaledWS, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return the layer of somebody's class that the layer computes as, with the effective weight and bias."""
    plain: Any = copy.copy(layer.written)
    vars(plain)["_parameters"] = {}
    plain.weight = nn.Parameter(torch.empty_like(layer.weight).copy_(weight), requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain.eval()


def _timm_parameters(conv: Any) -> tuple[Tensor, Tensor | None]:
    """Compute what timm's layers compute with: they add eps where the authors clamp."""
    variance, mean = torch.var_mean(conv.weight, dim=(1, 2, 3), correction=0, keepdim=True)
    weight = (conv.weight - mean) * torch.rsqrt(variance + conv.eps)
    if type(conv).__name__ in _TIMM_SCALED:
        weight = weight * (conv.gain.view(-1, 1, 1, 1) * conv.scale)
    return weight, conv.bias
