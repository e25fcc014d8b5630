"""Triton kernels of `fused`: a program standardizes one filter, or computes its gradients."""

import triton
import triton.language as tl

# Columns of the table of a group: addresses of weight, gain, bias, in_scale, out_scale and skip_gain, or 0; the number
# of the layer's first program, of its filters and of a filter's elements; where its results start in the common buffers
# for weights and for vectors. Their number:
_COLUMNS = tl.constexpr(11)


@triton.jit
def _standardize(
    row, fan_in, weight, gain, bias, has_bias, in_scale, out_scale, skip_gain, has_skip, w_eff, b_eff, mean, rstd,
    eps: tl.constexpr, exact: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Compute a filter of W_eff and its b_eff: see `ScaledWS.effective_parameters`."""
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
    r = tl.where(norm == float("inf"), float("nan"), 1 / tl.sqrt(tl.maximum(norm, least)))
    out = tl.load(out_scale).to(exact) * tl.load(skip_gain, has_skip, 1.0).to(exact)
    scale = tl.load(gain + row).to(exact) * (tl.load(in_scale).to(exact) * out) * r
    for first in range(0, fan_in, block):
        inside = first + columns < fan_in
        centred = tl.load(weight + start + first + columns, inside, 0.0).to(exact) - m
        tl.store(w_eff + start + first + columns, centred * scale, inside)
    tl.store(b_eff + row, tl.load(bias + row, has_bias, 0.0).to(exact) * out, has_bias)
    tl.store(mean + row, m)
    tl.store(rstd + row, tl.where(norm < least, -r, r))  # negative where the filter is clamped


@triton.jit
def _derive(
    row, fan_in, of_filter, grad_w_eff, grad_b_eff, has_grad_b, weight, gain, bias, in_scale, out_scale,
    skip_gain, has_skip, mean, rstd, grad_weight, grad_gain, grad_bias, exact: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a filter, its gain and bias; return its share in the gradient of the SkipInit gain.

    `of_filter` is fan_in, or 0 where nothing depends on the filter.
    """
    start = row.to(tl.int64) * fan_in
    columns = tl.arange(0, block)
    m, signed = tl.load(mean + row), tl.load(rstd + row)
    r = tl.abs(signed)
    total, products = tl.zeros((block,), exact), tl.zeros((block,), exact)
    for first in range(0, of_filter, block):
        inside = first + columns < of_filter
        grad = tl.load(grad_w_eff + start + first + columns, inside, 0.0).to(exact)
        total += grad
        products += grad * (tl.load(weight + start + first + columns, inside, 0.0).to(exact) - m)
    average, product = tl.sum(total, 0) / fan_in, tl.sum(products, 0) * r
    before, g = tl.load(in_scale).to(exact), tl.load(gain + row).to(exact)
    without_skip = tl.load(out_scale).to(exact)
    out = without_skip * tl.load(skip_gain, has_skip, 1.0).to(exact)
    of_bias = tl.load(grad_b_eff + row, has_grad_b, 0.0).to(exact)
    share = product * g * before + of_bias * tl.load(bias + row, has_grad_b, 0.0).to(exact)
    tl.store(grad_gain + row, product * before * out)
    tl.store(grad_bias + row, of_bias * out, has_grad_b)
    along = tl.where(signed > 0, product * r, 0.0)  # what a clamped filter is divided by is constant
    scale = g * before * out * r
    for first in range(0, of_filter, block):
        inside = first + columns < of_filter
        grad = tl.load(grad_w_eff + start + first + columns, inside, 0.0).to(exact)
        centred = tl.load(weight + start + first + columns, inside, 0.0).to(exact) - m
        tl.store(grad_weight + start + first + columns, scale * (grad - average - along * centred), inside)
    return share * without_skip


@triton.jit
def forward(
    weight, gain, bias, in_scale, out_scale, skip_gain, w_eff, b_eff, mean, rstd, fan_in,
    has_bias: tl.constexpr, has_skip: tl.constexpr, eps: tl.constexpr, exact: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Program of one filter of a layer alone."""
    _standardize(
        tl.program_id(0), fan_in, weight, gain, bias, has_bias, in_scale, out_scale, skip_gain, has_skip,
        w_eff, b_eff, mean, rstd, eps, exact, block,
    )  # fmt: skip


@triton.jit
def backward(
    grad_w_eff, grad_b_eff, weight, gain, bias, in_scale, out_scale, skip_gain, mean, rstd,
    grad_weight, grad_gain, grad_bias, shares, fan_in,
    has_bias: tl.constexpr, has_skip: tl.constexpr, exact: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Program of one filter of a layer alone; `shares` in the gradient of the SkipInit gain are summed elsewhere."""
    row = tl.program_id(0)
    share = _derive(
        row, fan_in, fan_in, grad_w_eff, grad_b_eff, has_bias, weight, gain, bias, in_scale, out_scale,
        skip_gain, has_skip, mean, rstd, grad_weight, grad_gain, grad_bias, exact, block,
    )  # fmt: skip
    tl.store(shares + row, share)


@triton.jit
def forward_of_group(
    table, layer_of_row, w_eff, b_eff, mean, rstd,
    dtype: tl.constexpr, of_scales: tl.constexpr, eps: tl.constexpr, exact: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Program of one filter of a group."""
    layer = table + tl.load(layer_of_row + tl.program_id(0)).to(tl.int64) * _COLUMNS
    bias, skip_gain, vectors = tl.load(layer + 2), tl.load(layer + 5), tl.load(layer + 10)
    _standardize(
        tl.program_id(0) - tl.load(layer + 6).to(tl.int32), tl.load(layer + 8).to(tl.int32),
        tl.load(layer).to(tl.pointer_type(dtype)), tl.load(layer + 1).to(tl.pointer_type(dtype)),
        bias.to(tl.pointer_type(dtype)), bias != 0,
        tl.load(layer + 3).to(tl.pointer_type(of_scales)), tl.load(layer + 4).to(tl.pointer_type(of_scales)),
        skip_gain.to(tl.pointer_type(dtype)), skip_gain != 0,
        w_eff + tl.load(layer + 9), b_eff + vectors, mean + vectors, rstd + vectors, eps, exact, block,
    )  # fmt: skip


@triton.jit
def backward_of_group(
    table, layer_of_row, grads, mean, rstd, grad_weight, grad_gain, grad_bias, shares, grad_skip_gain,
    dtype: tl.constexpr, of_grads: tl.constexpr, of_scales: tl.constexpr, exact: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Program of one filter of a group; the last of a layer with a SkipInit gain sums the shares in its gradient."""
    index = tl.load(layer_of_row + tl.program_id(0)).to(tl.int64)
    layer, given = table + index * _COLUMNS, grads + index * 3
    row, filters = tl.program_id(0) - tl.load(layer + 6).to(tl.int32), tl.load(layer + 7).to(tl.int32)
    skip_gain, vectors = tl.load(layer + 5), tl.load(layer + 10)
    grad_w_eff, grad_b_eff, fan_in = tl.load(given), tl.load(given + 1), tl.load(layer + 8).to(tl.int32)
    share = _derive(
        row, fan_in, tl.where(grad_w_eff != 0, fan_in, 0), grad_w_eff.to(tl.pointer_type(of_grads)),
        grad_b_eff.to(tl.pointer_type(of_grads)), grad_b_eff != 0,
        tl.load(layer).to(tl.pointer_type(dtype)), tl.load(layer + 1).to(tl.pointer_type(dtype)),
        tl.load(layer + 2).to(tl.pointer_type(dtype)),
        tl.load(layer + 3).to(tl.pointer_type(of_scales)), tl.load(layer + 4).to(tl.pointer_type(of_scales)),
        skip_gain.to(tl.pointer_type(dtype)), skip_gain != 0, mean + vectors, rstd + vectors,
        grad_weight + tl.load(layer + 9), grad_gain + vectors, grad_bias + vectors, exact, block,
    )  # fmt: skip
    if skip_gain != 0:
        tl.store(shares + vectors + row, share)
        tl.debug_barrier()  # the share is written before the program is counted
        if tl.atomic_add(given + 2, 1, sem="acq_rel") == filters - 1:
            columns = tl.arange(0, block)
            total = tl.zeros((block,), exact)
            for first in range(0, filters, block):
                total += tl.load(shares + vectors + first + columns, first + columns < filters, 0.0, volatile=True)
            tl.store(grad_skip_gain + index, tl.sum(total, 0))
