"""Scaled weight standardization: the formula, on the fastest torch kernel that gives it exactly."""

from typing import Any

import torch
from torch import Tensor

from normfree import _torch

EPS = 1e-4
"""The clamp of the authors' code, on N · var(W)."""

# Added to the variance inside the kernel, to keep constant filters finite. No filter that the clamp leaves alone
# (var ≥ eps/N) can notice it, in float64 either.
_TINY = 1e-30
# Stands in for 1/std of a clamped filter in the backward kernel; see `_Standardize.backward`.
_DELTA = 1e-12


def standardize(weight: Tensor, scale: Tensor, eps: float = EPS) -> Tensor:
    """Compute scale ⊙ (W − mean(W)) · rsqrt(max(N · var(W), eps)) per output channel (Brock et al. 2021, equation 3).

    Mean and (biased) variance are over everything but the output channel, N = fan-in. Half-precision weights are
    standardized in float32. A second derivative in the weights exists in eager mode on CPUs where no filter is clamped,
    and raises RuntimeError elsewhere.

    Args:
        weight: Filters, `(out_channels, in_channels / groups, *kernel_size)`.
        scale: Factor of each filter, (out_channels,).
        eps: Clamp on N · var(W).

    Returns:
        A tensor of the weight's shape and dtype.
    """
    if not weight.is_contiguous():
        # In the order of the memory (channels_last): no copy, and the result has the weight's layout.
        order = [0, *sorted(range(1, weight.ndim), key=weight.stride, reverse=True)]
        if order != list(range(weight.ndim)):
            inverse = [order.index(axis) for axis in range(weight.ndim)]
            return standardize(weight.permute(order), scale, eps).permute(inverse)
    if weight.dtype in (torch.float16, torch.bfloat16):
        return _standardize(weight.float(), scale.float(), eps).to(weight.dtype)
    return _standardize(weight, scale.to(weight.dtype), eps)


def _standardize(weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    if weight.is_cpu and not torch.compiler.is_compiling() and not _torch.functorch_is_active():
        # Only here does it cost nothing to look whether a filter is clamped; if none is, torch's operation does it all.
        out, _, rstd = _group_norm(weight, scale)
        if type(rstd) is Tensor and rstd.max().item() <= (_fan_in(weight) / eps) ** 0.5:
            return out.view_as(weight)
    return _Standardize.apply(weight, scale, eps)[0]


def _fan_in(weight: Tensor) -> int:
    return weight.numel() // weight.shape[0]


def _rows(filters: Tensor) -> Tensor:
    """Return filters as the kernels take them, (1, out_channels, fan_in), contiguous as torch 2.13 insists."""
    return filters.reshape(1, filters.shape[0], -1).contiguous()


def _group_norm(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute scale ⊙ (W − mean(W)) · rsqrt(N · var(W)) as rows, mean(W) and 1/std(W), both (1, out_channels)."""
    filters, fan_in = weight.shape[0], _fan_in(weight)
    rows = _rows(weight)
    out, mean, rstd = torch.native_group_norm(rows, scale * fan_in**-0.5, None, 1, filters, fan_in, filters, _TINY)
    return out.view(filters, fan_in), mean, rstd


class _Standardize(torch.autograd.Function):
    """One group-norm kernel forward and one backward, one group per filter, with the clamp exact.

    A group-norm kernel has no clamp. Forward, it returns filters of unit variance; those that the clamp should have
    left smaller are multiplied by √(N · var / eps) < 1. Backward, the kernel computes

        dW = s · (dY − mean(dY)) − r² · s · (W − mean(W)) · mean(dY · (W − mean(W))),   s = r · kernel weight

    from the 1/std r and the weight that it is given. A clamped filter has no second term, since its s does not depend
    on W: it gets r = δ and s/δ as the weight, which leaves s and makes the second term vanish, far below rounding.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out, mean, rstd = _group_norm(weight, scale)
        shrink = (rstd[0].reciprocal() * (_fan_in(weight) / eps) ** 0.5).clamp(max=1)
        return out.mul_(shrink[:, None]).view_as(weight), mean, rstd, shrink

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        weight, scale, ctx.eps = inputs
        _, mean, rstd, shrink = output
        ctx.mark_non_differentiable(mean, rstd, shrink)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, scale, mean, rstd, shrink)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        grad = grads[0]
        if grad is None:
            return None, None, None
        weight, scale, mean, rstd, shrink = ctx.saved_tensors
        filters, fan_in = weight.shape[0], _fan_in(weight)
        clamped = shrink < 1
        kernel_rstd = torch.where(clamped, _DELTA, rstd)
        factor = torch.where(clamped, rstd[0] * shrink / _DELTA, 1.0) * fan_in**-0.5
        grad_weight, grad_scale, _ = torch.ops.aten.native_group_norm_backward(
            _rows(grad), _rows(weight), mean, kernel_rstd, scale * factor,
            1, filters, fan_in, filters, [True, True, False],
        )  # fmt: skip
        return grad_weight.view_as(weight), grad_scale * factor, None
