"""Residual joins: additions of a branch to its shortcut, found on a tape."""

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from normfree.trace.operations import GATES, VIEWS
from normfree.trace.tape import Node, Operand, Tape

# Between an addition and the softmax or gate that consumes it.
_ELEMENTWISE = VIEWS | {"mul", "div", "add", "mul_", "div_", "add_", "masked_fill", "masked_fill_"}
_GATES = GATES | {"tanh", "tanh_"}
_ENLARGING = ("upsample_", "_upsample_", "pixel_shuffle", "max_unpool")
_PRODUCTS = {"mul", "mul_", "bmm", "mm", "baddbmm", "addcmul"}


@dataclass(frozen=True)
class Join:
    """An addition of a branch to its shortcut."""

    node: int
    module: str  # the innermost module that was running
    shortcut: str  # identity, projection, pooling, padding or elementwise; fusion where neither term is a shortcut
    branch_statistics: Tensor | None  # at the end of the branch, before `scale`
    scale: float  # product of the scalars between the end of the branch and the addition
    factor: float  # of the branch in the addition itself (alpha of torch.add)
    end_module: str | None  # the module that computed the end of the branch, and scaled it itself if at all
    parameters: tuple[str, ...]  # parameters that multiply the branch after its end (SkipInit, LayerScale)
    branch_node: int  # of the term that is the branch
    shortcut_node: int  # of the term that is the shortcut


def find_joins(tape: Tape) -> list[Join]:
    """The residual joins of a run, in execution order.

    An addition is one if its terms share an ancestor and at least one of them crosses a weight layer after the latest
    such ancestor; the term with the most weight layers is the branch. Additions that only feed a softmax or a gate
    (attention logits, the two paths of a channel attention) are none, nor is a sum of classifiers or of gates, or of
    two runs of the same layers.
    """
    children = defaultdict(list)
    for node in tape.nodes:
        for parent in node.parents:
            children[parent].append(node)
    joins = []
    for node in tape.nodes:
        join = _join(tape.nodes, node) if node.terms else None
        if join is None or _feeds_only_gates(node, children):
            continue
        sums_classifiers = join.shortcut == "projection" and len(node.shape) == 2 and not _meets_weights(node, children)
        if not sums_classifiers:
            joins.append(join)
    return joins


def _join(nodes: list[Node], node: Node) -> Join | None:
    ancestor = _latest_common_ancestor(nodes, [term.node for term in node.terms])
    if ancestor is None or all(is_gate(nodes, term.node) for term in node.terms):
        return None
    paths = [_paths(nodes, ancestor, term.node) for term in node.terms]
    branch = max(range(len(paths)), key=lambda i: paths[i].rank)
    shortcut = min((i for i in range(len(paths)) if i != branch), key=lambda i: paths[i].rank)
    if paths[branch].most_layers == 0 or paths[branch].modules == paths[shortcut].modules:
        return None
    shapes = {nodes[term.node].shape for term in node.terms}
    if len(shapes) > 1 and paths[shortcut].fewest_layers > 0:
        return None  # two paths of which one is broadcast: an embedding of time or class is added
    end, scale, statistics, parameters = _walk_back(nodes, node.terms[branch])
    return Join(
        node=node.index,
        module=node.module,
        shortcut="fusion" if _fuses(paths[branch], paths[shortcut]) else paths[shortcut].kind,
        branch_statistics=statistics,
        scale=scale,
        factor=node.terms[branch].factor,
        end_module=end,
        parameters=parameters,
        branch_node=node.terms[branch].node,
        shortcut_node=node.terms[shortcut].node,
    )


def _latest_common_ancestor(nodes: list[Node], starts: list[int]) -> int | None:
    """The latest node from which every start descends (a node descends from itself)."""
    reached: dict[int, int] = defaultdict(int)  # node -> bit set of the starts that descend from it
    for bit, start in enumerate(starts):
        reached[start] |= 1 << bit
    heap = [-start for start in set(starts)]
    heapq.heapify(heap)
    everyone = (1 << len(starts)) - 1
    while heap:
        index = -heapq.heappop(heap)
        if reached[index] == everyone:
            return index
        for parent in nodes[index].parents:
            if parent not in reached:
                heapq.heappush(heap, -parent)
            reached[parent] |= reached[index]
    return None


def _between(nodes: list[Node], ancestor: int, end: int) -> list[int]:
    """Nodes on a path from the ancestor (excluded) to the end (included), in execution order."""
    seen, stack = {end}, [end]
    while stack:
        for parent in nodes[stack.pop()].parents:
            if parent >= ancestor and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    on_path = {ancestor}
    for index in sorted(seen - {ancestor}):
        if any(parent in on_path for parent in nodes[index].parents):
            on_path.add(index)
    return sorted(on_path - {ancestor})


