"""The decision: which normalizers go and which stay, and what becomes of each layer."""

import copy
import fnmatch
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.conversion.plan import Change, Plan, PlannedLayer, RemovedNorm
from normfree.conversion.replacement import affine_in_eval_mode, affine_of, is_bounded, pads_same, remainder
from normfree.conversion.structure import Structure
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.surgery import kind_of
from normfree.trace.preparation import is_quantized

_CONVOLUTION = nn.modules.conv._ConvNd
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm
_FORWARDS = {_BATCH_NORM.forward, _INSTANCE_NORM.forward, nn.GroupNorm.forward, nn.LayerNorm.forward}
_SPACE: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (), nn.BatchNorm2d: (2, 2), nn.BatchNorm3d: (2, 2, 2),
    nn.InstanceNorm1d: (4,), nn.InstanceNorm2d: (4, 4), nn.InstanceNorm3d: (4, 4, 4),
}  # fmt: skip
_OWN_FORWARD = "its forward was replaced"


def kept_norms(
    model: nn.Module, structure: Structure, norms: set[str], exclude: Sequence[str], *, exactly: bool
) -> dict[str, str]:
    """Find the normalizers that stay, and why: a weight layer whose output they normalize cannot be replaced.

    With `exactly` those that have no running statistics.
    """
    kept = {}
    for path in sorted(norms):
        reason = _reason_to_stay(model, structure, path, exclude)
        if exactly and not reason and getattr(model.get_submodule(path), "running_var", None) is None:
            reason = "it has no running statistics"
        if not exactly and not reason:
            reason = _reason_to_need_it(model, structure, path, exclude)
        if reason:
            kept[path] = reason
    return kept


def affine_norms(
    model: nn.Module, structure: Structure, norms: Sequence[str], exclude: Sequence[str]
) -> dict[str, str]:
    """Find those of the normalizers of which no layer can take over what they do in eval mode, and why."""
    found = {}
    for path in norms:
        if reason := _reason_to_need_it(model, structure, path, exclude):
            found[path] = reason
        elif (layer := structure.shared.get(path)) is not None:
            found[path] = f"the output of {layer}, which it takes, is used elsewhere too, or leaves the network"
        elif _carrier(model, structure, path) is None:
            found[path] = "it takes no layer's output as it is, channels in their order"
    return found


def _reason_to_stay(model: nn.Module, structure: Structure, path: str, exclude: Sequence[str]) -> str:
    """Say why a normalizer cannot be replaced by anything; "" if it can."""
    if is_excluded(path, exclude):
        return "excluded"
    if structure.sources.get(path) is None:
        past = "its forward is called past the module, as by `norm.forward(x)`: call the module itself, `norm(x)`"
        return past if path in structure.used else "did not run on these inputs"
    return norm_refusal(model.get_submodule(path))


def _reason_to_need_it(model: nn.Module, structure: Structure, path: str, exclude: Sequence[str]) -> str:
    """Say why the layers before a normalizer cannot do without it; "" if they can."""
    sources = structure.sources[path]
    if not sources:
        return "no weight layer before it: it normalizes the network's input"
    if path in structure.of_input:
        return "it normalizes the network's input too, past all weight layers"
    for source in sorted(sources):
        reason = (
            "excluded"
            if is_excluded(source, exclude)
            else layer_refusal(
                model.get_submodule(source), source in structure.padded, _inside(structure.sources, source)
            )
        )
        if reason:
            return f"normalizes the output of {source or 'the model'}: {reason}"
    return ""


