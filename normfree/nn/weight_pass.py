"""The weight pass: the effective weights of a network, computed ahead, a group of layers under one autograd node.

What is done to weights takes as long for one image as for a hundred. Layer by layer it is a dozen small operations and
their Python for each. Here the forward pass of a network opens a weight pass, and the first layer of a group that asks
finds the weights of the whole group computed. The order in which layers ask is learned from the pass before.

A layer that is called outside of a pass, or a second time in it, or while somebody else looks at operations or decides
what is kept (compilers, exporters, `torch.func`, activation checkpointing, hooks on saved tensors, dispatch modes,
FSDP), computes its own: the same values and gradients, bit for bit.
"""

import contextlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree import _torch
from normfree.nn.kept_weights import KeptWeights, probes_of
from normfree.nn.scaled_layer import ScaledWS, autocast_dtype, in_force
from normfree.nn.standardization import Effective, Factors, effective_parameters, versions

# Elements of the weights of a group, unless one layer has more: the effective weights of a group and their gradients
# are in memory together, and its gradients leave the backward pass together.
_GROUP = 2**20


class WeightPass:
    """Groups of a network's layers for its weight passes, and the weights that inference keeps.

    It is no part of the network's state: copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self.plan = _Plan()
        self.keep = KeptWeights()

    def __reduce__(self) -> Any:
        return WeightPass, ()

    @contextlib.contextmanager
    def opened(self, network: nn.Module) -> Iterator[None]:
        """Open a pass for the network's forward pass, which runs inside."""
        self.begin(network)
        try:
            yield
        finally:
            self.end(network)

    def begin(self, network: nn.Module, args: Any = ()) -> None:
        """Open a pass, unless layers compute their own weights, or those that `shared_weights` holds are used."""
        replica = getattr(network, "_is_replica", False)  # DataParallel's, in a thread
        if replica or isinstance(in_force.source, _Shared) or not _may_compute_ahead():
            return
        if network.training:
            self.keep.kept.clear()
        keeps = not (network.training or torch.is_grad_enabled())
        in_force.source = _Pass(self, in_force.source, self.keep if keeps else None)

    def end(self, network: nn.Module, args: Any = (), output: Any = None) -> None:
        """Close the pass that `begin` has opened, and those inside of it that never ended."""
        if torch.compiler.is_compiling():
            return
        source = in_force.source
        while isinstance(source, _Pass) and source.owner is not self:
            source = source.before
        if isinstance(source, _Pass):
            source.close()
            in_force.source = source.before


def _may_compute_ahead() -> bool:
    """Tell whether operations just run: none is traced, nor captured into a CUDA graph, which can hold no addresses."""
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return _torch.only_eager() and not _torch.shards() and not captured


class _Plan:
    """Layers in groups, whose weights are computed together. It is replaced, not changed: threads may be using it."""

    def __init__(self, layers: Sequence[ScaledWS] = ()) -> None:
        self.groups: list[list[ScaledWS]] = []
        self.group_of: dict[ScaledWS, int] = {}
        room = 0
        for layer in layers:
            room -= layer.weight.numel()
            if room < 0 or not self.groups:
                self.groups.append([])
                room = _GROUP - layer.weight.numel()
            self.groups[-1].append(layer)
            self.group_of[layer] = len(self.groups) - 1


def attach(network: nn.Module) -> None:
    """Open a weight pass whenever the network is called, by hooks; a network of ours has its own without."""
    detach(network)
    if not any(isinstance(value, WeightPass) for value in vars(network).values()):
        weight_pass = WeightPass()
        network.register_forward_pre_hook(weight_pass.begin)
        network.register_forward_hook(weight_pass.end, always_call=True)


def detach(network: nn.Module) -> None:
    """Undo `attach`, for all modules of the network."""
    for module in network.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), WeightPass):
                    del hooks[number]
                    module._forward_hooks_always_called.pop(number, None)


class _Waiting(NamedTuple):
    """An effective weight that waits for its layer, and what it was computed from."""

    effective: Effective
    sources: tuple[Any, ...]
    versions: int

    def holds(self, layer: ScaledWS) -> bool:
        """Tell whether the layer still has what it had then, and computes with this dtype."""
        dtype, sources = self.effective.weight.dtype, _sources(layer)
        return (
            all(map(operator.is_, sources, self.sources))
            and versions(sources) == self.versions
            and (dtype is self.sources[0].dtype or dtype is autocast_dtype(self.sources[0]))
        )