@dataclass(frozen=True)
class _Paths:
    """Operations between an ancestor and a term."""

    fewest_layers: int  # weight layers on a path
    most_layers: int
    operations: int  # on the longest path
    kind: str  # of a shortcut that goes there
    modules: frozenset[str]  # of the weight layers on all paths
    enlarges: bool  # the resolution
    has_joins: bool  # additions of activations

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Rank of a term among those of an addition: the branch has the highest, the shortcut the lowest.

        A term that one path reaches without a weight layer ranks lowest; then the number of weight layers counts, then
        that of operations.
        """
        return self.fewest_layers > 0, self.most_layers, self.operations


def _paths(nodes: list[Node], ancestor: int, end: int) -> _Paths:
    fewest, most, operations = {ancestor: 0}, {ancestor: 0}, {ancestor: 0}
    path = _between(nodes, ancestor, end)
    for index in path:
        known = [parent for parent in nodes[index].parents if parent in most]
        fewest[index] = min(fewest[p] for p in known) + nodes[index].weight_layer
        most[index] = max(most[p] for p in known) + nodes[index].weight_layer
        operations[index] = max(operations[p] for p in known) + 1
    unweighted = [nodes[index] for index in path if fewest[index] == 0]
    kind = "projection" if fewest[end] else _unweighted_kind(unweighted)
    return _Paths(
        fewest[end],
        most[end],
        operations[end],
        kind,
        frozenset(nodes[index].module for index in path if nodes[index].weight_layer),
        any(nodes[index].op.startswith(_ENLARGING) for index in path),
        any(nodes[index].terms for index in path),
    )


def _fuses(one: _Paths, other: _Paths) -> bool:
    """Tell whether two paths with weights are equals: of several resolutions, or streams with blocks of their own.

    As in feature pyramids, sums in U-Nets, and where HRNets exchange.
    """
    weighted = one.fewest_layers > 0 and other.fewest_layers > 0
    return weighted and (one.enlarges is not other.enlarges or (one.has_joins and other.has_joins))


def is_gate(nodes: Sequence[Node], index: int) -> bool:
    """Tell whether a node is the output of a gate, in another view or by another factor."""
    node = nodes[index]
    while len(node.parents) == 1 and (node.op in VIEWS or node.factor is not None):
        node = nodes[node.parents[0]]
    return node.op in _GATES


def _unweighted_kind(path: list[Node]) -> str:
    operations = {node.op for node in path if node.factor != 1 and not node.terms} - VIEWS
    if not operations:
        return "identity"
    if any("pool" in op for op in operations):
        return "pooling"
    return "padding" if any("pad" in op for op in operations) else "elementwise"


def _walk_back(nodes: list[Node], term: Operand) -> tuple[str | None, float, Tensor | None, tuple[str, ...]]:
    """Walk from a term of the addition to the end of its branch: through scalars, stochastic depth and views.

    Returns the module at the end of the branch, the product of the scalars, the statistics, and the parameters that
    multiply. The module is None where its own multiplications were passed: its declared scale is then in the product.
    """
    # The statistics are those of the term's node: whatever scaled it before the addition is divided out by the caller.
    node, scale, statistics = nodes[term.node], 1.0, term.statistics
    parameters: tuple[str, ...] = ()
    scaled_in = set()
    while len(node.parents) == 1:
        parameters += node.parameters
        before = nodes[node.parents[0]].statistics
        if (node.masked or node.factor == 0) and before is not None:
            statistics, scale = before, 1.0
        elif node.factor is not None:
            scale *= node.factor
        elif not node.parameters and node.op not in VIEWS:
            break
        if node.factor is not None:
            scaled_in.add(node.module)
        node = nodes[node.parents[0]]
    return None if node.module in scaled_in else node.module, scale, statistics, parameters


def _meets_weights(node: Node, children: dict[int, list[Node]]) -> bool:
    """Tell whether a weight layer descends from the node."""
    seen, stack = {node.index}, [node]
    while stack:
        for child in children[stack.pop().index]:
            if child.weight_layer:
                return True
            if child.index not in seen:
                seen.add(child.index)
                stack.append(child)
    return False


def _feeds_only_gates(node: Node, children: dict[int, list[Node]]) -> bool:
    """Tell whether all that follows is a softmax or a gate whose result multiplies another activation."""
    followers = children[node.index]
    for _ in range(8):
        gates = [child for child in followers if child.op in GATES]
        rest = [child for child in followers if child.op not in GATES]
        if gates and not rest:
            return all(_multiplies(gate, children) for gate in gates)
        if not followers or gates or any(child.op not in _ELEMENTWISE for child in rest):
            return False
        followers = [grandchild for child in rest for grandchild in children[child.index]]
    return False


def _multiplies(gate: Node, children: dict[int, list[Node]]) -> bool:
    followers = children[gate.index]
    for _ in range(8):
        if any(child.op in _PRODUCTS and len(child.parents) > 1 for child in followers):
            return True
        followers = [grandchild for child in followers for grandchild in children[child.index]]
    return False
