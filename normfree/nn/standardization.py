"""Scaled weight standardization: the formula, on the fastest torch kernel that gives it exactly."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree import _torch
from normfree.nn.filter_kernels import StandardizedFilters, clamp_all
from normfree.nn.group_layout import layout_of

EPS = 1e-4
"""The clamp of the authors' code, on N · var(W)."""


def standardize(weight: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    """Compute scale ⊙ (W − mean(W)) · rsqrt(max(N · var(W), eps)) per output channel (Brock et al. 2021, equation 3).

    Mean and (biased) variance are over everything but the output channel, N = fan-in. Half-precision weights are
    standardized in float32. Filters whose variance overflows become NaN. Derivatives of every order exist, those of
    `torch.func` too.

    Args:
        weight: Filters, `(out_channels, in_channels / groups, *kernel_size)`.
        scale: Factor of each filter, (out_channels,).
        eps: Clamp on N · var(W).

    Returns:
        A tensor of the weight's shape and dtype.

    Raises:
        TypeError: For what is no tensor of floating-point numbers, and an eps that is no number.
        ValueError: For a scale that is not one factor for each filter.
    """
    for name, value in (("weight", weight), ("scale", scale)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} is no tensor of floating-point numbers, but a {type(value).__name__}")
    if not isinstance(eps, int | float):
        raise TypeError(f"eps is a {type(eps).__name__}; it must be a number")
    if weight.ndim < 2 or scale.shape != weight.shape[:1] or not weight.numel():
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and scale {tuple(scale.shape)}: one factor per filter"
        )
    return standardized(weight, scale, eps)


