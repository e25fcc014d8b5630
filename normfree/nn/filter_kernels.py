"""Standardization of filters by torch's group-norm kernels, forward and backward, with the clamp exact."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Added to the variance inside the kernel, to keep constant filters finite. No filter that the clamp leaves alone
# (var ≥ eps/N) can notice it, in float64 either.
_TINY = 1e-30
# Stands in for 1/std of a clamped filter in the backward kernel; see `StandardizedFilters`.
_DELTA = 1e-12
_BACKWARD = torch.ops.aten.native_group_norm_backward.default


class StandardizedFilters:
    """Standardized filters of equal size, of one weight or of several, and what their gradients need.

    One group-norm kernel, one group per filter. It has no clamp: it returns filters of unit variance, and those that
    the clamp should have left smaller are multiplied by √(N · var / eps) < 1. Backward, the kernel computes

        dW = s · (dY − mean(dY)) − r² · s · (W − mean(W)) · mean(dY · (W − mean(W))),   s = r · scale

    from the 1/std r and the scale that it is given. A clamped filter has no second term, since its s does not depend on
    W: it gets r = δ and s/δ as the scale, which leaves s and makes the second term vanish, far below rounding.
    """

    def __init__(self, weights: Sequence[Tensor], scale: Tensor, eps: float) -> None:
        """Compute scale ⊙ (W − mean(W)) / std(W), before the clamp; `scale` is (filters of all weights,).

        Weights have filters of one shape; of several each is contiguous.
        """
        first = weights[0]
        self.shape = first.shape
        self.order = _order(first)
        self.sizes = [weight.shape[0] for weight in weights]
        self.scale = scale
        self.filters = self._together(weights)
        self.count = self.filters.shape[0]
        self.fan_in = self.filters.numel() // self.count
        self.result, self.mean, self.rstd = torch.native_group_norm(
            self.filters, scale, None, 1, self.count, self.fan_in, self.count, _TINY
        )
        self.limit = math.sqrt(self.fan_in / eps)  # what the clamp leaves of 1/std
        self.shrink: Tensor | None = None  # (filters,), where one is clamped

    def clamp(self) -> None:
        """Apply the clamp, if it applies to a filter; NaN, not 0, where a variance overflows."""
        least, most = torch.aminmax(self.rstd)
        if not most.item() <= self.limit:
            self.shrink = (self.rstd[0].reciprocal() * self.limit).clamp(max=1)
            self.result.mul_(self.shrink[:, None])
        if not least.item() > 0:
            self.result[self.rstd[0] == 0] = math.nan

    def take_results(self) -> Sequence[Tensor]:
        """Return the standardized weights, each in the layout of the weight, and forget them."""
        result = self.result
        del self.result
        return self._apart(result)

    def gradients(self, grads: Sequence[Tensor], of_weights: bool, of_scale: bool) -> tuple[Sequence[Any], Any]:
        """Compute the gradients in each weight and in the scale, each if asked for, from those in the results."""
        scale, rstd, ratio = self.scale, self.rstd, None
        if self.shrink is not None:
            clamped = self.shrink < 1
            ratio = torch.where(clamped, rstd[0] * self.shrink / _DELTA, 1.0)
            scale, rstd = scale * ratio, torch.where(clamped, _DELTA, rstd)
        grad_filters, grad_scale, _ = _BACKWARD(
            self._together(grads), self.filters, self.mean, rstd, scale,
            1, self.count, self.fan_in, self.count, [of_weights, of_scale, False],
        )  # fmt: skip
        grad_weights = self._apart(grad_filters) if of_weights else [None] * len(grads)
        return grad_weights, grad_scale if ratio is None or grad_scale is None else grad_scale * ratio

    def _together(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return filters of all tensors, (filters, fan_in), contiguous, in the order of the weights' memory.

        Of two axes, since the kernels guess a layout from the strides of four, which may look like another one.
        """
        joined = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
        joined = joined if self.order is None else joined.permute(self.order)
        return joined.reshape(joined.shape[0], -1).contiguous()

    def _apart(self, filters: Tensor) -> Sequence[Tensor]:
        """Undo `_together`."""
        if self.order is not None:
            shape = [self.shape[axis] for axis in self.order[1:]]
            inverse = [self.order.index(axis) for axis in range(len(self.order))]
            return [filters.view(self.count, *shape).permute(inverse)]
        filters = filters.view(self.count, *self.shape[1:])
        return torch.unsafe_split_with_sizes(filters, self.sizes) if len(self.sizes) > 1 else [filters]


def clamp_all(parts: Sequence[StandardizedFilters]) -> None:
    """Apply the clamp to all, after one look."""
    least, most = torch.aminmax(torch.cat([part.rstd for part in parts], 1) if len(parts) > 1 else parts[0].rstd)
    if not (least.item() > 0 and most.item() <= min([part.limit for part in parts])):
        for part in parts:
            part.clamp()


def _order(weight: Tensor) -> list[int] | None:
    """Return the axes in the order of the memory where it is another one (channels_last): nothing is copied then."""
    if weight.is_contiguous():
        return None
    return [0, *sorted(range(1, weight.ndim), key=weight.stride, reverse=True)]
