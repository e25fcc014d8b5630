"""The recorder: writes the tape while any model runs.

Nothing is attached to the model. A dispatch mode sees every operation; two global module hooks tell which module is
running. Only what descends from the inputs ("activations") becomes a node, and a node keeps a few numbers, never a
tensor, so memory does not grow with depth.
"""

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from normfree import _torch
from normfree.trace.channels import channel_statistics
from normfree.trace.operations import (
    ADDITIONS,
    NOT_A_FUNCTION_OF_VALUES,
    QUANTIZED_WEIGHT_LAYERS,
    SCALINGS,
    SELECTIONS,
    VIEWS,
    WEIGHT_LAYERS,
    channel_axis_after,
    same_but_for_space,
)
from normfree.trace.tape import Node, Operand, Tape


_MASKS = (torch.bool, torch.uint8)


@contextlib.contextmanager
def recording(
    tape: Tape,
    model: nn.Module,
    inputs: Iterable[Tensor],
    *,
    reduce_weight_layers: bool = False,
    on_gradient: Callable[[int, Tensor], None] | None = None,
    on_module: Callable[[str, int | None, Tensor], None] | None = None,
) -> Iterator[Callable[[Iterable[Tensor]], None]]:
    """Record on `tape` what happens inside; `inputs` are the tensors it starts from.

    Gives a function that is to be called with the outputs, while they and nothing else of the run are held.

    Additions of activations are reduced to statistics, terms and result, the moment they happen; with
    `reduce_weight_layers` the outputs of weight layers too. `on_gradient` is called with a node and its gradient, in a
    later backward pass, for everything that was reduced; `on_module` with a module's path, the node of its output, if it
    is one, and the output, where that is a tensor.
    """
    recorder = _Recorder(tape, model, inputs, reduce_weight_layers, on_gradient)
    recorder.on_module = on_module
    with recorder.module_hooks(), recorder:
        yield recorder.note_outputs
    recorder.flush_gradient_hooks()


