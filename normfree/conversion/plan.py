"""Which modules are replaced by what: decided once, from the structure, and written down so that it can be repeated."""

import dataclasses
import fnmatch
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normfree.conversion.replacement import (
    Planned,
    Removed,
    fan_in,
    is_depthwise,
    norm_refusal,
    out_channels,
    put,
    refusal,
    scaled,
    without,
)
from normfree.conversion.structure import Structure
from normfree.nn.scaled_layer import ScaledWS


@dataclass(frozen=True)
class Change:
    """What was done with one layer, and why."""

    path: str
    layer: str  # its class
    action: Literal["replaced", "removed", "kept"]
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What is replaced in a network, by paths of modules."""

    layers: tuple[Planned, ...]
    removed: tuple[Removed, ...]
    settled: tuple[str, ...]  # activations that no longer write into their input, since others need it now

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises ValueError for what is no plan."""
        try:
            plan = json.loads(text)
            layers = tuple(Planned(**layer) for layer in plan["layers"])
            return cls(layers, tuple(Removed(**norm) for norm in plan["removed"]), tuple(plan["settled"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"it holds no plan of a conversion ({error!r})") from error

    def apply(self, model: nn.Module, *, computing: bool = False) -> dict[str, ScaledWS]:
        """Replace the modules; the new weight layers by path. With `computing` they do what their normalizers did.

        Raises ValueError for a network that has others.
        """
        modules = dict(model.named_modules())
        wanted = {planned.path for planned in self.layers} | {norm.path for norm in self.removed} | set(self.settled)
        if not wanted <= modules.keys():
            raise ValueError(f"{type(model).__name__} has no {min(wanted - modules.keys())}")
        for path in self.settled:
            modules[path].inplace = False
        layers = {}
        users = Counter(id(p) for module in model.modules() for p in module._parameters.values())
        for planned in self.layers:
            layer = layers[planned.path] = scaled(modules[planned.path], planned)
            if planned.norm is not None:
                _take_over(layer, *_affine(modules[planned.norm]))
                if computing:
                    _compute(layer, modules[planned.path], modules[planned.norm])
            if planned.standardize and users[id(layer.weight)] == 1:  # another module's weight stays as it is
                _normalize(layer)
            put(model, modules[planned.path], layer)
        for norm in self.removed:
            put(model, modules[norm.path], without(modules[norm.path], norm))
        return layers


def kept_norms(
    model: nn.Module, structure: Structure, norms: set[str], exclude: Sequence[str], *, exactly: bool
) -> dict[str, str]:
    """Normalizers that stay, and why: a weight layer whose output they normalize cannot be replaced.

    With `exactly` those too of which no layer can take over what they do in eval mode.
    """
    kept: dict[str, str] = {}
    for path in sorted(norms):
        sources = structure.sources.get(path)
        if _excluded(path, exclude):
            kept[path] = "excluded"
        elif sources is None:
            kept[path] = "did not run on these inputs"
        elif not sources:
            kept[path] = "no weight layer before it: it normalizes the network's input"
        elif path in structure.of_input:
            kept[path] = "it normalizes the network's input too, past all weight layers"
        elif why := norm_refusal(model.get_submodule(path)):
            kept[path] = why
        else:
            for source in sorted(sources):
                why = "excluded" if _excluded(source, exclude) else refusal(model.get_submodule(source))
                if why:
                    kept[path] = f"normalizes the output of {source or 'the model'}: {why}"
                    break
        if exactly and path not in kept:
            if _carrier(model, structure, path) is None:
                kept[path] = "no single layer can do what it does: it takes no layer's output as it is"
            elif getattr(model.get_submodule(path), "running_var", None) is None:
                kept[path] = "it has no running statistics"
    return kept


def make_plan(
    model: nn.Module, structure: Structure, removed: Sequence[str], *, exactly: bool, scale_depthwise: bool
) -> Plan:
    """The plan that removes these normalizers, or with `exactly` has layers do what they do in eval mode."""
    norm_of = {_carrier(model, structure, norm): norm for norm in removed}
    layers, norms, settled = [], [], []
    for path in dict.fromkeys(layer for norm in removed for layer in sorted(structure.sources[norm])):
        layer: Any = model.get_submodule(path)
        norm = norm_of.get(path)
        # A bias before a normalizer is without effect; after it comes the normalizer's.
        bias = layer.bias is not None if norm is None else _affine(model.get_submodule(norm))[1] is not None
        # A filter of one weight is nothing without its mean.
        standardize = not exactly and not (scale_depthwise and is_depthwise(layer)) and fan_in(layer) > 1
        layers.append(Planned(path, norm, bias or exactly, path in structure.ends, standardize))
    for path in removed:
        # What a convolution returns to its normalizer alone may be overwritten; a stream may not.
        writers = set() if path in structure.direct else structure.overwritten.get(path, set())
        switches = [writer for writer in sorted(writers) if hasattr(model.get_submodule(writer), "inplace")]
        settled += switches
        norms.append(Removed(path, copied=len(switches) < len(writers)))
    return Plan(tuple(layers), tuple(norms), tuple(dict.fromkeys(settled)))


def list_changes(model: nn.Module, plan: Plan, kept: dict[str, str]) -> tuple[Change, ...]:
    """What the plan does to each layer, in the model's order; before it is applied."""
    found: dict[str, tuple[Literal["replaced", "removed", "kept"], str]] = {
        path: ("kept", why) for path, why in kept.items()
    }
    for planned in plan.layers:
        found[planned.path] = ("replaced", "ends a residual branch" * planned.skip_gain)
    carried = {planned.norm for planned in plan.layers}
    for norm in plan.removed:
        weight, bias = _affine(model.get_submodule(norm.path))
        neutral = (weight is None or bool((weight == 1).all())) and (bias is None or not bool(bias.any()))
        lost = norm.path not in carried and not neutral
        found[norm.path] = ("removed", "its scale and shift are lost: no single layer can carry them" * lost)
    order = [path for path, _ in model.named_modules() if path in found]
    return tuple(Change(path, type(model.get_submodule(path)).__name__, *found[path]) for path in order)


def _carrier(model: nn.Module, structure: Structure, norm: str) -> str | None:
    """The weight layer, one that can be replaced, whose gain and bias can be the normalizer's scale and shift."""
    layer = structure.direct.get(norm)
    weight, _ = _affine(model.get_submodule(norm))
    if layer is None or weight is None:
        return layer
    # A reshape may stand between them, so that it scales other channels.
    return layer if weight.shape == (out_channels(model.get_submodule(layer)),) else None


def _affine(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Its scale and shift."""
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def _take_over(layer: ScaledWS, weight: Tensor | None, bias: Tensor | None) -> None:
    """A normalizer's scale and shift as gain and bias, trained if they were; a scale of 0 closes a branch instead."""
    with torch.no_grad():
        if weight is not None and layer.skip_gain is not None and not bool(weight.any()):
            layer.skip_gain.zero_()
        elif weight is not None:
            layer.gain.copy_(weight)
        if layer.bias is not None and bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone().to(layer.weight), requires_grad=bias.requires_grad)
    layer.gain.requires_grad_(weight is not None and weight.requires_grad)
    if layer.skip_gain is not None:
        layer.skip_gain.requires_grad_(layer.weight.requires_grad or layer.gain.requires_grad)


def _compute(layer: ScaledWS, plain: Any, norm: Any) -> None:
    """Gains, common scale and bias such that the layer does what `plain` and then `norm`, in eval mode, do."""
    with torch.no_grad():
        scales = (norm.running_var.double() + norm.eps).rsqrt()
        common = scales.log().mean().exp()  # so that gains are about as large as the normalizer's
        weight, shift = _affine(norm)
        slopes = scales if weight is None else scales * weight
        if layer.skip_gain is not None:
            layer.skip_gain.fill_(1)
        layer.in_scale.copy_(common)
        layer.gain.copy_(slopes / common)
        mean = norm.running_mean.double() - (0 if plain.bias is None else plain.bias)
        assert layer.bias is not None
        layer.bias.copy_((0 if shift is None else shift) - slopes * mean)


def _normalize(layer: ScaledWS) -> None:
    """Filters of unit norm on average: standardization ignores their norm, but a learning rate acts through it."""
    with torch.no_grad():
        filters = layer.filters(layer.weight).flatten(1)
        norm = (filters - filters.mean(1, keepdim=True)).square().sum(1).mean().sqrt()
        layer.weight.div_(norm if norm > 0 else 1)


def _excluded(path: str, exclude: Sequence[str]) -> bool:
    parts = path.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in exclude)
