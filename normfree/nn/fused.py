"""Fused kernels for GPUs: all that is done to the weights of a group of layers by one launch, its gradients by another.

What is done to weights is many small operations: a GPU would wait for the processor that starts them one by one. The
kernels of a group find its tensors by a table of addresses. Those of a single layer need none, so that a CUDA graph can
capture them.
"""

import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from normfree import _torch
from normfree.nn import fused_kernels
from normfree.nn.standardization import Factors, mark_frozen, refuse_changed, versions

# A program's share of a filter at a time; of two sizes, since each is compiled on its own.
_BLOCKS = (256, 1024)
_CHANNELS_LAST = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}
# Elements between the starts of two layers' tensors in a common buffer: 64 bytes or more.
_ALIGNED = 32
_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class _OfLayer(torch.autograd.Function):
    """(W_eff, b_eff or None) of `dtype`; a second derivative raises RuntimeError."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, gain: Tensor, bias: Tensor | None, skip_gain: Tensor | None,
        in_scale: Tensor, out_scale: Tensor, eps: float, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        w_eff = torch.empty_like(weight, dtype=dtype)
        b_eff = None if bias is None else torch.empty_like(bias, dtype=dtype)
        mean, rstd = torch.empty(2, len(weight), dtype=_exact_dtype(weight), device=weight.device).unbind()
        ctx.optional = {"has_bias": bias is not None, "has_skip": skip_gain is not None}
        # What a layer lacks is neither read nor written: anything stands for it.
        factors = weight, gain, _or(bias, gain), in_scale, out_scale, _or(skip_gain, gain)
        ctx.size = size = weight.numel() // len(weight)
        _launch(
            fused_kernels.forward, weight, *factors, w_eff, _or(b_eff, w_eff), mean, rstd, size,
            rows=len(weight), longest=size, eps=eps, **ctx.optional,
        )  # fmt: skip
        ctx.save_for_backward(*factors, mean, rstd)
        return w_eff, b_eff

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_w_eff: Tensor, grad_b_eff: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing computes them again each time
        weight, gain, bias, _, _, skip_gain, mean, _ = saved
        grad_w_eff = _in_layout_of(weight, grad_w_eff)
        grad_b_eff = grad_w_eff if grad_b_eff is None else grad_b_eff.contiguous()
        grads = [torch.empty_like(factor) for factor in (weight, gain, bias)]
        shares = torch.empty_like(mean)
        _launch(
            fused_kernels.backward, weight, grad_w_eff, grad_b_eff, *saved, *grads, shares, ctx.size,
            rows=len(weight), longest=ctx.size, **ctx.optional,
        )  # fmt: skip
        grad_bias = grads[2] if ctx.optional["has_bias"] else None
        grad_skip_gain = shares.sum(0, keepdim=True).to(skip_gain.dtype) if ctx.optional["has_skip"] else None
        return grads[0], grads[1], grad_bias, grad_skip_gain, None, None, None, None


class _OfGroup(torch.autograd.Function):
    """W_eff and b_eff or None of each layer, of `dtype`; a second derivative raises RuntimeError."""

    @staticmethod
    def forward(ctx: Any, group: Sequence[Factors], dtype: torch.dtype, *tensors: Tensor | None) -> Any:
        weight = group[0].weight
        # Attributes rather than `save_for_backward`, which would free what all weights need with the graph of one.
        ctx.group, ctx.table, ctx.versions, ctx.dtype = group, _table_of(group), versions(tensors), dtype
        ctx.set_materialize_grads(False)
        table = ctx.table
        w_eff, b_eff = (torch.empty(size, dtype=dtype, device=weight.device) for size in table.sizes)
        ctx.mean, ctx.rstd = torch.empty(2, table.sizes[1], dtype=_exact_dtype(weight), device=weight.device).unbind()
        kinds = {"dtype": _DTYPES[weight.dtype], "of_scales": _DTYPES[group[0].in_scale.dtype], "eps": group[0].eps}
        _launch(
            fused_kernels.forward_of_group, weight, *table.tensors, w_eff, b_eff, ctx.mean, ctx.rstd,
            rows=table.rows, longest=table.longest, **kinds,
        )  # fmt: skip
        results: list[Any] = [None] * (2 * len(group))
        for index, factors in enumerate(group):
            results[2 * index] = table.weight(w_eff, index, factors.weight)
            if factors.bias is not None:
                results[2 * index + 1] = table.vector(b_eff, index)
        mark_frozen(ctx, results, tensors)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        group, table = ctx.group, ctx.table
        refuse_changed(group, ctx.versions)
        weight = group[0].weight
        given: list[Tensor | None] = list(grads)
        for index, grad in enumerate(grads):
            if grad is not None:
                given[index] = grad.contiguous() if index % 2 else _in_layout_of(group[index // 2].weight, grad)
        addresses = [_address(grad) for grad in given]
        rows = [[*addresses[index : index + 2], 0] for index in range(0, len(grads), 2)]  # 0 programs are done
        grad_weight, grad_gain, grad_bias, shares, grad_skip_gain = (
            torch.empty(size, dtype=dtype, device=weight.device)
            for size, dtype in (
                (table.sizes[0], weight.dtype),
                *[(table.sizes[1], weight.dtype)] * 2,
                (table.sizes[1], ctx.mean.dtype),
                (len(group), weight.dtype),
            )
        )
        _launch(
            fused_kernels.backward_of_group, weight, *table.tensors, _uploaded(rows, weight.device), ctx.mean, ctx.rstd,
            grad_weight, grad_gain, grad_bias, shares, grad_skip_gain, rows=table.rows, longest=table.longest,
            dtype=_DTYPES[weight.dtype], of_grads=_DTYPES[ctx.dtype], of_scales=_DTYPES[group[0].in_scale.dtype],
        )  # fmt: skip
        found: list[Tensor | None] = [None] * (4 * len(group))
        for index, factors in enumerate(group):
            of_weight, of_bias = given[2 * index : 2 * index + 2]
            if of_weight is not None:  # else not zeros: the parameters have no gradient
                found[4 * index] = table.weight(grad_weight, index, factors.weight)
                found[4 * index + 1] = table.vector(grad_gain, index)
            if of_bias is not None:
                found[4 * index + 2] = table.vector(grad_bias, index)
            if factors.skip_gain is not None and (of_weight is not None or of_bias is not None):
                found[4 * index + 3] = grad_skip_gain[index : index + 1]
        return None, None, *found


class _Table:
    """Addresses and sizes of a group's tensors, on its device, and where its results are in common buffers."""

    def __init__(self, device: torch.device, layers: Sequence[Sequence[int]]) -> None:
        self.places: list[tuple[int, int]] = []  # of a layer's weight and of its vectors
        self.filters = [filters for *_, filters, _ in layers]
        entries, weights, vectors, self.rows = [], 0, 0, 0
        for *addresses, filters, size in layers:
            self.places.append((weights, vectors))
            entries.append([*addresses, self.rows, filters, size // filters, weights, vectors])
            self.rows += filters
            weights += -(-size // _ALIGNED) * _ALIGNED
            vectors += -(-filters // _ALIGNED) * _ALIGNED
        self.sizes = weights, vectors
        self.longest = max(size // filters for *_, filters, size in layers)
        numbers = torch.arange(len(layers), dtype=torch.int32).repeat_interleave(torch.tensor(self.filters))
        self.tensors = torch.tensor(entries, dtype=torch.int64).to(device), numbers.to(device)

    def weight(self, buffer: Tensor, index: int, like: Tensor) -> Tensor:
        """Return a layer's part of a buffer for weights, in the layout of its weight."""
        return buffer.as_strided(like.shape, like.stride(), self.places[index][0])

    def vector(self, buffer: Tensor, index: int) -> Tensor:
        """Return a layer's part of a buffer for gains and biases."""
        return buffer.as_strided((self.filters[index],), (1,), self.places[index][1])


@functools.lru_cache(maxsize=1024)
def _table(device: torch.device, layers: tuple[tuple[int, ...], ...]) -> _Table:
    with torch.inference_mode(False):
        return _Table(device, layers)


def _table_of(group: Sequence[Factors]) -> _Table:
    layers = [
        (*map(_address, (weight, gain, bias, in_scale, out_scale, skip_gain)), len(weight), weight.numel())
        for weight, gain, bias, skip_gain, in_scale, out_scale, _ in group
    ]
    return _table(group[0].weight.device, tuple(layers))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _uploaded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the rows on the device, for which the processor does not wait."""
    return torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _exact_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _layouts(tensor: Tensor) -> set[torch.memory_format]:
    """Return the memory formats in which its filters lie one after the other, without gaps."""
    formats = [torch.contiguous_format, *_CHANNELS_LAST.get(tensor.ndim, ())]
    return {layout for layout in formats if tensor.is_contiguous(memory_format=layout)}


def _in_layout_of(weight: Tensor, grad: Tensor) -> Tensor:
    return grad if _layouts(grad) & _layouts(weight) else torch.empty_like(weight, dtype=grad.dtype).copy_(grad)


def _launch(kernel: Any, weight: Tensor, *arguments: Any, rows: int, longest: int, **constants: Any) -> None:
    """Start a program for each filter."""
    exact, block = _DTYPES[_exact_dtype(weight)], _BLOCKS[longest > _BLOCKS[0]]
    with torch.cuda.device_of(weight):
        kernel[(rows,)](*arguments, **constants, exact=exact, block=block, enable_fp_fusion=True)


def effective_parameters(group: Sequence[Factors], dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
    """Compute those of `ScaledWS.effective_parameters` for several layers, in float32 at least, rounded to `dtype`.

    Weights are (out_channels, …), their filters one after the other in memory; W_eff has their layout. Layers of a
    group share the dtypes of their parameters and of their scales, the device, and eps.
    """
    if len(group) == 1:
        return [_OfLayer.apply(*group[0], dtype)]
    found = _OfGroup.apply(group, dtype, *itertools.chain.from_iterable(factors[:4] for factors in group))
    return list(zip(found[::2], found[1::2], strict=True))


def supports(factors: Factors) -> bool:
    """Tell whether `effective_parameters` can be given these, on a GPU, and no operation is traced.

    Dispatch modes that only look at operations, such as counters and `characterize`, do not change the answer: gradient
    checkpointing runs a layer again outside of them, and must find the same operations.
    """
    weight, gain, bias, *scalars, _ = factors
    sizes = [(gain, len(weight)), (bias, len(weight)), *((scalar, 1) for scalar in scalars)]
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.numel() > 0
        and bool(_layouts(weight))
        and all(t.numel() == n and t.is_contiguous() and t.device == weight.device for t, n in sizes if t is not None)
        and not _torch.is_tracing()
        and not _torch.functorch_is_active()
        and _torch.only_observed()
        and _works(weight.device)
    )


@functools.cache
def _works(device: torch.device) -> bool:
    """Triton compiles a part of what it does with the machine's C compiler."""
    weight, scale = torch.ones(2, 3, device=device), torch.ones((), device=device)
    factors = Factors(weight, weight[:, 0].contiguous(), in_scale=scale, out_scale=scale)
    try:
        effective_parameters([factors], weight.dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        warnings.warn(f"weights are standardized by slower kernels: Triton does not work here ({error})", stacklevel=2)
        return False
    return True
