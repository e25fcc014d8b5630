"""The replacement: layers of a converted network, made from those whose place they take."""

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normfree.conversion.merging import prepare_merging
from normfree.conversion.plan import Plan, PlannedLayer, RemovedNorm
from normfree.nn import (
    ScaledWSConv1d,
    ScaledWSConv2d,
    ScaledWSConv3d,
    ScaledWSConvTranspose1d,
    ScaledWSConvTranspose2d,
    ScaledWSConvTranspose3d,
    ScaledWSLinear,
)
from normfree.nn.channel_affine import ChannelAffine
from normfree.nn.padding import SameConv2d
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.surgery import Removed, constructor_arguments, kind_of, replace_modules
from normfree.nn.weight_pass import attach

_SCALED: dict[type[nn.Module], Any] = {
    layer.__bases__[-1]: layer
    for layer in (
        ScaledWSConv1d, ScaledWSConv2d, ScaledWSConv3d, ScaledWSConvTranspose1d, ScaledWSConvTranspose2d,
        ScaledWSConvTranspose3d, ScaledWSLinear,
    )
}  # fmt: skip
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def apply_plan(plan: Plan, model: nn.Module, *, keep_function: bool = False) -> dict[str, ScaledWS]:
    """Replace the modules that the plan names, and return the new weight layers by path.

    With `keep_function` they do what their normalizers did in eval mode.

    Raises ValueError for a network that has other modules.
    """
    modules = dict(model.named_modules())
    wanted = {planned.path for planned in plan.layers} | {norm.path for norm in plan.removed} | set(plan.settled)
    if not wanted <= modules.keys():
        raise ValueError(f"{type(model).__name__} has no {min(wanted - modules.keys())}")
    for path in plan.settled:
        modules[path].inplace = False
    layers = {}
    replacements: dict[nn.Module, nn.Module] = {}
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for planned in plan.layers:
        layer = layers[planned.path] = replacements[modules[planned.path]] = make_scaled(modules[planned.path], planned)
        if planned.norm is not None:
            _take_over(layer, *affine_of(modules[planned.norm]))
            if keep_function:
                _compute(layer, modules[planned.path], modules[planned.norm])
        if planned.standardize and users[id(layer.weight)] == 1:  # another module's weight stays as it is
            _normalize(layer)
    carriers = {planned.norm: layers[planned.path] for planned in plan.layers}
    for norm in plan.removed:
        rest = replacements[modules[norm.path]] = remainder(modules[norm.path], norm)
        if isinstance(rest, Removed):
            rest.carry_by(carriers.get(norm.path))
    _follow_in_optimizers(model, plan, layers, modules)
    replace_modules(model, replacements)
    if layers:
        attach(model)
    prepare_merging(model)
    return layers


def _follow_in_optimizers(
    model: nn.Module, plan: Plan, layers: Mapping[str, ScaledWS], modules: Mapping[str, nn.Module]
) -> None:
    """Give the new parameters to the optimizers that modules carry, in the place of a normalizer's or by the weight."""
    held = [value for module in model.modules() for value in vars(module).values()]
    optimizers = {id(value): value for value in held if isinstance(value, torch.optim.Optimizer)}
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    left = {id(p) for layer in layers.values() for p in layer.parameters()}
    gone = [modules[norm.path] for norm in plan.removed] + [modules[planned.path] for planned in plan.layers]
    removed = {id(p) for module in gone for p in module.parameters(recurse=False)} - left
    held_already = {id(p) for group in groups for p in group["params"]}
    for planned in plan.layers:
        layer = layers[planned.path]
        norm = [] if planned.norm is None else list(modules[planned.norm].parameters(recurse=False))
        for group in groups:
            known = {id(p) for p in group["params"]}
            if any(id(p) in known for p in norm) or (not norm and id(layer.weight) in known):
                group["params"] += [p for p in layer.parameters() if id(p) not in held_already]
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in removed]


