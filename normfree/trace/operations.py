"""Operations of torch by what they do to a signal: weight layers, additions, scalings; where channels go."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from normfree.trace.channels import default_channel_axis

# Operations that mix channels with a matrix, and where their activation operand and their weight stand.
WEIGHT_LAYERS = {
    "convolution": (0, 1),
    "_convolution": (0, 1),
    "addmm": (1, 2),
    "addmv": (1, 2),
    "mm": (0, 1),
    "mv": (0, 1),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
    "linear": (0, 1),
    "mkldnn_rnn_layer": (0, 1),
    "_cudnn_rnn": (0, 1),
}
RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
# The same values, in another shape, order, place or precision.
VIEWS = RESHAPES | {
    "alias", "clone", "contiguous", "detach", "expand", "lift_fresh", "permute", "roll", "squeeze", "t", "_to_copy",
    "transpose", "unsqueeze",
}  # fmt: skip
ADDITIONS = {"add": 1.0, "add_": 1.0, "sub": -1.0, "sub_": -1.0, "addcmul": 1.0, "addcmul_": 1.0}
SCALINGS = {"mul", "mul_", "div", "div_", "neg", "neg_"}
# The values that they give, or the number of values, depend on which of their inputs are larger.
SELECTIONS = {
    "argmax", "argmin", "argsort", "batched_nms", "masked_select", "nms", "nonzero", "nonzero_numpy", "sort", "topk",
    "unique_consecutive", "unique_dim", "_unique", "_unique2",
}  # fmt: skip
# Rectifiers, and where the bound below which they cut stands among the arguments, and what it is unless given.
RECTIFIERS: dict[str, tuple[int, float] | None] = {
    "relu": None, "clamp_min": (1, math.nan), "clamp": (1, math.nan), "hardtanh": (1, -1.0), "threshold": (1, math.nan),
}  # fmt: skip
GATES = {"_softmax", "_safe_softmax", "sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_"}
NOT_A_FUNCTION_OF_VALUES = ("new_", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")


class Activation(Protocol):
    """Input of an operation, as far as it is known."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        ...

    @property
    def channel_axis(self) -> int | None:
        """Axis of the channels, where it is known."""
        ...


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments, or results, of an operation."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that a call of an operation writes into."""
    if not func._schema.is_mutable:
        return []
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors_in((args[position] if position < len(args) else kwargs.get(argument.name),))
    return written


def is_rectifier(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an operation sets to 0 what is below 0: ReLU and ReLU6, by whatever name."""
    op = op.removesuffix("_")
    if op not in RECTIFIERS:
        return False
    bound = RECTIFIERS[op]
    if bound is None:
        return True
    position, default = bound
    least = args[position] if len(args) > position else kwargs.get("min", default)
    cuts_to_zero = op != "threshold" or (len(args) > 2 and args[2] == 0)
    return isinstance(least, int | float) and least == 0 and cuts_to_zero


def same_but_for_space(a: Tensor, b: Tensor, channel_axis: int | None) -> bool:
    """Tell whether a sum joins two activations: one shape, but that one of them may be broadcast over positions."""
    if a.ndim != b.ndim or a.ndim < 2:
        return False
    axis = default_channel_axis(a.ndim) if channel_axis is None else channel_axis
    return all(
        m == n or (1 in (m, n) and d not in (0, axis)) for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True))
    )


def channel_axis_after(op: str, args: Sequence[Any], parents: Sequence[Activation], out: Tensor) -> int | None:
    """Find the channel axis of an operation's output from its input's; None where that is lost."""
    if not out.ndim:
        return None
    if "conv" in op or "batch_norm" in op or "group_norm" in op:
        return min(1, out.ndim - 1)
    if op in WEIGHT_LAYERS or (op == "native_layer_norm" and len(args[1]) == 1):
        return out.ndim - 1
    source = next((p for p in parents if p.channel_axis is not None), None)
    if source is None or source.channel_axis is None:
        return None
    axis, ndim = source.channel_axis, len(source.shape)
    if op == "roll" and (not (args[2] if len(args) > 2 else ()) or axis in {d % ndim for d in args[2]}):
        return None
    if op in RESHAPES:
        return _axis_after_view(source.shape, axis, tuple(out.shape))
    if op == "permute":
        return [d % ndim for d in args[1]].index(axis)
    if op in ("transpose", "transpose_", "t"):
        first, second = (0, 1) if op == "t" else (args[1] % ndim, args[2] % ndim)
        return {first: second, second: first}.get(axis, axis)
    if op in ("unsqueeze", "unsqueeze_", "stack"):
        at = args[1] if len(args) > 1 else 0
        return axis + (at % out.ndim <= axis)
    if op in ("select", "unbind") or (op in ("mean", "sum", "amax", "amin", "squeeze") and out.ndim < ndim):
        dims = args[1] if len(args) > 1 else 0 if op == "unbind" else [d for d in range(ndim) if source.shape[d] == 1]
        gone = {d % ndim for d in (dims if isinstance(dims, list | tuple) else [dims]) if d is not None}
        return None if axis in gone else axis - sum(d < axis for d in gone)
    return axis if out.ndim == ndim else None


def _axis_after_view(old: tuple[int, ...], axis: int, new: tuple[int, ...]) -> int | None:
    before = math.prod(old[:axis])
    for candidate in range(len(new)):
        if new[candidate] == old[axis] and math.prod(new[:candidate]) == before:
            return candidate
    return None
