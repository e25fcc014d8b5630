"""Layers whose weight outnumbers what it is applied to, as matrix products with the weight as it is.

For one to eight small images the last stages of a network have weights of millions of elements and a few dozen
positions. Whatever passes over such a weight takes longer than the layer: W_eff, a gradient for it, and what a
convolution does to bring a weight into its own layout and back. As the output is linear in the weight,

    x W_effᵀ + b_eff = s ⊙ (x Wᵀ − (x 1) ⊗ mean(W)) + b_eff,   s = scale · rsqrt(max(N · var(W), eps))

with the patches x, (positions, fan-in), nothing is done to the weight but one reading for its norm, and its gradient is
written once. Numbers differ from those of the other form by rounding.
"""

import math
from typing import Any

import torch
from torch import Tensor

from normfree.nn.standardization import Factors, composed

# From how many elements on a weight is worth it, and how many times those of the patches and the output it must have.
LARGE = 2**17
_TIMES = 2
# Filters whose mean is a larger share of their norm lose digits in x Wᵀ − (x 1) ⊗ mean(W).
_MOST_MEAN = 0.25


def prefers_matrix_form(weight: Tensor, positions: int) -> bool:
    """Tell whether a weight outnumbers the positions of its output so far that `apply_to_patches` is faster."""
    filters, fan_in = weight.shape[0], weight.numel() // weight.shape[0]
    return weight.numel() >= max(LARGE, _TIMES * positions * (filters + fan_in))


def apply_to_patches(patches: Tensor, factors: Factors) -> Tensor | None:
    """Compute x W_effᵀ + b_eff, (positions, out_channels); None where the form would lose digits.

    Args:
        patches: What each position of the output sees, (positions, fan-in).
        factors: Those of the layer, which `computes_fast`; the weight is contiguous.
    """
    with_ones = torch.cat([patches, patches.new_ones(1, patches.shape[1])])
    rows = factors.weight.detach().flatten(1)
    products = torch.mm(with_ones.detach(), rows.t())
    mean, norm = products[-1] / rows.shape[1], torch.linalg.vector_norm(rows, dim=1)
    alike = mean.abs() * math.sqrt(rows.shape[1]) <= _MOST_MEAN * norm
    if not bool((alike & (norm.square() < math.inf)).all()):
        return None
    found: Tensor = _MatrixForm.apply(factors, products, mean, norm, with_ones, *factors[:4])
    return found


class _MatrixForm(torch.autograd.Function):
    """`apply_to_patches`, from the patches with a last row of ones and their products with the weight."""

    @staticmethod
    def forward(
        ctx: Any, factors: Factors, products: Tensor, mean: Tensor, norm: Tensor, with_ones: Tensor,
        weight: Tensor, gain: Tensor, bias: Tensor | None, skip_gain: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out_scale = factors.out_scale * (1.0 if skip_gain is None else skip_gain.item())
        fan_in = with_ones.shape[1]
        squares = norm.square() - fan_in * mean.square()
        rstd = squares.clamp(min=factors.eps).rsqrt()
        centred = products[:-1].addr(with_ones[:-1].sum(1), mean, alpha=-1)
        scale = gain * (factors.in_scale * out_scale)
        out = centred * (scale * rstd)
        if bias is not None:
            out += bias * out_scale
        ctx.factors, ctx.out_scale = factors, out_scale
        # A clamped filter's s does not depend on its weight.
        along = torch.where(squares < factors.eps, 0.0, scale * rstd**3)
        ctx.save_for_backward(with_ones, centred, mean, rstd, scale, along, weight, gain, bias, skip_gain)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with_ones, centred, mean, rstd, scale, along, weight, gain, bias, skip_gain = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            inputs = with_ones, weight, gain, bias, skip_gain
            return None, None, None, None, *_differentiable_gradients(ctx.factors, inputs, grad, wanted)
        rows = weight.flatten(1)
        scaled = grad * (scale * rstd)
        of_rstd = (grad * centred).sum(0)
        grad_patches = grad_weight = grad_gain = grad_bias = grad_skip = None
        if wanted[0]:
            grad_patches = torch.cat([torch.mm(scaled, rows), rows.new_zeros(1, rows.shape[1])])
            grad_patches[:-1] -= torch.mv(scaled, mean)[:, None]
        if wanted[1]:
            along = along * of_rstd
            # The gradient's component along the filter, and its mean, vanish.
            constant = along * mean - torch.mv(scaled.t(), with_ones[:-1].sum(1)) / rows.shape[1]
            grad_weight = rows * -along[:, None]
            grad_weight.addmm_(torch.cat([scaled, constant[None]]).t(), with_ones)
            grad_weight = grad_weight.view_as(weight)
        of_scale = of_rstd * rstd
        if wanted[2]:
            grad_gain = of_scale * (ctx.factors.in_scale * ctx.out_scale)
        of_bias = None if bias is None else grad.sum(0)
        if of_bias is not None and wanted[3]:
            grad_bias = of_bias * ctx.out_scale
        if wanted[4]:
            total = torch.dot(of_scale, gain) * ctx.factors.in_scale
            total = total if of_bias is None else total + torch.dot(of_bias, bias)
            grad_skip = (total * ctx.factors.out_scale).view(1)
        return None, None, None, None, grad_patches, grad_weight, grad_gain, grad_bias, grad_skip


def _differentiable_gradients(factors: Factors, inputs: Any, grad: Tensor, wanted: Any) -> list[Tensor | None]:
    with_ones, *parameters = inputs
    weight, bias = composed(factors._replace(**dict(zip(Factors._fields, parameters, strict=False))))
    out = with_ones[:-1] @ weight.flatten(1).t()
    out = out if bias is None else out + bias
    chosen = [tensor for tensor, wants in zip(inputs, wanted, strict=True) if wants]
    found = iter(torch.autograd.grad(out, chosen, grad, create_graph=True))
    return [next(found) if wants else None for wants in wanted]