def standardized(weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute what `standardize` does, without a look at the arguments."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        return standardized(weight.float(), scale.float(), eps).to(weight.dtype)
    factors = Factors(weight, scale.to(weight.dtype), eps=eps)
    return effective_parameters([factors])[0].weight if computes_fast(factors) else composed(factors)[0]


class Factors(NamedTuple):
    """Factors of W_eff and b_eff; the scales are numbers, or for `composed` scalar tensors."""

    weight: Tensor  # filters, (out_channels, …)
    gain: Tensor  # (out_channels,)
    bias: Tensor | None = None  # (out_channels,)
    skip_gain: Tensor | None = None  # (1,)
    in_scale: Any = 1.0
    out_scale: Any = 1.0
    eps: float = EPS


class Effective(NamedTuple):
    """W_eff and b_eff: the parameters of an equal plain layer."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None  # (out_channels,): what `standardized_again` needs; None where nothing is computed again


def composed(factors: Factors) -> tuple[Tensor, Tensor | None]:
    """Compute W_eff and b_eff by elementary operations: compilers fuse them, all of torch derives them."""
    weight, gain, bias, skip_gain, in_scale, out_scale, eps = factors
    out = out_scale if skip_gain is None else out_scale * skip_gain.squeeze(0)
    axes = tuple(range(1, weight.ndim))
    centred = weight - weight.mean(axes, keepdim=True)
    norm = centred.square().sum(axes)
    rstd = torch.where(norm == math.inf, math.nan, norm.clamp(min=eps).rsqrt())
    scale = gain * (in_scale * out) * rstd
    return centred * scale.view(-1, *[1] * len(axes)), None if bias is None else bias * out


def computes_fast(factors: Factors) -> bool:
    """Tell whether `effective_parameters` can be given these: plain tensors of one dtype, where operations just run."""
    weight = factors.weight
    return (
        weight.is_cpu
        and weight.dtype in (torch.float32, torch.float64)
        and weight.numel() > 0
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype is weight.dtype for t in factors[:4] if t is not None)
        and _torch.only_eager()
    )


def effective_parameters(group: Sequence[Factors]) -> list[Effective]:
    """Compute W_eff and b_eff of several layers, under one autograd node.

    Losses that depend on different ones may go backward one after the other. Derivatives of every order exist.

    Args:
        group: Factors of each layer, which `computes_fast`, of one dtype.

    Returns:
        W_eff, in the layout of the weight, and b_eff of each.
    """
    if not torch.is_grad_enabled():
        done = _Computed(group)
        return list(map(Effective, done.weights, done.biases, done.scales))
    scales: list[Tensor | None] = []
    found = _Effective.apply(group, scales, *itertools.chain.from_iterable(factors[:4] for factors in group))
    # A bias that nothing multiplies is its own effective bias.
    biases = [f.bias if bias is None else bias for f, bias in zip(group, found[1::2], strict=True)]
    return list(map(Effective, found[::2], biases, scales))


def versions(tensors: Iterable[Tensor | None]) -> int:
    """Return a number that grows when one of the tensors is written into; made in inference mode they have none."""
    found = [tensor for tensor in tensors if tensor is not None]
    try:
        return sum([tensor._version for tensor in found])
    except RuntimeError:
        return sum(tensor._version for tensor in found if not tensor.is_inference())


def refuse_changed(group: Sequence[Factors], before: int) -> None:
    """Raise RuntimeError if the versions of the group's parameters are not as they were."""
    if versions(itertools.chain.from_iterable(factors[:4] for factors in group)) != before:
        raise RuntimeError(
            "a parameter needed for the backward pass has been modified by an in-place operation: of weights of "
            f"shapes {', '.join(str(tuple(factors.weight.shape)) for factors in group)}"
        )


def mark_frozen(ctx: Any, results: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> None:
    """Mark those W_eff and b_eff as not differentiable of which no factor learns; four tensors make two results."""
    learns = [tensor is not None and tensor.requires_grad for tensor in tensors]
    frozen = []
    for index in range(0, len(tensors), 4):
        weight, bias = results[index // 2], results[index // 2 + 1]
        if weight is not None and not (learns[index] or learns[index + 1] or learns[index + 3]):
            frozen.append(weight)
        if bias is not None and not (learns[index + 2] or learns[index + 3]):
            frozen.append(bias)
    if frozen:
        ctx.mark_non_differentiable(*frozen)


def standardized_again(weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute W_eff again from the weight and the scale that `effective_parameters` has returned; without gradient."""
    filters = StandardizedFilters([weight], scale, eps)
    filters.clamp()
    return filters.take_results()[0]


class _Computed:
    """W_eff and b_eff of several layers, and what their gradients need besides."""

    def __init__(self, group: Sequence[Factors]) -> None:
        layout = self.layout = layout_of(group)
        skips: Any = [group[i].skip_gain for i in layout.skipping]
        skip_gains = layout.joined_skip_gains(skips)
        self.gains = _joined([group[i].gain for i in layout.order])
        self.of_gains = layout.of_gains.times(skip_gains)
        scales = (self.gains * self.of_gains).split_with_sizes(layout.filters)
        self.filters = [
            StandardizedFilters([group[i].weight for i in members], scale, group[members[0]].eps)
            for members, scale in zip(layout.members, scales, strict=True)
        ]
        clamp_all(self.filters)
        self.weights: list[Any] = [None] * len(group)
        self.scales: list[Tensor | None] = [None] * len(group)
        for members, filters in zip(layout.members, self.filters, strict=True):
            for index, weight in zip(members, filters.take_results(), strict=True):
                self.weights[index] = weight
            if len(members) == 1:
                self.scales[members[0]] = filters.scale
        self.biases = [factors.bias for factors in group]
        if layout.biased:
            biases: Any = [group[i].bias for i in layout.biased]
            self.joined_biases = _joined(biases)
            self.of_biases = layout.of_biases.times(skip_gains)
            products = layout.of_biases.split(self.joined_biases * self.of_biases)
            for index, bias in zip(layout.biased, products, strict=True):
                self.biases[index] = bias


class _Effective(torch.autograd.Function):
    """`_Computed`, and its gradients."""

    @staticmethod
    def forward(ctx: Any, group: Sequence[Factors], scales: list[Tensor | None], *tensors: Tensor | None) -> Any:
        done = ctx.done = _Computed(group)
        scales += done.scales
        # Attributes rather than `save_for_backward`, which would free what all weights need with the graph of one.
        ctx.group = group
        ctx.versions = versions(tensors)
        ctx.set_materialize_grads(False)
        results: list[Any] = [None] * (2 * len(group))
        results[::2] = done.weights
        for index in done.layout.biased:
            results[2 * index + 1] = done.biases[index]
        del done.weights, done.biases, done.scales
        mark_frozen(ctx, results, tensors)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = list(itertools.chain.from_iterable(factors[:4] for factors in ctx.group))
        refuse_changed(ctx.group, ctx.versions)
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *_differentiable_gradients(ctx.group, tensors, grads, wanted)
        return None, None, *_gradients(ctx.group, ctx.done, grads, wanted)


def _gradients(
    group: Sequence[Factors], done: _Computed, grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    layout = done.layout
    found: list[Tensor | None] = [None] * len(wanted)
    of_scales = []
    for members, filters in zip(layout.members, done.filters, strict=True):
        used = [i for i in members if grads[2 * i] is not None]
        of_weights = any(wanted[4 * i] for i in used)
        of_scale = any(wanted[4 * i + 1] or wanted[4 * i + 3] for i in used)
        grad_scale = None
        if of_weights or of_scale:
            given = [torch.zeros_like(group[i].weight) if (g := grads[2 * i]) is None else g for i in members]
            grad_weights, grad_scale = filters.gradients(given, of_weights, of_scale)
            for i, grad in zip(members, grad_weights, strict=True):
                found[4 * i] = grad
        of_scales.append(torch.zeros_like(filters.scale) if grad_scale is None else grad_scale)
    _add_gradients_of_vectors(found, group, done, _joined(of_scales), grads)
    for i in range(len(group)):  # not zeros: what is not used has no gradient
        of_weight, of_its_bias = grads[2 * i], grads[2 * i + 1]
        if of_weight is None:
            found[4 * i] = found[4 * i + 1] = None
        if of_its_bias is None:
            found[4 * i + 2] = None
            if of_weight is None:
                found[4 * i + 3] = None
    return found


def _add_gradients_of_vectors(
    found: list[Tensor | None],
    group: Sequence[Factors],
    done: _Computed,
    of_scale: Tensor,
    grads: Sequence[Tensor | None],
) -> None:
    """Add the gradients of gains, biases and skip gains, from that of the scales of all filters, joined."""
    layout = done.layout
    for i, grad in zip(layout.order, layout.of_gains.split(of_scale * done.of_gains), strict=True):
        found[4 * i + 1] = grad
    of_bias = None
    if any(grads[2 * i + 1] is not None for i in layout.biased):
        given = [torch.zeros_like(group[i].gain) if (g := grads[2 * i + 1]) is None else g for i in layout.biased]
        of_bias = _joined(given)
        for i, grad in zip(layout.biased, layout.of_biases.split(of_bias * done.of_biases), strict=True):
            found[4 * i + 2] = grad
    if layout.skipping:
        of_skip_gains = of_scale.new_zeros(len(layout.skipping) + 1)
        of_skip_gains.index_add_(0, layout.of_gains.owner, of_scale * done.gains * layout.of_gains.constant)
        if of_bias is not None:
            each = of_bias * done.joined_biases * layout.of_biases.constant
            of_skip_gains.index_add_(0, layout.of_biases.owner, each)
        for i, grad in zip(layout.skipping, of_skip_gains.split(1), strict=False):
            found[4 * i + 3] = grad


def _differentiable_gradients(
    group: Sequence[Factors], tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Compute what `_gradients` does by operations that have derivatives themselves."""
    results = [result for factors in group for result in composed(factors)]
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    outs, out_grads = zip(*pairs, strict=True)
    inputs = [tensor for tensor, wants in zip(tensors, wanted, strict=True) if wants and tensor is not None]
    found = iter(torch.autograd.grad(outs, inputs, out_grads, create_graph=True, allow_unused=True))
    return [next(found) if wants else None for wants in wanted]


def _joined(vectors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(vectors)) if len(vectors) > 1 else vectors[0]
