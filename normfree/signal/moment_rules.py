"""Rules that push moments through torch's operations, one for each kind, and what each of them assumes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normfree.signal.moments import (
    Moments,
    added,
    affine,
    joined,
    largest,
    multiplied,
    normal,
    normalized,
    pointwise,
    rearranged,
    rectified,
    skewed,
)

WHITE = "what a layer adds up is uncorrelated, over channels and positions"
INDEPENDENT = "terms of a sum, and factors of a product, are independent unless they come from the same values"
LARGE = "normalizers see a large sample"
NORMAL = "what is added up from many values is normally distributed"

Arguments = dict[str, Any]
Rule = Callable[[Any, Arguments], Any]  # of the function and its arguments by name, moments among them

_VIEWS = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand",
    "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "flip", "roll", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "reflection_pad2d", "replication_pad2d", "unfold", "diagonal", "repeat",
    "flatten",
)  # fmt: skip
_SAME = ("alias", "clone", "contiguous", "detach", "_to_copy", "lift_fresh", "to")
_POINTWISE = (
    "hardtanh", "clamp", "clamp_min", "clamp_max", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "tanh",
    "leaky_relu", "elu", "softplus", "mish", "exp", "sqrt", "rsqrt", "abs", "square", "erf", "pow", "threshold",
    "celu", "log_sigmoid_forward", "reciprocal", "log", "selu", "softsign",
)  # fmt: skip


def rule_of(op: str) -> tuple[Rule, tuple[str, ...]] | None:
    """Return the rule for an operation and what it assumes; None for an operation that has none."""
    name = op.removesuffix("_") if op not in _RULES else op
    return _RULES.get(name)


def _first(arguments: Arguments) -> tuple[str, Any]:
    return next(iter(arguments.items()))


def _view(func: Any, arguments: Arguments) -> Any:
    name, m = _first(arguments)
    out = func(**arguments | {name: m.mean.contiguous()})
    if isinstance(out, Tensor):
        same = out.shape == m.shape and m.mean.is_set_to(out)
        return m if same else rearranged(m, lambda x: func(**arguments | {name: x.contiguous()}))
    parts = zip(*(func(**arguments | {name: x.contiguous()}) for x in (m.mean, m.variance, m.third)), strict=True)
    return [skewed(*part) for part in parts]


def _same(func: Any, arguments: Arguments) -> Moments:
    moments: Moments = _first(arguments)[1]
    return moments


def _dropout(func: Any, arguments: Arguments) -> Moments:
    if arguments.get("train"):
        raise NotImplementedError
    return _same(func, arguments)


def _pointwise(func: Any, arguments: Arguments) -> Moments:
    name, m = _first(arguments)
    rest = {key: value for key, value in arguments.items() if key != name}
    if any(isinstance(value, Tensor | Moments) for value in rest.values()):
        raise NotImplementedError
    packet = getattr(torch.ops.aten, func._schema.name.split("::")[1].removesuffix("_"))
    return pointwise(m, lambda x: packet(x, **rest))


def _relu(func: Any, arguments: Arguments) -> Moments:
    return rectified(_first(arguments)[1])


def _prelu(func: Any, arguments: Arguments) -> Moments:
    m, weight = arguments["self"], arguments["weight"]
    return pointwise(m, lambda x: torch.where(x > 0, x, weight * x))


def _add(func: Any, arguments: Arguments) -> Moments:
    sign = -1.0 if "sub" in func._schema.name else 1.0
    one, other, factor = arguments["self"], arguments["other"], sign * arguments.get("alpha", 1)
    if isinstance(one, Moments) and isinstance(other, Moments):
        return added(one, other, factor)
    if isinstance(one, Moments):
        return affine(one, 1.0, factor * other)
    return affine(other, factor, one)


def _rsub(func: Any, arguments: Arguments) -> Moments:
    return affine(arguments["self"], -float(arguments.get("alpha", 1)), arguments["other"])


def _multiply(func: Any, arguments: Arguments) -> Moments:
    one, other = arguments["self"], arguments["other"]
    if isinstance(one, Moments) and isinstance(other, Moments):
        return multiplied(one, other)
    return affine(one, other) if isinstance(one, Moments) else affine(other, one)


def _divide(func: Any, arguments: Arguments) -> Moments:
    one, other = arguments["self"], arguments["other"]
    if not isinstance(one, Moments):
        raise NotImplementedError
    if isinstance(other, Moments):
        return multiplied(one, pointwise(other, torch.reciprocal))
    return affine(one, 1 / other)


def _negate(func: Any, arguments: Arguments) -> Moments:
    return affine(arguments["self"], -1.0)


def _add_product(func: Any, arguments: Arguments) -> Moments:
    factor = float(arguments.get("value", 1))
    start, one, other = arguments["self"], arguments["tensor1"], arguments["tensor2"]
    if not isinstance(one, Moments) and not isinstance(other, Moments):
        return affine(start, 1.0, factor * one * other)
    product = _multiply(func, {"self": one, "other": other})
    return added(start, product, factor) if isinstance(start, Moments) else affine(product, factor, start)


def _convolution(func: Any, arguments: Arguments) -> Moments:
    m, weight = arguments["input"], arguments["weight"]
    if isinstance(weight, Moments):
        raise NotImplementedError
    mean = func(**arguments | {"input": m.mean})
    variance = func(**arguments | {"input": m.variance, "weight": weight.square(), "bias": None})
    return normal(mean, variance)


def _matrix_product(func: Any, arguments: Arguments) -> Moments:
    """Multiply by a constant matrix, on either side."""
    known = {key: value for key, value in arguments.items() if isinstance(value, Moments)}
    if len(known) != 1 or ("self" in known and "mat2" not in arguments and "batch2" not in arguments):
        raise NotImplementedError  # attention
    name, m = next(iter(known.items()))
    if name == "self" and ("mat1" in arguments or "batch1" in arguments):
        raise NotImplementedError  # the bias is an activation
    mean = func(**arguments | {name: m.mean})
    others = {key: value.square() for key, value in arguments.items() if isinstance(value, Tensor)}
    if "mat1" in arguments or "batch1" in arguments:
        others["self"] = torch.zeros_like(arguments["self"])
    return normal(mean, func(**arguments | others | {name: m.variance}))


def _batch_norm(func: Any, arguments: Arguments) -> Moments:
    m = arguments["input"]
    axes = [d for d in range(m.mean.ndim) if d != 1]
    shape = [1, -1] + [1] * (m.mean.ndim - 2)
    if arguments.get("training", arguments.get("running_mean") is None):
        out = normalized(m, axes, float(arguments["eps"]))
    else:
        scale = (arguments["running_var"] + float(arguments["eps"])).rsqrt()
        out = affine(m, scale.view(shape), (-arguments["running_mean"] * scale).view(shape))
    return _scaled_and_shifted(out, arguments, shape)


def _scaled_and_shifted(m: Moments, arguments: Arguments, shape: Sequence[int]) -> Moments:
    weight, bias = arguments.get("weight"), arguments.get("bias")
    if isinstance(weight, Moments) or isinstance(bias, Moments):
        raise NotImplementedError
    if weight is None and bias is None:
        return m
    return affine(m, 1.0 if weight is None else weight.view(shape), 0.0 if bias is None else bias.view(shape))


def _layer_norm(func: Any, arguments: Arguments) -> Moments:
    m, shape = arguments["input"], list(arguments["normalized_shape"])
    axes = list(range(m.mean.ndim - len(shape), m.mean.ndim))
    return _scaled_and_shifted(normalized(m, axes, float(arguments["eps"])), arguments, shape)


def _group_norm(func: Any, arguments: Arguments) -> Moments:
    m = arguments["input"]
    grouped = m.mean.reshape(m.shape[0], arguments["group"], -1)
    variances = m.variance.reshape(grouped.shape)
    mean = grouped.mean(2, keepdim=True)
    variance = variances.mean(2, keepdim=True) + (grouped - mean).square().mean(2, keepdim=True)
    scale = (variance + float(arguments["eps"])).rsqrt()

    def per_channel(x: Tensor) -> Tensor:
        channels = x.repeat_interleave(m.shape[1] // arguments["group"], 1)
        return channels.view(m.shape[0], m.shape[1], *[1] * (m.mean.ndim - 2))

    out = affine(m, per_channel(scale), per_channel(-mean * scale))
    return _scaled_and_shifted(out, arguments, [1, -1] + [1] * (m.mean.ndim - 2))


def _window_sum(arguments: Arguments) -> Callable[[Tensor], Tensor]:
    kernel, stride = list(arguments["kernel_size"]), list(arguments.get("stride") or arguments["kernel_size"])
    padding, ceil = list(arguments.get("padding", [0, 0])), bool(arguments.get("ceil_mode", False))
    return lambda x: torch.nn.functional.avg_pool2d(x, kernel, stride, padding, ceil, True, 1)


def _max_pool(func: Any, arguments: Arguments) -> Moments:
    if any(d != 1 for d in arguments.get("dilation", [1])):
        raise NotImplementedError
    return largest(arguments["self"], _window_sum(arguments))


def _average_pool(func: Any, arguments: Arguments) -> Moments:
    m = arguments["self"]
    mean = func(**arguments | {"self": m.mean})
    total = _window_sum(arguments)
    divisor = total(torch.ones_like(m.mean)) / func(**arguments | {"self": torch.ones_like(m.mean)})
    return normal(mean, total(m.variance) / divisor.square())


def _adaptive_pool(func: Any, arguments: Arguments) -> Moments:
    m = arguments["self"]
    mean, variance = (func(**arguments | {"self": x}) for x in (m.mean, m.variance))
    positions = torch.ones(())
    for axis in (2, 3):
        size, parts = m.shape[axis], torch.arange(mean.shape[axis])
        window = ((parts + 1) * size + len(parts) - 1) // len(parts) - parts * size // len(parts)
        positions = positions * window.to(mean).view([-1 if d == axis else 1 for d in range(4)])
    return normal(mean, variance / positions)


def _mean(func: Any, arguments: Arguments) -> Moments:
    m = arguments["self"]
    mean, variance = (func(**arguments | {"self": x}) for x in (m.mean, m.variance))
    return normal(mean, variance * mean.numel() / m.mean.numel())


def _sum(func: Any, arguments: Arguments) -> Moments:
    m = arguments["self"]
    return skewed(*(func(**arguments | {"self": x}) for x in (m.mean, m.variance, m.third)))


def _join(func: Any, arguments: Arguments) -> Moments:
    parts = [_constant(part) for part in arguments["tensors"]]
    dim = int(arguments.get("dim", 0)) % parts[0].mean.ndim
    return joined(parts, dim)


def _stack(func: Any, arguments: Arguments) -> Moments:
    parts = [_constant(part) for part in arguments["tensors"]]
    dim = int(arguments.get("dim", 0))
    return skewed(
        *(torch.stack([getattr(part, name) for part in parts], dim) for name in ("mean", "variance", "third"))
    )


def _constant(part: Moments | Tensor) -> Moments:
    return part if isinstance(part, Moments) else normal(part, torch.zeros_like(part))


def _pad(func: Any, arguments: Arguments) -> Moments:
    m = arguments["self"]
    return normal(func(**arguments | {"self": m.mean}), func(**arguments | {"self": m.variance, "value": 0}))


def _table() -> dict[str, tuple[Rule, tuple[str, ...]]]:
    rules: dict[str, tuple[Rule, tuple[str, ...]]] = {}
    for names, rule, *assumptions in (
        (_VIEWS, _view),
        (_SAME, _same),
        (("dropout", "native_dropout"), _dropout),
        (_POINTWISE, _pointwise, NORMAL),
        (("relu",), _relu, NORMAL),
        (("_prelu_kernel",), _prelu, NORMAL),
        (("add", "sub"), _add, INDEPENDENT),
        (("rsub",), _rsub),
        (("mul",), _multiply, INDEPENDENT),
        (("div",), _divide, INDEPENDENT),
        (("neg",), _negate),
        (("addcmul",), _add_product, INDEPENDENT),
        (("convolution", "_convolution"), _convolution, WHITE),
        (("mm", "addmm", "bmm", "baddbmm"), _matrix_product, WHITE),
        (("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
          "_batch_norm_with_update", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm"),
         _batch_norm, LARGE),
        (("native_layer_norm",), _layer_norm, LARGE),
        (("native_group_norm",), _group_norm, LARGE),
        (("max_pool2d_with_indices", "max_pool2d"), _max_pool, WHITE, NORMAL),
        (("avg_pool2d",), _average_pool, WHITE),
        (("_adaptive_avg_pool2d", "adaptive_avg_pool2d"), _adaptive_pool, WHITE),
        (("mean",), _mean, WHITE),
        (("sum",), _sum, WHITE),
        (("cat",), _join),
        (("stack",), _stack),
        (("constant_pad_nd",), _pad),
    ):  # fmt: skip
        for name in names:
            rules[name] = (rule, tuple(assumptions))
    return rules


_RULES = _table()
