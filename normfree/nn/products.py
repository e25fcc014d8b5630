"""Convolutions as matrix products, where what torch's CPU kernels do besides takes longer than the product.

oneDNN, which torch calls for most, brings input and weight into a layout of its own and back, at a cost that is fixed
for small inputs and, for kernels of size 1, several passes over large ones; with a stride, over what is left out, too.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of all patches up to which larger kernels are worth taking the patches out: oneDNN's fixed cost.
_FEW = 2**15
# A weight with so many times the elements of one image's patches and output is worth joining the images for.
_TIMES = 2


class Window(NamedTuple):
    """Positions that a convolution covers, a number per axis: those of its arguments."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def sizes(self, input: Tensor) -> list[int]:
        """Return the output's sizes."""
        axes = zip(input.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, dilation in axes
        ]


def prefers_product(input: Tensor, window: Window) -> bool:
    """Tell whether a convolution of an input, (N, in_channels, …), float32 on a CPU, is faster as a product."""
    images, kernel = input.shape[0], max(window.kernel_size)
    if not (input.is_contiguous() and input.numel()) or (images == 1 and input.numel() <= 20480):
        return False  # torch, too, multiplies
    if kernel == 1:
        takes_onednn = max(window.stride) > 1 or images >= 16 or torch.get_num_threads() > 1
        return takes_onednn and not any(window.padding)
    if input.numel() > _FEW or input.ndim != 4:
        return False
    sizes = window.sizes(input)
    return min(sizes) > 0 and input.shape[1] * images * math.prod(window.kernel_size) * math.prod(sizes) <= _FEW


def convolve_as_product(input: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """Convolve, (N, in_channels, …) to (N, out_channels, …); derivatives of every order exist."""
    out: Tensor = _Product.apply(input, weight, bias, window)
    return out


class _Product(torch.autograd.Function):
    """`convolve_as_product`; it keeps what a convolution does: its input and weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        ctx.window = window
        return _multiplied(input, weight, bias, window).detach()  # else a view, which nobody may write into

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        wanted, window = ctx.needs_input_grad, ctx.window
        if torch.is_grad_enabled():
            inputs = [tensor for tensor, wants in zip((input, weight, bias), wanted, strict=False) if wants]
            found = iter(torch.autograd.grad(_multiplied(input, weight, bias, window), inputs, grad, create_graph=True))
            return (*(next(found) if wants else None for wants in wanted[:3]), None)
        patches, rows, grads = patches_of(input, window), weight.flatten(1), grad.flatten(2)
        joins = _joins_images(patches, rows)
        grads = _joined(grads) if joins else grads
        of_input = of_weight = of_bias = None
        if wanted[0]:
            if joins:
                of_patches = _apart(torch.mm(rows.t(), grads), len(patches))
            else:
                of_patches = torch.bmm(rows.t().expand(len(grads), -1, -1), grads)
            of_input = _gathered(of_patches, input, window)
        if wanted[1]:
            if joins:
                of_weight = torch.mm(grads, _joined(patches).t())
            else:
                of_weight = torch.bmm(grads, patches.transpose(1, 2)).sum(0)
            of_weight = of_weight.view(weight.shape)
        if wanted[2]:
            of_bias = grads.sum(1) if joins else grads.sum((0, 2))
        return of_input, of_weight, of_bias, None


def _multiplied(input: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    patches, rows = patches_of(input, window), weight.flatten(1)
    column = None if bias is None else bias[:, None]
    if _joins_images(patches, rows):
        joined = _joined(patches)
        out = _apart(torch.mm(rows, joined) if column is None else torch.addmm(column, rows, joined), len(patches))
    else:
        each = rows.expand(len(patches), -1, -1)
        out = torch.bmm(each, patches) if column is None else torch.baddbmm(column, each, patches)
    return out.view(*out.shape[:2], *window.sizes(input))


def patches_of(input: Tensor, window: Window) -> Tensor:
    """Return what each position of the output sees, (N, fan-in, positions)."""
    if max(window.kernel_size) > 1:
        kernel_size, stride, padding, dilation = map(tuple, window)
        return F.unfold(input, kernel_size, dilation, padding, stride)
    return _taken(input, window.stride).flatten(2)


def _taken(input: Tensor, stride: Sequence[int]) -> Tensor:
    """Return what a stride does not leave out."""
    if max(stride) == 1:
        return input
    for axis, step in enumerate(stride, start=2):
        input = input[(slice(None),) * axis + (slice(None, None, step),)]
    return input


def _gathered(of_patches: Tensor, input: Tensor, window: Window) -> Tensor:
    """Return the gradient of the input from that of `patches_of`."""
    if max(window.kernel_size) > 1:
        kernel_size, stride, padding, dilation = map(tuple, window)
        return F.fold(of_patches, input.shape[2:], kernel_size, dilation, padding, stride)
    if max(window.stride) == 1:
        return of_patches.view(input.shape)
    grad = torch.zeros_like(input)
    part = _taken(grad, window.stride)
    part.copy_(of_patches.view(part.shape))
    return grad


def _joins_images(patches: Tensor, rows: Tensor) -> bool:
    """Tell whether all images are multiplied at once: the weight, larger than each, is then read but once."""
    return len(patches) == 1 or rows.numel() > _TIMES * patches.shape[2] * sum(rows.shape)


def _joined(images: Tensor) -> Tensor:
    """Return images side by side, (N, rows, positions) to (rows, N · positions)."""
    return images.transpose(0, 1).flatten(1)


def _apart(joined: Tensor, images: int) -> Tensor:
    """Undo `_joined`."""
    return joined.view(joined.shape[0], images, -1).transpose(0, 1).contiguous()
