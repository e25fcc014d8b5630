"""From the tape to the residual joins."""

import heapq
from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor

from normfree.signal.tape import Node, Operand, Tape

# Between an addition and the softmax or gate that consumes it.
_ELEMENTWISE = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "clone", "expand", "unsqueeze", "squeeze", "_to_copy",
    "mul", "div", "add", "mul_", "div_", "add_", "masked_fill", "masked_fill_", "alias",
}  # fmt: skip
_GATES = {"_softmax", "_safe_softmax", "sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_"}
_SAME_VALUES = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "clone", "alias", "detach",
    "contiguous", "_to_copy", "unsqueeze", "squeeze", "roll", "lift_fresh",
}  # fmt: skip


@dataclass(frozen=True)
class Join:
    """An addition of a branch to its shortcut."""

    node: int
    module: str  # the innermost module that was running
    shortcut: str  # identity, projection, pooling, padding or elementwise
    branch_statistics: Tensor | None  # at the end of the branch, before `scale`
    scale: float  # product of the scalars between the end of the branch and the addition
    factor: float  # of the branch in the addition itself (alpha of torch.add)
    end_module: str  # the module that computed the end of the branch
    parameters: tuple[str, ...]  # parameters that multiply the branch after its end (SkipInit, LayerScale)


def find_joins(tape: Tape) -> list[Join]:
    """The residual joins of a run, in execution order.

    An addition is one if its terms share an ancestor and at least one of them crosses a weight layer after the latest
    such ancestor; the term with the most weight layers is the branch. Additions that only feed a softmax or a gate
    (attention logits, the two paths of a channel attention) are none, nor is a sum of classifiers.
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
    if ancestor is None:
        return None
    lengths = [_longest_paths(nodes, ancestor, term.node) for term in node.terms]
    branch = max(range(len(lengths)), key=lambda i: lengths[i])
    if lengths[branch][0] == 0:
        return None
    shortcut = min(range(len(lengths)), key=lambda i: lengths[i])
    end, scale, statistics, parameters = _walk_back(nodes, node.terms[branch])
    return Join(
        node=node.index,
        module=node.module,
        shortcut=_shortcut_kind(nodes, ancestor, node.terms[shortcut].node, lengths[shortcut][0]),
        branch_statistics=statistics,
        scale=scale,
        factor=node.terms[branch].factor,
        end_module=end.module,
        parameters=parameters,
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


def _longest_paths(nodes: list[Node], ancestor: int, end: int) -> tuple[int, int]:
    """The most weight layers, and the most operations, on a path from the ancestor to the end."""
    layers, operations = {ancestor: 0}, {ancestor: 0}
    for index in _between(nodes, ancestor, end):
        known = [parent for parent in nodes[index].parents if parent in layers]
        layers[index] = max(layers[p] for p in known) + nodes[index].weight_layer
        operations[index] = max(operations[p] for p in known) + 1
    return layers[end], operations[end]


def _walk_back(nodes: list[Node], term: Operand) -> tuple[Node, float, Tensor | None, tuple[str, ...]]:
    """From a term of the addition to where its branch ends: through scalars, stochastic depth and views."""
    # The statistics are those of the term's node: whatever scaled it before the addition is divided out by the caller.
    node, scale, statistics = nodes[term.node], 1.0, term.statistics
    parameters: tuple[str, ...] = ()
    while len(node.parents) == 1:
        parameters += node.parameters
        if node.factor is not None:
            scale *= node.factor
        elif node.masked and nodes[node.parents[0]].statistics is not None:
            statistics, scale = nodes[node.parents[0]].statistics, 1.0
        elif not node.parameters and node.op not in _SAME_VALUES:
            break
        node = nodes[node.parents[0]]
    return node, scale, statistics, parameters


def _shortcut_kind(nodes: list[Node], ancestor: int, end: int, layers: int) -> str:
    if layers:
        return "projection"
    path = [nodes[index] for index in _between(nodes, ancestor, end)]
    operations = {node.op for node in path if node.factor != 1} - _SAME_VALUES
    if not operations:
        return "identity"
    if any("pool" in op for op in operations):
        return "pooling"
    return "padding" if any("pad" in op for op in operations) else "elementwise"


def _meets_weights(node: Node, children: dict[int, list[Node]]) -> bool:
    """Whether a weight layer descends from the node."""
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
    followers = children[node.index]
    for _ in range(8):
        if not followers:
            return False
        rest = [child for child in followers if child.op not in _GATES]
        if not rest:
            return True
        if len(rest) < len(followers) or any(child.op not in _ELEMENTWISE for child in rest):
            return False
        followers = [grandchild for child in rest for grandchild in children[child.index]]
    return False
