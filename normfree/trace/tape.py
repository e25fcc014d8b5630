"""The tape: dataflow graph and streamed statistics of one eager run of any model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class Operand:
    """A term of an addition: `factor` times the value of `node`, whose statistics are those before the factor."""

    node: int
    factor: float
    statistics: Tensor | None


@dataclass(slots=True)
class Node:
    """One activation: the output of one operation."""

    index: int
    op: str
    module: str
    parents: tuple[int, ...]
    shape: tuple[int, ...]
    channel_axis: int | None
    weight_layer: bool = False
    plain: bool = False  # a weight layer by the weight and bias of its module as they are, as a plain layer's
    signal: bool = True  # False for an input of indices, masks or lengths: no real numbers
    factor: float | None = None  # value = factor · value of the only parent
    masked: bool = False  # value = (a number per example) · value of the only parent
    parameters: tuple[str, ...] = ()  # those that `factor`, or a factor per channel, comes from
    stacked_along: int | None = None  # the axis along which the parents were stacked
    statistics: Tensor | None = None
    zeros: Tensor | None = None  # of a rectifier: fraction of zeros, and of channels that are zero everywhere
    terms: tuple[Operand, ...] = ()  # of an addition
    selects: bool = False  # it has other values, or another number of them, where values before it differ by rounding


@dataclass
class Tape:
    """Record of a run. Nodes are in execution order, parents before children."""

    nodes: list[Node] = field(default_factory=list)
    last_module: str = ""
    outputs: list[int | None] = field(default_factory=list)  # nodes of the tensors that the model returned
    parameters: set[str] = field(default_factory=set)  # those that operations on activations have taken
    held: set[int] = field(default_factory=set)  # nodes whose tensors outlive the run: returned, or put somewhere


@dataclass(frozen=True)
class Operation:
    """An operation that takes an activation, and has just been done."""

    func: Any
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Mapping[int, int]  # id of an argument -> the node that it was before the operation
    outputs: Sequence[tuple[Tensor, Node]]