class _Recorder(_torch.TorchDispatchMode):
    def __init__(
        self,
        tape: Tape,
        model: nn.Module,
        inputs: Iterable[Tensor],
        reduce_weight_layers: bool,
        on_gradient: Callable[[int, Tensor], None] | None,
    ) -> None:
        super().__init__()
        self.tape = tape
        self.reduce_weight_layers = reduce_weight_layers
        self.on_gradient = on_gradient
        self.on_module: Callable[[str, int | None, Tensor], None] | None = None
        self.names = {id(module): name for name, module in model.named_modules()}
        # Their gates add activations at every time step; none of that is a residual stream.
        self.recurrent = {name for name, module in model.named_modules() if isinstance(module, nn.RNNBase)}
        self.stack: list[str] = []
        # Both by id of the tensor; the weak reference tells a tensor from a later one at the same address.
        self.node_of: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.parameter_of: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.writes: dict[int, int] = {}  # storage -> the last node that was written into it
        self.awaiting_hook: list[tuple[weakref.ref[Tensor], int]] = []
        for name, parameter in model.named_parameters():
            self.parameter_of[id(parameter)] = (weakref.ref(parameter), name)
        for tensor in inputs:
            self._add_node("input", tensor, ())

    # ---- which module is running

    @contextlib.contextmanager
    def module_hooks(self) -> Iterator[None]:
        """Global forward hooks for the duration of a run."""
        handles = (
            module_hooks.register_module_forward_pre_hook(self.enter_module),
            module_hooks.register_module_forward_hook(self.leave_module),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter_module(self, module: nn.Module, _: Any) -> None:
        name = self.names.get(id(module))
        if name is not None:
            self.stack.append(name)
            self.tape.last_module = name

    def leave_module(self, module: nn.Module, _: Any, output: Any) -> None:
        name = self.names.get(id(module))
        if name is not None and name in self.stack:
            # A forward that raised, and was caught by the model, has left its name above.
            while self.stack.pop() != name:
                pass
            self.tape.last_module = self.stack[-1] if self.stack else name
            if self.on_module is not None and isinstance(output, Tensor):
                self.on_module(name, self._lookup(output), output)

    # ---- the graph

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.flush_gradient_hooks()
        op = func._schema.name.split("::")[1]
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        parents = self._parents(tensors)
        # Before the call: an operation in place overwrites what it reads.
        recurrent = bool(self.stack) and self.stack[-1] in self.recurrent
        terms = self._terms(op, args, kwargs) if parents and not recurrent else ()
        out = func(*args, **kwargs)
        if not parents:
            self._forget_overwritten(out, tensors)
            self._propagate_parameter(op, args, out)
            return out
        if op.startswith(NOT_A_FUNCTION_OF_VALUES):
            return out
        written = self._written(func, args, kwargs)
        for tensor in _tensors((out,)):
            if not any(tensor is w for w in written):
                self._node_for(op, args, tensor, parents, terms)
        for tensor in written:
            self.writes[_torch.storage_key(tensor)] = self._node_for(op, args, tensor, parents, terms)
        return out

    def _add_node(self, op: str, tensor: Tensor, parents: tuple[int, ...], **attributes: Any) -> Node:
        module = self.stack[-1] if self.stack else ""
        attributes.setdefault("channel_axis", None)
        node = Node(len(self.tape.nodes), op, module, parents, tuple(tensor.shape), **attributes)
        self.tape.nodes.append(node)
        self.node_of[id(tensor)] = (weakref.ref(tensor), node.index)
        return node

    def _node_for(
        self, op: str, args: tuple[Any, ...], tensor: Tensor, parents: tuple[int, ...], terms: tuple[Operand, ...]
    ) -> int:
        node = self._add_node(
            op,
            tensor,
            parents,
            channel_axis=channel_axis_after(op, args, [self.tape.nodes[p] for p in parents], tensor),
            weight_layer=self._is_weight_layer(op, args),
            terms=terms,
            selects=op in SELECTIONS or (op == "index" and any(i.dtype in _MASKS for i in _tensors(args[1:]))),
        )
        if op in SCALINGS:
            self._note_scaling(node, op, args)
        if op == "add" and len(parents) == 1 and not isinstance(args[1], Tensor) and args[1] == 0:
            node.factor = 1.0  # how Python's sum() begins
        if op == "stack":
            node.stacked_along = int(args[1] if len(args) > 1 else 0) % tensor.ndim
        if terms or (node.weight_layer and self.reduce_weight_layers and tensor.is_floating_point()):
            node.statistics = channel_statistics(tensor, node.channel_axis)
            if self.on_gradient is not None:
                self.awaiting_hook.append((weakref.ref(tensor), node.index))
        return node.index

    def _lookup(self, tensor: Any) -> int | None:
        entry = self.node_of.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def _parents(self, tensors: list[Tensor]) -> tuple[int, ...]:
        """Find the nodes that the tensors stand for, later writes to their storage (through another view) included."""
        found: dict[int, None] = {}
        for tensor in tensors:
            index = self._lookup(tensor)
            if index is not None:
                found[index] = None
            write = self.writes.get(_torch.storage_key(tensor)) if self.writes else None
            if write is not None and (index is None or write > index):
                found[write] = None
        return tuple(found)

    def _forget_overwritten(self, out: Any, sources: list[Tensor]) -> None:
        """Forget what was once written at the address of new memory."""
        if self.writes:
            old = {_torch.storage_key(t) for t in sources}
            for tensor in _tensors((out,)):
                if _torch.storage_key(tensor) not in old:
                    self.writes.pop(_torch.storage_key(tensor), None)

    @staticmethod
    def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        if not func._schema.is_mutable:
            return []
        written: list[Tensor] = []
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                written += _tensors((value,))
        return written

    def note_outputs(self, outputs: Iterable[Tensor]) -> None:
        """Note the nodes of the outputs, and which tensors are still held by somebody."""
        self.tape.outputs = [self._lookup(tensor) for tensor in outputs]
        self.tape.held = {index for reference, index in self.node_of.values() if reference() is not None}

    # ---- what kind of operation

    def _is_weight_layer(self, op: str, args: tuple[Any, ...]) -> bool:
        if op not in WEIGHT_LAYERS:  # the weight of a quantized one is packed into an object
            return op.startswith(QUANTIZED_WEIGHT_LAYERS) and not any(isinstance(value, Tensor) for value in args[1:])
        if "conv" in op or "rnn" in op:
            return True  # also where the weight is computed from the input (conditional convolutions)
        # Attention multiplies two activations; that is no weight layer.
        activations = [self._is_activation(args[i]) for i in WEIGHT_LAYERS[op]]
        return sum(activations) == 1

    def _terms(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Operand, ...]:
        """Return the terms of an addition of two or more activations, reduced to their statistics; else nothing."""
        if op in ("sum", "sum_"):
            return self._stacked_terms(args)
        sign = ADDITIONS.get(op)
        if sign is None:
            return ()
        operands = list(args)
        if op.startswith("addcmul"):  # x + value · a · b: of the product, the factor that is an activation
            factor = float(kwargs.get("value", 1))
            operands[1] = operands[1] if self._is_activation(operands[1]) else operands[2]
        else:
            factor = sign * float(kwargs.get("alpha", 1))
        tensors = [operand for operand in operands[:2] if isinstance(operand, Tensor)]
        nodes = [self._parents([t]) for t in tensors]
        if len(tensors) < 2 or not all(nodes) or not all(t.is_floating_point() for t in tensors):
            return ()
        axis = next((a for n in nodes if (a := self.tape.nodes[n[-1]].channel_axis) is not None), None)
        if not same_but_for_space(tensors[0], tensors[1], axis):
            return ()
        return tuple(
            Operand(n[-1], f, self._reduce(n[-1], t, axis))
            for n, t, f in zip(nodes, tensors, (1.0, factor), strict=True)
        )

    def _stacked_terms(self, args: tuple[Any, ...]) -> tuple[Operand, ...]:
        """Return the terms of a sum over the axis along which activations were stacked: it is their addition."""
        tensor, dims = args[0], args[1] if len(args) > 1 else None
        index = self._lookup(tensor)
        if index is None or not isinstance(dims, list | tuple) or len(dims) != 1:
            return ()
        node = self.tape.nodes[index]
        if node.stacked_along is None or dims[0] % tensor.ndim != node.stacked_along:
            return ()
        parts = tensor.unbind(dims[0])
        if len(parts) != len(node.parents) or not tensor.is_floating_point():
            return ()
        axes = [self.tape.nodes[p].channel_axis for p in node.parents]
        axis = next((a for a in axes if a is not None), None)
        return tuple(Operand(p, 1.0, channel_statistics(t, axis)) for p, t in zip(node.parents, parts, strict=True))

    def _reduce(self, index: int, tensor: Tensor, axis: int | None) -> Tensor:
        """Return the statistics of a tensor that is about to be added; reduced once, however often it is added."""
        node = self.tape.nodes[index]
        if node.statistics is None or node.shape != tuple(tensor.shape):
            statistics = channel_statistics(tensor, axis if node.channel_axis is None else node.channel_axis)
            if node.shape != tuple(tensor.shape):
                return statistics
            node.statistics = statistics
        return node.statistics

    def _note_scaling(self, node: Node, op: str, args: tuple[Any, ...]) -> None:
        """Note for a multiplication of one activation by numbers: by which, and by whose parameters."""
        if len(node.parents) != 1:
            return
        if op.startswith("neg"):
            node.factor = -1.0
            return
        activation, other = (args[0], args[1]) if self._is_activation(args[0]) else (args[1], args[0])
        if isinstance(other, Tensor) and self._is_activation(other):
            return  # x · x
        if isinstance(other, Tensor):
            entry = self.parameter_of.get(id(other))
            if entry is not None and entry[0]() is other:
                node.parameters = (entry[1],)
        if isinstance(other, Tensor) and other.numel() != 1:
            node.masked = other.ndim == len(node.shape) and other.numel() == other.shape[0] and not node.parameters
            if not node.masked:
                return
        else:
            number = other.item() if isinstance(other, Tensor) else other
            if not isinstance(number, int | float):
                return  # complex
            node.factor = float(number) if op.startswith("mul") else (1 / number if number else math.inf)
        # What is multiplied by nothing, for some examples or all, shows itself only before.
        parent = self.tape.nodes[node.parents[0]]
        if (node.masked or node.factor == 0) and parent.statistics is None and op in ("mul", "div"):
            parent.statistics = channel_statistics(activation, parent.channel_axis)

    def _is_activation(self, value: Any) -> bool:
        return isinstance(value, Tensor) and bool(self._parents([value]))

    def _propagate_parameter(self, op: str, args: tuple[Any, ...], out: Any) -> None:
        """Note that a view or a copy of a parameter is still that parameter."""
        if op in VIEWS and args and isinstance(out, Tensor):
            entry = self.parameter_of.get(id(args[0]))
            if entry is not None and entry[0]() is args[0] and out is not args[0]:
                self.parameter_of[id(out)] = (weakref.ref(out), entry[1])

    # ---- gradients

    def flush_gradient_hooks(self) -> None:
        """Attach hooks a step later: tensors get their autograd history after the dispatcher returns."""
        for reference, index in self.awaiting_hook:
            tensor = reference()
            if tensor is not None and tensor.requires_grad and self.on_gradient is not None:
                tensor.register_hook(functools.partial(self.on_gradient, index))
        self.awaiting_hook.clear()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
