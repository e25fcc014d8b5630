"""The reader: from a tape to the records of a report."""

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor, nn

from normfree.signal.record import SignalRecord
from normfree.trace.channels import channel_statistics
from normfree.trace.joins import Join, find_joins
from normfree.trace.tape import Node, Tape


class Reader:
    """Reader of a run's statistics, and of the gradients that are kept in its backward pass."""

    def __init__(self, model: nn.Module, tape: Tape) -> None:
        self.model = model
        self.tape = tape
        self.gradients: dict[int, Tensor] = {}
        self.joins: list[Join] = []
        self.scales: dict[int, float] = {}  # node of a join -> what its branch is multiplied by

    def read(self) -> None:
        """Find the joins and their scales: after the forward pass, before any parameter changes."""
        self.joins = find_joins(self.tape)
        for join in self.joins:
            declared = 1.0 if join.end_module is None else _declared_scale(self.model.get_submodule(join.end_module))
            self.scales[join.node] = join.scale * declared

    def keep_gradient(self, index: int, gradient: Tensor | None) -> None:
        """The gradient at a node of the tape; None for an output that nothing used."""
        if gradient is not None:
            self.gradients[index] = channel_statistics(gradient, self.tape.nodes[index].channel_axis)

    def records(self) -> list[SignalRecord]:
        """One record per residual join; without joins one per weight layer that was reduced."""
        if self.joins:
            rows = [self._join_record(self.tape.nodes[join.node], join) for join in self.joins]
        else:
            layers = [node for node in self.tape.nodes if node.weight_layer and node.statistics is not None]
            rows = [self._record(node, shortcut="none", residual_variance=None) for node in layers]
        return _numbered(rows)

    def branches_to_stream(self) -> list[float]:
        """Root mean square of each join's branch, as it is added, over that of its shortcut; NaN over nothing."""
        return [_branch_to_stream(self.tape.nodes[join.node], join) for join in self.joins]

    def rectifiers(self) -> list[tuple[str, Node]]:
        """Return the names and nodes of the rectifiers behind which zeros were counted."""
        nodes = [node for node in self.tape.nodes if node.zeros is not None]
        names = numbered_names([node.module or type(self.model).__name__ for node in nodes])
        return list(zip(names, nodes, strict=True))

    def _join_record(self, node: Node, join: Join) -> SignalRecord:
        scale = self.scales[join.node]
        residual = None
        if join.branch_statistics is not None and scale != 0:
            residual = float(join.branch_statistics[1]) / scale**2
        record = self._record(node, shortcut=join.shortcut, residual_variance=residual)
        if record.gradient_variance is None:
            return record
        return dataclasses.replace(
            record, gradient_residual_variance=record.gradient_variance * (scale * join.factor) ** 2
        )

    def _record(self, node: Node, *, shortcut: str, residual_variance: float | None) -> SignalRecord:
        assert node.statistics is not None
        squared_mean, variance = node.statistics.tolist()
        gradient = self.gradients[node.index].tolist() if node.index in self.gradients else (None, None)
        owner = self.model.get_submodule(node.module)
        expected = getattr(owner, "expected_variance", None)
        return SignalRecord(
            name=node.module or type(self.model).__name__,
            stage=0,
            shape=node.shape,
            shortcut=shortcut,
            squared_mean=squared_mean,
            variance=variance,
            residual_variance=residual_variance,
            expected_variance=expected if isinstance(expected, float) else None,
            gradient_squared_mean=gradient[0],
            gradient_variance=gradient[1],
        )


def _numbered(records: list[SignalRecord]) -> list[SignalRecord]:
    """Number the stages (a new one where the shape changes), and add "#2" to the name of a module's second record."""
    numbered, stage = [], 0
    names = numbered_names([record.name for record in records])
    for previous, record, name in zip([None, *records], records, names, strict=False):
        stage += previous is None or previous.shape[1:] != record.shape[1:]
        numbered.append(dataclasses.replace(record, name=name, stage=stage))
    return numbered


def numbered_names(names: Sequence[str]) -> list[str]:
    """Add "#2" to the second of the same name, and so on."""
    seen = dict[str, int]()
    numbered = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        numbered.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return numbered


def _branch_to_stream(node: Node, join: Join) -> float:
    squares = {}
    for term in node.terms:
        assert term.statistics is not None
        squares[term.node] = float(term.statistics.sum()) * term.factor**2
    stream = squares[join.shortcut_node]
    return math.sqrt(squares[join.branch_node] / stream) if stream > 0 else math.nan


def _declared_scale(module: nn.Module) -> float:
    """Return the factor that a module says it multiplies its output by."""
    scale = 1.0
    for attribute in ("out_scale", "skip_gain"):
        value = getattr(module, attribute, None)
        if isinstance(value, Tensor) and value.numel() == 1:
            scale *= float(value.detach())
    return scale
