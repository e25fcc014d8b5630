"""Structure of a network: its normalizers and their weight layers, read from a run's tape, for any topology."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from torch import nn

from normfree.trace.joins import Join, find_joins, is_gate
from normfree.trace.operations import VIEWS
from normfree.trace.tape import Node, Tape

# What shares its input's memory, or may.
_ALIASES = (VIEWS - {"clone", "roll", "_to_copy"}) | {
    "as_strided", "chunk", "narrow", "select", "slice", "split", "split_with_sizes", "unbind",
}  # fmt: skip
_MATRIX_PRODUCTS = {"mm", "bmm", "addmm", "_sparse_mm", "_sparse_addmm"}
_PRODUCTS = {"mul", "mul_"} | _MATRIX_PRODUCTS
_CROPS = {"slice", "narrow"}
_KINDS = ("batch_norm", "group_norm", "layer_norm")


@dataclass
class Structure:
    """Relations of a network's normalizers to its weight layers, by paths of modules."""

    sources: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Normalizer that ran -> the weight layers whose outputs it normalizes, the nearest on each way."""
    of_input: set[str] = field(default_factory=set)
    """Normalizers that take the network's input, or a part of it, past all weight layers."""
    direct: dict[str, str] = field(default_factory=dict)
    """Normalizer -> weight layer, where it takes the layer's output as it is, and nothing else takes that."""
    shared: dict[str, str] = field(default_factory=dict)
    """The same where something else takes it too, or keeps it: another layer, or who called the network."""
    padded: set[str] = field(default_factory=set)
    """Modules that do what a convolution or a linear layer does with their weight, and pad, crop or normalize."""
    used: set[str] = field(default_factory=set)
    """Modules whose own parameters were used, whether they were called or not."""
    ends: set[str] = field(default_factory=set)
    """Weight layers that end a residual branch."""
    overwritten: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Normalizer -> modules that write into its output."""


def read_structure(tape: Tape, norms: set[str]) -> Structure:
    """The structure of a run in which the modules of these paths normalized."""
    nodes = tape.nodes
    children: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        for parent in node.parents:
            children[parent].append(node)
    found = Structure()
    inputs: dict[str, set[int]] = defaultdict(set)  # normalizer -> nodes that it takes
    for node in nodes:
        norm = _owner(node.module, norms)
        if norm is not None:
            inputs[norm] |= {parent for parent in node.parents if _owner(nodes[parent].module, norms) != norm}
    calls: dict[str, set[int]] = defaultdict(set)  # weight layer -> its nodes
    for node in nodes:
        if node.weight_layer:
            calls[node.module].add(node.index)
    for norm, taken in inputs.items():
        reached = [_weight_layers(nodes, index, {}) for index in taken]
        found.sources[norm] = {nodes[layer].module for before, _ in reached for layer in before}
        if any(is_input for _, is_input in reached):
            found.of_input.add(norm)
        layers = {layer for index in taken if (layer := _as_it_is(nodes, index)) is not None}
        sole = len(found.sources[norm]) == 1 and calls[next(iter(found.sources[norm]))] == layers
        if sole and _on_channels(nodes, norm, taken):
            layer = next(iter(layers))
            alone = all(_owner(nodes[user].module, norms) == norm for user in _users(layer, children, tape.held))
            (found.direct if alone else found.shared)[norm] = nodes[layer].module
    for node in nodes:
        norm = _owner(node.module, norms)
        if norm is not None:
            found.overwritten[norm] |= {writer.module for writer in _writers(node.index, children)}
    found.padded = _padding_modules([node for node in nodes if _owner(node.module, norms) is None], calls)
    found.used = {name.rpartition(".")[0] for name in tape.parameters}
    found.ends = {path for _, paths in branch_ends(tape).values() for path in paths}
    return found


def branch_ends(tape: Tape) -> dict[int, tuple[int, set[str]]]:
    """Find, for the nodes of joins, the operand that is a branch, and the paths of the weight layers that end it.

    Those layers are several where branches are concatenated, or where parallel ones are added before they join a
    residual stream; there the last join counts. An operand that is a residual stream itself is no branch, nor is a
    shortcut without weights, and a fusion of equals has none.
    """
    joins = {join.node: join for join in find_joins(tape)}
    chosen: dict[int, tuple[int, int]] = {}  # by call of a weight layer
    for join in joins.values():
        operands = {"fusion": (), "projection": (join.branch_node, join.shortcut_node)}
        for operand in operands.get(join.shortcut, (join.branch_node,)):
            layers, is_stream = _weight_layers(tape.nodes, operand, joins)
            if not is_stream:
                chosen |= dict.fromkeys(layers, (join.node, operand))
                break
    found: dict[int, tuple[int, set[str]]] = {}
    for layer, (node, operand) in chosen.items():
        found.setdefault(node, (operand, set()))[1].add(tape.nodes[layer].module)
    return found


def _weight_layers(nodes: Sequence[Node], start: int, joins: Mapping[int, Join]) -> tuple[set[int], bool]:
    """Find the nearest weight layers before a node, or itself, gates left aside.

    Also tells whether an input, or a residual stream (one of `joins` whose shortcut has no weights), is reached without
    crossing them.
    """
    layers, is_stream = set(), False
    seen, stack = {start}, [start]
    while stack:
        node = nodes[stack.pop()]
        if node.weight_layer:
            layers.add(node.index)
            continue
        if not node.parents or (node.index in joins and joins[node.index].shortcut != "projection"):
            is_stream |= node.signal
            continue
        for parent in _signal_parents(nodes, node):
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return layers, is_stream


def _signal_parents(nodes: Sequence[Node], node: Node) -> tuple[int, ...]:
    """Parents but for the other factor of a product, which is not the signal.

    That is the gate of a squeeze-excite, and an input that no weights come before: a mask, an adjacency.
    """
    if node.op not in _PRODUCTS or len(node.parents) < 2:
        return node.parents
    signal = node.parents
    if node.op not in _MATRIX_PRODUCTS:
        signal = tuple(p for p in signal if nodes[p].shape == node.shape and not is_gate(nodes, p)) or signal
    return tuple(p for p in signal if _has_weights_before(nodes, p)) or signal


def _has_weights_before(nodes: Sequence[Node], start: int) -> bool:
    """Tell whether a node is, or descends from, a weight layer."""
    seen, stack = {start}, [start]
    while stack:
        node = nodes[stack.pop()]
        if node.weight_layer:
            return True
        fresh = set(node.parents) - seen
        seen |= fresh
        stack += fresh
    return False


def _as_it_is(nodes: Sequence[Node], index: int) -> int | None:
    """The weight layer whose output this is, in another view or cropped at most, its channels in the same order."""
    node = nodes[index]
    while not node.weight_layer:
        if len(node.parents) != 1 or node.op not in VIEWS | _CROPS or node.channel_axis is None:
            return None
        before = nodes[node.parents[0]]
        if node.op in _CROPS and node.shape[node.channel_axis] != before.shape[node.channel_axis]:
            return None
        node = nodes[node.parents[0]]
    return node.index


def _padding_modules(nodes: Iterable[Node], calls: Mapping[str, set[int]]) -> set[str]:
    """Find the modules that are a plain use of their weight, before and after which they pad or crop."""
    others = {""}
    for node in nodes:
        path = _owner(node.module, calls.keys())
        if path is not None and not (
            node.plain
            if node.index in calls[path]
            else node.op in VIEWS - {"roll"} or node.op in _CROPS or "_pad" in node.op
        ):
            others.add(path)
    return calls.keys() - others


def _on_channels(nodes: Sequence[Node], norm: str, taken: set[int]) -> bool:
    """Tell whether the scale and shift of a normalizer are those of its input's channels, not of another axis."""
    known = [node for node in nodes if node.module == norm and any(kind in node.op for kind in _KINDS)]
    if not known:  # one that composes elementary operations: BatchNorm's convention
        return all(nodes[index].channel_axis == 1 for index in taken)
    parents = [(nodes[node.parents[0]], "layer_norm" in node.op) for node in known]
    return all(node.channel_axis == (len(node.shape) - 1 if last else 1) for node, last in parents)


def _users(index: int, children: dict[int, list[Node]], held: set[int]) -> Iterator[int]:
    """Yield the nodes that take a node's values, through views; itself too if it is held after the run."""
    if index in held:
        yield index
    for child in children[index]:
        if child.op in VIEWS | _CROPS and (children[child.index] or child.index in held):
            yield from _users(child.index, children, held)
        else:
            yield child.index


def _writers(index: int, children: dict[int, list[Node]]) -> Iterator[Node]:
    """Yield the nodes that write into a node's memory."""
    for child in children[index]:
        if child.op.endswith("_"):
            yield child
        elif child.op in _ALIASES:
            yield from _writers(child.index, children)


def _owner(module: str, paths: Set[str]) -> str | None:
    """The path among `paths` that a module is, or is in."""
    while module:
        if module in paths:
            return module
        module = module.rpartition(".")[0]
    return None


def norm_paths(model: nn.Module, kinds: tuple[type[nn.Module], ...], names: frozenset[str]) -> set[str]:
    """Paths of the normalizers of these classes, or of classes whose name has one of these in it."""
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, kinds) or any(name in type(module).__name__ for name in names)
    }