def make_plan(
    model: nn.Module,
    structure: Structure,
    removed: Sequence[str],
    affine: Collection[str],
    *,
    exactly: bool,
    scale_depthwise: bool,
) -> Plan:
    """Make the plan that removes normalizers, or with `exactly` has layers do what they do in eval mode.

    In the place of those that are `affine` too stands what they do.
    """
    gone = [path for path in removed if path not in affine]
    norm_of = {_carrier(model, structure, norm): norm for norm in gone}
    layers, norms, settled = [], [], []
    for path in dict.fromkeys(layer for norm in gone for layer in sorted(structure.sources[norm])):
        layer: Any = model.get_submodule(path)
        norm = norm_of.get(path)
        # A bias before a normalizer is without effect; after it comes the normalizer's.
        bias = (
            getattr(layer, "bias", None) is not None
            if norm is None
            else affine_of(model.get_submodule(norm))[1] is not None
        )
        # A filter of one weight is nothing without its mean.
        standardize = not exactly and not (scale_depthwise and is_depthwise(layer)) and fan_in(layer) > 1
        written = computes_its_own(layer)
        layers.append(
            PlannedLayer(
                path,
                norm,
                bias is not None or exactly,
                path in structure.ends and not exactly,
                standardize,
                statistics=exactly and norm is not None,
                written=written,
            )
        )
    for path in gone:
        # What a convolution returns to its normalizer alone may be overwritten; a stream may not.
        writers = set() if path in structure.direct else structure.overwritten.get(path, set())
        switches = [writer for writer in sorted(writers) if hasattr(model.get_submodule(writer), "inplace")]
        settled += switches
        norms.append(RemovedNorm(path, copied=len(switches) < len(writers)))
    norms += [RemovedNorm(path, copied=False, affine=True) for path in removed if path in affine]
    return Plan(tuple(layers), tuple(norms), tuple(dict.fromkeys(settled)))


def list_changes(
    model: nn.Module, plan: Plan, kept: Mapping[str, str], affine: Mapping[str, str]
) -> tuple[Change, ...]:
    """List what the plan does to each layer, in the model's order; before it is applied."""
    found: dict[str, tuple[Literal["replaced", "removed", "kept"], str]] = {
        path: ("kept", why) for path, why in kept.items()
    }
    for planned in plan.layers:
        found[planned.path] = ("replaced", "ends a residual branch" * planned.skip_gain)
    carried = {planned.norm for planned in plan.layers}
    for norm in plan.removed:
        weight, bias = affine_of(model.get_submodule(norm.path))
        neutral = (weight is None or bool((weight == 1).all())) and (bias is None or not bool(bias.any()))
        lost = norm.path not in carried and not neutral
        found[norm.path] = ("removed", "its scale and shift are lost: no single layer can carry them" * lost)
        if norm.affine:
            found[norm.path] = ("replaced", f"by an affine map per channel, of no batch: {affine[norm.path]}")
    order = [path for path, _ in model.named_modules() if path in found]
    return tuple(Change(path, type(model.get_submodule(path)).__name__, *found[path]) for path in order)


def _carrier(model: nn.Module, structure: Structure, norm: str) -> str | None:
    """Return the weight layer whose gain and bias can be the normalizer's scale and shift; None where none can."""
    layer = structure.direct.get(norm)
    weight, _ = affine_of(model.get_submodule(norm))
    if layer is None or weight is None:
        return layer
    # A reshape may stand between them, so that it scales other channels.
    return layer if weight.shape == (out_channels(model.get_submodule(layer)),) else None


def _inside(paths: Iterable[str], module: str) -> set[str]:
    """Return those of the paths that lie in a module, relative to it."""
    return {path.removeprefix(f"{module}.") for path in paths if path.startswith(f"{module}.")}


def layer_refusal(module: nn.Module, padded: bool = False, norms: Collection[str] = ()) -> str:
    """Say why a weight layer cannot be replaced; "" if it can.

    `padded` is what `Structure.padded` says; `norms` are the paths of the normalizers that it holds, as detectron2's.
    """
    if isinstance(module, ScaledWS):
        return "it is scaled and weight-standardized already"
    if is_quantized(module):
        return f"it is quantized ({type(module).__module__}.{type(module).__name__})"
    kind = kind_of(module)
    if kind is None and not (padded and module.weight.ndim == 2):
        return f"its weight is used by a {type(module).__name__}, which is no layer of torch.nn: a functional call"
    if not (bounded := is_bounded(module)) and "weight" not in module._parameters:
        return (
            "its weight is computed from others: make it a parameter first (parametrize.remove_parametrizations, "
            "remove_weight_norm, remove_spectral_norm or prune.remove of torch.nn.utils)"
        )
    weight: Any = module.weight
    if weight.numel() > 1 and bool((weight == weight.flatten()[0]).all()):
        return "its weight is constant: without its mean it is zero"
    if "forward" in vars(module):
        return _OWN_FORWARD
    held = itertools.chain(module.named_parameters(), module.named_buffers())
    own = {name for name, _ in held} | (set() if padded else module._modules.keys())
    if bounded:
        own -= {name for name in own if name.startswith("parametrizations")}
    own = {name for name in own if name not in norms and name.rpartition(".")[0] not in norms}
    if own := own - {"weight", "bias"}:
        return f"it holds {', '.join(sorted(own))} besides weight and bias"
    if padded or not computes_its_own(module):
        return ""
    return f"a {type(module).__name__} computes something of its own"


