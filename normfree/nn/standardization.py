"""Scaled weight standardization: the formula, on the fastest torch kernel that gives it exactly."""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normfree import _torch
from normfree.nn.filter_kernels import StandardizedFilters, clamp_all

EPS = 1e-4
"""The clamp of the authors' code, on N · var(W)."""

# Weights of fewer elements are standardized together, where their filters are of one shape, and always kept.
SMALL = 2**15


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
        skip_gains = [factors.skip_gain for factors in group if factors.skip_gain is not None]
        skips = iter(torch.cat(skip_gains).tolist() if skip_gains else ())
        self.outs: list[float] = []  # what a bias is multiplied by
        factor: list[float] = []  # what a gain is
        self.multiplied: list[int] = []  # layers whose bias it changes
        alike: dict[Any, list[int]] = {}  # small weights with filters of one shape: one kernel for all
        for index, (weight, _, bias, skip_gain, in_scale, out, eps) in enumerate(group):
            if skip_gain is not None:
                out *= next(skips)
            if bias is not None and (out != 1 or skip_gain is not None):
                self.multiplied.append(index)
            self.outs.append(out)
            factor.append(in_scale * out / math.sqrt(weight.numel() / weight.shape[0]))
            small = weight.numel() < SMALL and weight.is_contiguous()
            alike.setdefault((weight.shape[1:], eps) if small else index, []).append(index)
        self.members = list(alike.values())
        order = list(itertools.chain.from_iterable(self.members))
        self.sizes = {index: group[index].gain.shape[0] for index in order}
        self.factors = _spread([factor[i] for i in order], tuple(self.sizes.values()), group[0].gain)
        scales = (_joined([group[i].gain for i in order]) * self.factors).split_with_sizes(
            [sum([self.sizes[i] for i in members]) for members in self.members]
        )
        self.filters = [
            StandardizedFilters([group[i].weight for i in members], scale, group[members[0]].eps)
            for members, scale in zip(self.members, scales, strict=True)
        ]
        clamp_all(self.filters)
        self.weights: list[Any] = [None] * len(group)
        self.scales: list[Tensor | None] = [None] * len(group)
        for members, filters in zip(self.members, self.filters, strict=True):
            for index, weight in zip(members, filters.take_results(), strict=True):
                self.weights[index] = weight
            if len(members) == 1:
                self.scales[members[0]] = filters.scale
        self.biases = [factors.bias for factors in group]
        for index, bias in self.multiply({i: self.biases[i] for i in self.multiplied}).items():
            self.biases[index] = bias

    def multiply(self, vectors: dict[int, Any]) -> dict[int, Tensor]:
        """Multiply vectors of layers by what their biases are multiplied by."""
        if not vectors:
            return {}
        sizes = tuple([vector.shape[0] for vector in vectors.values()])
        each = _spread([self.outs[i] for i in vectors], sizes, next(iter(vectors.values())))
        return dict(zip(vectors, (_joined(list(vectors.values())) * each).split_with_sizes(sizes), strict=True))


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
        for index in done.multiplied:
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
    found: list[Tensor | None] = [None] * len(wanted)
    of_scales = []
    for members, filters in zip(done.members, done.filters, strict=True):
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
    flat, sizes = _joined(of_scales), list(done.sizes.values())
    for i, grad in zip(done.sizes, (flat * done.factors).split_with_sizes(sizes), strict=True):
        found[4 * i + 1] = grad
    of_biases = {i: grad for i in done.multiplied if (grad := grads[2 * i + 1]) is not None}
    for i, grad in done.multiply(of_biases).items():
        found[4 * i + 2] = grad
    if any(wanted[3::4]):
        for i, part in zip(done.sizes, flat.split_with_sizes(sizes), strict=True):
            if wanted[4 * i + 3] and (grads[2 * i] is not None or i in of_biases):
                found[4 * i + 3] = _gradient_of_skip_gain(group[i], part, of_biases.get(i))
    for i in range(len(group)):
        if grads[2 * i] is None:  # not zeros: its parameters have no gradient
            found[4 * i] = found[4 * i + 1] = None
    return found


def _gradient_of_skip_gain(factors: Factors, of_scale: Tensor, of_bias: Tensor | None) -> Tensor:
    weight, gain, bias, _, in_scale, out_scale, _ = factors
    total = torch.dot(of_scale, gain) * (in_scale / math.sqrt(weight.numel() / weight.shape[0]))
    if of_bias is not None and bias is not None:
        total = total + torch.dot(of_bias, bias)
    return (total * out_scale).view(1)


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


def _spread(numbers: Sequence[float], sizes: tuple[int, ...], like: Tensor) -> Any:
    """Return each number so many times, one after the other; of one number, the number."""
    if len(numbers) == 1:
        return numbers[0]
    return torch.tensor(numbers, dtype=like.dtype).index_select(0, _numbered(sizes))


@functools.lru_cache(maxsize=1024)
def _numbered(sizes: tuple[int, ...]) -> Tensor:
    with torch.inference_mode(False):
        return torch.repeat_interleave(torch.tensor(sizes))
