"""Fused kernels for GPUs: W_eff and b_eff of a layer by one, and their gradients by another.

What is done to weights is many small operations: a GPU would wait for the processor that starts them one by one.
"""

import functools
import warnings
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from normfree import _torch

# A program's share of a filter at a time; of two sizes, since each is compiled on its own.
_BLOCKS = (256, 1024)
_CHANNELS_LAST = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}


@triton.jit
def _forward(
    weight, gain, bias, in_scale, out_scale, skip_gain, w_eff, b_eff, mean, rstd,
    eps: tl.constexpr, fan_in, exact: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Program of one filter: see `ScaledWS.effective_parameters`."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * fan_in
    columns = tl.arange(0, block)
    total = tl.zeros((block,), exact)
    for first in range(0, fan_in, block):
        total += tl.load(weight + start + first + columns, first + columns < fan_in, 0.0).to(exact)
    m = tl.sum(total, 0) / fan_in
    total = tl.zeros((block,), exact)
    for first in range(0, fan_in, block):
        inside = first + columns < fan_in
        centred = tl.where(inside, tl.load(weight + start + first + columns, inside, 0.0).to(exact) - m, 0.0)
        total += centred * centred
    norm, least = tl.sum(total, 0), tl.full((), eps, exact)
    r = 1 / tl.sqrt(tl.maximum(norm, least))
    out = tl.load(out_scale).to(exact)
    if skip_gain is not None:
        out *= tl.load(skip_gain).to(exact)
    scale = tl.load(gain + row).to(exact) * (tl.load(in_scale).to(exact) * out) * r
    for first in range(0, fan_in, block):
        inside = first + columns < fan_in
        centred = tl.load(weight + start + first + columns, inside, 0.0).to(exact) - m
        tl.store(w_eff + start + first + columns, centred * scale, inside)
    if bias is not None:
        tl.store(b_eff + row, tl.load(bias + row).to(exact) * out)
    tl.store(mean + row, m)
    tl.store(rstd + row, tl.where(norm < least, -r, r))  # negative where the filter is clamped


@triton.jit
def _backward(
    grad_w_eff, grad_b_eff, weight, gain, bias, in_scale, out_scale, skip_gain, mean, rstd,
    grad_weight, grad_gain, grad_bias, shares, fan_in, exact: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Program of one filter; `shares` in the gradient of the SkipInit gain are summed elsewhere."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * fan_in
    columns = tl.arange(0, block)
    m, signed = tl.load(mean + row), tl.load(rstd + row)
    r = tl.abs(signed)
    total, products = tl.zeros((block,), exact), tl.zeros((block,), exact)
    for first in range(0, fan_in, block):
        inside = first + columns < fan_in
        grad = tl.load(grad_w_eff + start + first + columns, inside, 0.0).to(exact)
        total += grad
        products += grad * (tl.load(weight + start + first + columns, inside, 0.0).to(exact) - m)
    average, product = tl.sum(total, 0) / fan_in, tl.sum(products, 0) * r
    before, g = tl.load(in_scale).to(exact), tl.load(gain + row).to(exact)
    out = tl.load(out_scale).to(exact)
    if skip_gain is not None:
        share = product * g * before
        if bias is not None:
            share += tl.load(grad_b_eff + row).to(exact) * tl.load(bias + row).to(exact)
        tl.store(shares + row, share * out)
        out *= tl.load(skip_gain).to(exact)
    tl.store(grad_gain + row, product * before * out)
    if bias is not None:
        tl.store(grad_bias + row, tl.load(grad_b_eff + row).to(exact) * out)
    along = tl.where(signed > 0, product * r, 0.0)  # what a clamped filter is divided by is constant
    scale = g * before * out * r
    for first in range(0, fan_in, block):
        inside = first + columns < fan_in
        grad = tl.load(grad_w_eff + start + first + columns, inside, 0.0).to(exact)
        centred = tl.load(weight + start + first + columns, inside, 0.0).to(exact) - m
        tl.store(grad_weight + start + first + columns, scale * (grad - average - along * centred), inside)


class _Effective(torch.autograd.Function):
    """(W_eff, b_eff or None) of `dtype`; a second derivative raises RuntimeError."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, gain: Tensor, bias: Tensor | None, in_scale: Tensor, out_scale: Tensor,
        skip_gain: Tensor | None, eps: float, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        w_eff = torch.empty_like(weight, dtype=dtype)
        b_eff = None if bias is None else torch.empty_like(bias, dtype=dtype)
        at_least = torch.promote_types(weight.dtype, torch.float32)
        mean, rstd = torch.empty(2, len(weight), dtype=at_least, device=weight.device).unbind()
        factors = weight, gain, bias, in_scale, out_scale, skip_gain
        _launch(_forward, weight, *factors, w_eff, b_eff, mean, rstd, eps)
        ctx.save_for_backward(*factors, mean, rstd)
        return w_eff, b_eff

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_w_eff: Tensor, grad_b_eff: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing computes them again each time
        weight, gain, bias, _, _, skip_gain, mean, _ = saved
        if not _layouts(grad_w_eff) & _layouts(weight):
            grad_w_eff = torch.empty_like(weight, dtype=grad_w_eff.dtype).copy_(grad_w_eff)
        grad_b_eff = None if grad_b_eff is None else grad_b_eff.contiguous()
        grads = [None if factor is None else torch.empty_like(factor) for factor in (weight, gain, bias)]
        shares = None if skip_gain is None else torch.empty_like(mean)
        _launch(_backward, weight, grad_w_eff, grad_b_eff, *saved, *grads, shares)
        grad_skip_gain = None if shares is None else shares.sum(0, keepdim=True).to(skip_gain.dtype)
        return *grads, None, None, grad_skip_gain, None, None


def _layouts(tensor: Tensor) -> set[torch.memory_format]:
    """Return the memory formats in which its filters lie one after the other, without gaps."""
    formats = [torch.contiguous_format, *_CHANNELS_LAST.get(tensor.ndim, ())]
    return {layout for layout in formats if tensor.is_contiguous(memory_format=layout)}


def _launch(kernel: Any, weight: Tensor, *arguments: Any) -> None:
    """Start a program for each filter of the weight."""
    fan_in = weight.numel() // len(weight)
    exact = tl.float64 if weight.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(weight):
        kernel[(len(weight),)](*arguments, fan_in, exact, _BLOCKS[fan_in > _BLOCKS[0]], enable_fp_fusion=True)


def effective_parameters(
    weight: Tensor, gain: Tensor, bias: Tensor | None, in_scale: Tensor, out_scale: Tensor, skip_gain: Tensor | None,
    *, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute those of `ScaledWS.effective_parameters`, in float32 at least, rounded to `dtype`.

    `weight` is (out_channels, …), its filters one after the other in memory; W_eff has its layout.
    """
    return _Effective.apply(weight, gain, bias, in_scale, out_scale, skip_gain, eps, dtype)


def supports(weight: Tensor, gain: Tensor, bias: Tensor | None, *scales: Tensor | None) -> bool:
    """Tell whether `effective_parameters` can be given these, on a GPU, and no operation is traced.

    Dispatch modes that only look at operations, such as counters and `characterize`, do not change the answer: gradient
    checkpointing runs a layer again outside of them, and must find the same operations.
    """
    sizes = [(t, n) for t, n in ((gain, len(weight)), (bias, len(weight)), *((s, 1) for s in scales)) if t is not None]
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.numel() > 0
        and bool(_layouts(weight))
        and all(t.numel() == n and t.is_contiguous() and t.device == weight.device for t, n in sizes)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not _torch.functorch_is_active()
        and _torch.only_observed()
        and _works(weight.device)
    )


@functools.cache
def _works(device: torch.device) -> bool:
    """Triton compiles a part of what it does with the machine's C compiler."""
    weight, scale = torch.ones(2, 3, device=device), torch.ones((), device=device)
    try:
        effective_parameters(weight, weight[:, 0].contiguous(), None, scale, scale, None, eps=1.0, dtype=weight.dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        warnings.warn(f"weights are standardized by slower kernels: Triton does not work here ({error})", stacklevel=2)
        return False
    return True