def computes_its_own(module: Any) -> bool:
    """Tell whether a weight layer's forward is not that of torch's layer."""
    kind = kind_of(module)
    names = ("forward", "_conv_forward")
    return not pads_same(module) and any(getattr(type(module), n, None) is not getattr(kind, n, None) for n in names)


def norm_refusal(norm: Any) -> str:
    """Say why a normalizer cannot be taken away; "" if it can.

    Classes that add an activation to a normalizer, or compute it faster, are many: what theirs do is tried on numbers.
    """
    if "forward" in vars(norm):
        return _OWN_FORWARD
    if type(norm).forward in _FORWARDS:
        return ""
    try:
        with torch.no_grad():
            trial: Any = copy.deepcopy(norm).eval().float()
            like = next(itertools.chain(trial.parameters(), trial.buffers()), torch.empty(0))
            x = torch.randn(*_shape_for(trial), generator=torch.Generator().manual_seed(0)).to(like.device)
            found = type(trial).forward(trial, x.clone())
            expected = remainder(trial, RemovedNorm("", copied=False))(_normalized(trial, x))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return f"a {type(norm).__name__} computes something of its own"
    return ""


def _shape_for(norm: Any) -> tuple[int, ...]:
    """Return the shape of an input of a normalizer."""
    if isinstance(norm, nn.LayerNorm) and not _on_images(norm):
        return (8, 3, *norm.normalized_shape)
    if isinstance(norm, nn.GroupNorm):
        return 8, norm.num_channels, 4, 4
    channels = norm.num_features if isinstance(norm, _BATCH_NORM | _INSTANCE_NORM) else norm.weight.numel()
    space = next((space for kind, space in _SPACE.items() if isinstance(norm, kind)), (2, 2))
    return 8, channels, *space


def _normalized(norm: Any, x: Tensor) -> Tensor:
    """Compute what a normalizer of its kind does in eval mode, without an activation or a dropout that it carries."""
    weight, bias = affine_of(norm)
    eps = getattr(norm, "eps", 1e-5)
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x, norm.num_groups, weight, bias, eps)
    if _on_images(norm):
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, eps).movedim(-1, 1)
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, norm.normalized_shape, weight, bias, eps)
    mean, variance = norm.running_mean, norm.running_var
    if isinstance(norm, _INSTANCE_NORM):
        return F.instance_norm(x, mean, variance, weight, bias, mean is None, eps=eps)
    if mean is None:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    slopes, shifts = (t.view(-1, *[1] * (x.ndim - 2)) for t in affine_in_eval_mode(norm))
    return (x.double() * slopes + shifts).to(x.dtype)


def _on_images(norm: nn.Module) -> bool:
    """Tell whether a LayerNorm normalizes each position of an image over its channels."""
    return "LayerNorm2d" in type(norm).__name__


def is_depthwise(module: Any) -> bool:
    """Tell whether a module is a convolution with one channel per group."""
    return isinstance(module, _CONVOLUTION) and module.groups == module.in_channels > 1


def fan_in(module: Any) -> int:
    """Count the weights of a filter, of a weight layer that is not refused."""
    return int(module.weight.numel()) // out_channels(module)


def out_channels(module: Any) -> int:
    """Count the channels of the output, of a weight layer that is not refused."""
    kind = kind_of(module)
    return int(module.weight.shape[0] if kind in (None, nn.Linear) else module.out_channels)


def is_excluded(path: str, exclude: Sequence[str]) -> bool:
    """Tell whether a module, or one that it is in, matches a path or glob pattern of `exclude`."""
    parts = path.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in exclude)