def _sources(layer: ScaledWS) -> tuple[Any, ...]:
    """Return what the effective weight and bias depend on, in the order of `Factors`."""
    of, scales = layer._parameters.get, layer._buffers.get
    return of("weight"), of("gain"), of("bias"), of("skip_gain"), scales("in_scale"), scales("out_scale")


def _kind(layer: ScaledWS, sources: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return what layers that are computed together have in common; None where a layer must compute its own."""
    weight, gain, bias, skip_gain, in_scale, out_scale = sources
    if weight is None or gain is None or in_scale is None or out_scale is None:
        return None
    dtype, of_scales = weight.dtype, in_scale.dtype
    alike = (
        type(weight) is type(gain) is nn.Parameter
        and gain.dtype is dtype
        and (bias is None or (type(bias) is nn.Parameter and bias.dtype is dtype))
        and (skip_gain is None or (type(skip_gain) is nn.Parameter and skip_gain.dtype is dtype))
        and out_scale.dtype is of_scales
        and weight.numel() > 0
        and layer.standardize
        and not layer._forward_pre_hooks  # which may set the weight
        and "parametrizations" not in layer._modules
    )
    kernels = layer.kernels() if alike and not layer.recompute_weight else None
    if kernels is not None:
        return kernels, weight.device, dtype, of_scales, layer.eps
    return (None, dtype) if alike and weight.is_cpu and of_scales is dtype else None


def _wait(layers: Sequence[ScaledWS], keep: KeptWeights | None = None) -> dict[ScaledWS, _Waiting]:
    """Compute W_eff and b_eff of the layers that can wait, but for those that `keep` has."""
    found: dict[ScaledWS, tuple[Any, ...]] = {}
    groups: dict[tuple[Any, ...], list[ScaledWS]] = {}
    for layer in layers:
        sources = _sources(layer)
        kind = _kind(layer, sources)
        if kind is not None:
            found[layer] = sources
            groups.setdefault(kind, []).append(layer)
    probes = {} if keep is None else probes_of(found)
    effective = {} if keep is None else keep.unchanged(probes)
    for (kernels, *_), members in groups.items():
        fresh = [layer for layer in members if layer not in effective] if effective else members
        if fresh:
            computed = dict(zip(fresh, _compute(kernels, fresh, found), strict=True))
            effective.update(computed)
            if keep is not None:
                keep.add(computed, probes)
    return {layer: _Waiting(effective[layer], sources, versions(sources)) for layer, sources in found.items()}


def _compute(kernels: Any, layers: Sequence[ScaledWS], found: dict[ScaledWS, tuple[Any, ...]]) -> Iterable[Effective]:
    if kernels is not None:
        group = [Factors._make((layer.filters(found[layer][0]), *found[layer][1:], layer.eps)) for layer in layers]
        dtype = autocast_dtype(group[0].weight)
        return (Effective(weight, bias, None) for weight, bias in kernels.effective_parameters(group, dtype))
    group = []
    for layer in layers:
        weight, gain, bias, skip_gain, before, after = found[layer]
        group.append(Factors(layer.filters(weight), gain, bias, skip_gain, before.item(), after.item(), layer.eps))
    return (
        Effective(layer.unfilters(weight), bias, scale)
        for layer, (weight, bias, scale) in zip(layers, effective_parameters(group), strict=True)
    )


class _Pass:
    """One forward pass of a network."""

    def __init__(self, owner: WeightPass, before: Any, keep: KeptWeights | None) -> None:
        self.owner = owner
        self.plan = owner.plan
        self.before = before
        self.keep = keep
        self.derives = torch.is_grad_enabled()
        self.asked: dict[ScaledWS, None] = {}
        self.computed: set[int] = set()
        self.waiting: dict[ScaledWS, _Waiting] = {}
        self.disturbed = False

    def take(self, layer: ScaledWS) -> Effective | None:
        """Return what was computed ahead for the layer; None where it must compute its own."""
        if torch.is_grad_enabled() is not self.derives or not _torch.nobody_watches():
            self.disturbed = True
            return None
        if layer in self.asked:
            return None
        self.asked[layer] = None
        group = self.plan.group_of.get(layer)
        if group is None:
            return None
        if group not in self.computed:
            self.computed.add(group)
            self.waiting.update(_wait(self.plan.groups[group], self.keep))
        found = self.waiting.pop(layer, None)
        return found.effective if found is not None and found.holds(layer) else None

    def close(self) -> None:
        """Learn the order in which layers have asked, if all that ran could."""
        known = self.plan.group_of
        layers = [layer for layer in self.asked if layer in known or _kind(layer, _sources(layer))]
        if not self.disturbed and layers != list(known):
            self.owner.plan = _Plan(layers)


class _Shared:
    """Effective weights for all calls in a context, whose gradients are collected until its end."""

    def __init__(self, network: nn.Module) -> None:
        layers = [module for module in network.modules() if isinstance(module, ScaledWS)]
        self.plan = _Plan([layer for layer in layers if _kind(layer, _sources(layer))])
        self.derives = torch.is_grad_enabled()
        self.waiting: dict[ScaledWS, _Waiting] = {}
        self.pairs: list[tuple[Tensor, Tensor]] = []  # what was computed, and the leaf that stands for it
        self.ended = False

    def take(self, layer: ScaledWS) -> Effective | None:
        """Return what all calls share; None where the layer must compute its own."""
        group = self.plan.group_of.get(layer)
        if group is None or (torch.is_grad_enabled() and not self.derives) or not _torch.nobody_watches():
            return None
        if layer not in self.waiting:
            with torch.set_grad_enabled(self.derives):
                found = _wait([one for one in self.plan.groups[group] if one not in self.waiting])
            self.waiting.update(
                (one, waiting._replace(effective=self._leaves(waiting.effective))) for one, waiting in found.items()
            )
        waiting = self.waiting.get(layer)
        return waiting.effective if waiting is not None and waiting.holds(layer) else None

    def _leaves(self, effective: Effective) -> Effective:
        weight, bias, _ = effective
        return Effective(self._leaf(weight), None if bias is None else self._leaf(bias), None)

    def _leaf(self, result: Tensor) -> Tensor:
        if not result.requires_grad:
            return result
        leaf = result.detach().requires_grad_()
        leaf.register_hook(self._refuse_late)
        self.pairs.append((result, leaf))
        return leaf

    def _refuse_late(self, grad: Tensor) -> None:
        if self.ended:
            raise RuntimeError("the backward pass of a loss from within `shared_weights` must end within it, too")

    def collect(self) -> None:
        """Take the gradients on to the parameters."""
        self.ended = True
        found = [(result, leaf.grad) for result, leaf in self.pairs if leaf.grad is not None]
        if found:
            results, grads = zip(*found, strict=True)
            torch.autograd.backward(results, grads)


@contextlib.contextmanager
def shared_weights(network: nn.Module) -> Iterator[None]:
    """Compute the effective weights of a network once for all forward and backward passes inside.

    For accumulated gradients, several views, a discriminator on real and on fake images, a recurrent use. Parameters
    of `ScaledWS…` layers have their gradients when the context ends: sums over all of it, exact. Until then
    `parameter.grad` is without them, `torch.autograd.grad` does not reach them, and no optimizer may step:
    `with shared_weights(model):` stands around the parts of a step, and `optimizer.step()` after it.

    Layers whose weights cannot be shared, as under `torch.compile` or activation checkpointing, compute their own.

    Args:
        network: Network of ours, or converted.

    Raises:
        RuntimeError: From a backward pass after the end, or where a parameter was changed inside.
    """
    if isinstance(in_force.source, _Shared) or not _may_compute_ahead():
        yield
        return
    before, in_force.source = in_force.source, _Shared(network)
    shared = in_force.source
    try:
        yield
        in_force.source = before
        shared.collect()
    finally:
        in_force.source = before
        shared.ended = True


def recompute_weights(network: nn.Module, always: bool = True) -> None:
    """Choose whether no effective weight is kept for the backward pass: the least memory for one or two images.

    By default one is kept that is small, far smaller than its layer's input, or applied to few positions.

    Args:
        network: Network of ours, or converted; changed in place.
        always: False for the default.
    """
    for module in network.modules():
        if isinstance(module, ScaledWS):
            module.recompute_weight = always