def make_scaled(plain: Any, planned: PlannedLayer) -> ScaledWS:
    """Make the layer with scaled weight standardization that holds the weight of a plain one."""
    weight = plain.weight
    kind = kind_of(plain)
    if kind is None and planned.written:
        kind, arguments = nn.Linear, {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    elif kind is None:
        raise ValueError(f"{planned.path} is a {type(plain).__name__}, no weight layer")
    else:
        arguments = constructor_arguments(plain)
    if pads_same(plain):
        arguments["padding"] = "same"
    # On the meta device no weight is drawn that is not used.
    layer: ScaledWS = _SCALED[kind](
        **arguments, bias=planned.bias, device="meta", dtype=weight.dtype,
        skip_gain=1.0 if planned.skip_gain else None, standardize=planned.standardize,
    )  # fmt: skip
    _fill(layer, weight)
    if planned.statistics:
        layer.hold_statistics()
    if is_bounded(plain):
        _move_bounds(plain, layer)
    else:
        layer.weight = weight
    bias = getattr(plain, "bias", None)
    if planned.bias and bias is not None:
        layer.bias = bias
    if planned.written:
        layer.keep_forward_of(plain)
    for parameter in layer.parameters():  # of a frozen layer the new ones are frozen too
        if parameter is not bias:
            parameter.requires_grad_(weight.requires_grad)
    return layer.train(plain.training)


def _fill(layer: ScaledWS, weight: Tensor) -> None:
    """Make what a layer on the meta device holds besides its weight: gains 1, biases 0, the buffers as they are."""
    for name, parameter in list(layer.named_parameters()):
        if name != "weight":
            fill = weight.new_zeros if name == "bias" else weight.new_ones
            setattr(layer, name, nn.Parameter(fill(parameter.shape)))
    for name, buffer in list(layer.named_buffers()):
        setattr(layer, name, buffer.to(weight.device))


def is_bounded(layer: nn.Module) -> bool:
    """Tell whether a weight is a parameter, but for a bound: a parametrization that leaves small ones alone."""
    bounds: Any = getattr(layer, "parametrizations", None)
    if not parametrize.is_parametrized(layer, "weight"):
        return False
    if len(bounds) > 1 or not bounds.weight.is_tensor:
        return False
    small = value = bounds.weight.original.detach() * 1e-3
    with torch.no_grad():
        for bound in bounds.weight:
            value = copy.deepcopy(bound).eval()(value)  # its own would count this, as spectral_norm does
    return value.shape == small.shape and torch.allclose(value, small, rtol=1e-3, atol=0)


def _move_bounds(plain: Any, layer: ScaledWS) -> None:
    """Make the parameter and the bounds of a layer's weight those of another."""
    bounds = plain.parametrizations.weight
    for bound in bounds:
        parametrize.register_parametrization(layer, "weight", bound, unsafe=True)
    moved: Any = layer.parametrizations
    moved.weight.original = bounds.original


def remainder(norm: Any, removed: RemovedNorm) -> nn.Module:
    """Return what is left of a normalizer, its dropout and its activation, behind what takes its place."""
    parts = [getattr(norm, "drop", None), getattr(norm, "act", None)]
    rest = [part for part in parts if isinstance(part, nn.Module) and not isinstance(part, nn.Identity)]
    if removed.affine:
        rest.insert(0, _affine_for(norm))
        return (rest[0] if len(rest) == 1 else nn.Sequential(*rest)).train(norm.training)
    weight, statistics = affine_of(norm)[0], getattr(norm, "running_var", None)
    channels = next((t.numel() for t in (statistics, weight) if t is not None), getattr(norm, "num_features", 0))
    kind = next((one for one in _BATCH_NORMS if isinstance(norm, one)), None if statistics is None else nn.BatchNorm2d)
    if removed.copied or not rest:
        rest.insert(0, Removed(channels, kind, copies=removed.copied))
    return (rest[0] if len(rest) == 1 else nn.Sequential(*rest)).train(norm.training)


def _affine_for(norm: Any) -> ChannelAffine:
    """Make the map that a normalizer with running statistics is in eval mode."""
    weight, bias = affine_of(norm)
    scale, center = statistics_of(norm)
    layer = ChannelAffine(len(scale), norm.running_var.device, norm.running_var.dtype)
    with torch.no_grad():
        if weight is not None:
            layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
        layer.scale.copy_(scale)
        layer.center.copy_(center)
    for mine, its in ((layer.weight, weight), (layer.bias, bias)):
        mine.requires_grad_(its is not None and its.requires_grad)
    return layer


def statistics_of(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale and center, (C,), float64, of a normalizer in eval mode: weight · scale · (x − center) + bias."""
    with torch.no_grad():
        if isinstance(norm, nn.modules.batchnorm._NormBase):
            mean, variance = norm._buffers["running_mean"], norm._buffers["running_var"]
            assert mean is not None
            assert variance is not None
            return (variance.double() + norm.eps).rsqrt(), mean.double()
        plain = copy.deepcopy(norm)  # without its scale and shift, which may be 0
        for tensor, value in zip(affine_of(plain), (1, 0), strict=True):
            if tensor is not None:
                tensor.fill_(value)
        slopes, shifts = affine_in_eval_mode(plain)
        return slopes, torch.where(slopes == 0, 0.0, -shifts / slopes)


def affine_of(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the scale and the shift of a normalizer."""
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def affine_in_eval_mode(norm: Any) -> tuple[Tensor, Tensor]:
    """Return by what a normalizer with running statistics multiplies each channel in eval mode, and what it adds.

    Frozen normalizers have their eps anywhere, also in the code of their forward: what they do is measured.
    """
    with torch.no_grad():
        alone = isinstance(remainder(norm, RemovedNorm("", copied=False)), nn.Identity)
        if alone and not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            exact: Any = copy.deepcopy(norm).double().eval()
            x = exact.running_mean.new_ones(1, exact.running_mean.numel(), 1, 1)
            at_0, at_1 = exact.forward(torch.zeros_like(x)), exact.forward(x)
            return (at_1 - at_0).flatten().double(), at_0.flatten().double()
        weight, bias = affine_of(norm)
        slopes = (norm.running_var.double() + norm.eps).rsqrt()
        slopes = slopes if weight is None else slopes * weight
        return slopes, (0 if bias is None else bias) - slopes * norm.running_mean.double()


def _take_over(layer: ScaledWS, weight: Tensor | None, bias: Tensor | None) -> None:
    """Make a normalizer's scale and shift gain and bias, trained if they were; a scale of 0 closes a branch instead."""
    with torch.no_grad():
        if weight is not None and layer.skip_gain is not None and not bool(weight.any()):
            layer.skip_gain.zero_()
            layer._initial_skip_gain = 0.0
        elif weight is not None:
            layer.gain.copy_(weight)
        if layer.bias is not None and bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone().to(layer.weight), requires_grad=bias.requires_grad)
    layer.gain.requires_grad_(weight is not None and weight.requires_grad)
    if layer.skip_gain is not None:
        layer.skip_gain.requires_grad_(layer.weight.requires_grad or layer.gain.requires_grad)


def _compute(layer: ScaledWS, plain: Any, norm: Any) -> None:
    """Give a layer with a normalizer's scale and shift its statistics too: it does what `plain` and then `norm` do."""
    scale, center = statistics_of(norm)
    shift, bias = affine_of(norm)[1], getattr(plain, "bias", None)
    with torch.no_grad():
        layer.channel_scale.copy_(scale)
        layer.channel_center.copy_(center if bias is None else center - bias.double())
        if shift is None:  # nothing has trained there, but a bias of the layer's own
            trains = bias is not None and bias.requires_grad
            layer.bias = nn.Parameter(torch.zeros_like(layer.gain), requires_grad=trains)


def _normalize(layer: ScaledWS) -> None:
    """Give filters unit norm on average: standardization ignores their norm, but a learning rate acts through it."""
    with torch.no_grad():
        filters = layer.filters(layer.weight).flatten(1)
        norm = (filters - filters.mean(1, keepdim=True)).square().sum(1).mean().sqrt()
        layer.weight.div_(norm if norm > 0 else 1)


def pads_same(conv: nn.Module) -> bool:
    """Tell whether a convolution pads as TensorFlow does."""
    if type(conv) is SameConv2d:
        return conv.padding == "same"
    return type(conv).__name__ == "Conv2dSame" and isinstance(conv, nn.Conv2d)
