"""The recorder: writes the tape while any model runs.

Nothing is attached to the model. A dispatch mode sees every operation; two global module hooks tell which module is
running. Only what descends from the inputs ("activations") becomes a node, and a node keeps a few numbers, never a
tensor, so memory does not grow with depth.
"""

import contextlib
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from normfree import _torch
from normfree.trace.channels import channel_statistics, channel_zeros, has_statistics
from normfree.trace.lineage import Lineage
from normfree.trace.operations import (
    ADDITIONS,
    NOT_A_FUNCTION_OF_VALUES,
    SCALINGS,
    SELECTIONS,
    VIEWS,
    channel_axis_after,
    is_rectifier,
    same_but_for_space,
    tensors_in,
    written_by,
)
from normfree.trace.progress import reached
from normfree.trace.tape import Node, Operand, Operation, Tape
from normfree.trace.weights import Weights

_MASKS = (torch.bool, torch.uint8)


@contextlib.contextmanager
def recording(
    tape: Tape,
    model: nn.Module,
    inputs: Iterable[Tensor],
    *,
    reduce_weight_layers: bool = False,
    count_zeros: bool = False,
    on_gradient: Callable[[int, Tensor], None] | None = None,
    on_module: Callable[[str, int | None, Tensor], None] | None = None,
    on_value: Callable[[int, Tensor], None] | None = None,
    on_operation: Callable[[Operation], None] | None = None,
) -> Iterator[Callable[[Iterable[Tensor]], None]]:
    """Record on `tape` what happens inside; `inputs` are the tensors it starts from.

    Gives a function that is to be called with the outputs, while they and nothing else of the run are held.

    Additions of activations are reduced to statistics, terms and result, the moment they happen; with
    `reduce_weight_layers` the outputs of weight layers too. Of everything that was reduced `on_value` gets the node and
    the tensor, `on_gradient` the node and its gradient, in a later backward pass. `on_module` gets a module's path, its
    output, where that is a tensor, and before it the node of that, or None; `on_operation` each operation that takes an
    activation, once it is done. With `count_zeros` zeros are counted behind rectifiers.
    """
    recorder = _Recorder(tape, model, inputs, reduce_weight_layers, on_gradient)
    recorder.on_module, recorder.on_value, recorder.on_operation = on_module, on_value, on_operation
    recorder.count_zeros = count_zeros
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
        self.on_value: Callable[[int, Tensor], None] | None = None
        self.on_operation: Callable[[Operation], None] | None = None
        self.count_zeros = False
        self.names = {id(module): name for name, module in model.named_modules()}
        # Their gates add activations at every time step; none of that is a residual stream.
        self.recurrent = {name for name, module in model.named_modules() if isinstance(module, nn.RNNBase)}
        self.stack: list[str] = []
        self.failed = False
        self.lineage = Lineage(model)
        self.weights = Weights(model, self.lineage)
        self.awaiting_hook: list[tuple[weakref.ref[Tensor], int]] = []
        for tensor in inputs:
            self._add_node("input", tensor, (), signal=tensor.is_floating_point() or tensor.is_complex())

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
            reached(name)

    def leave_module(self, module: nn.Module, _: Any, output: Any) -> None:
        name = self.names.get(id(module))
        if name is not None and name in self.stack:
            # A forward that raised, and was caught by the model, has left its name above.
            while self.stack.pop() != name:
                pass
            self.tape.last_module = self.stack[-1] if self.stack else name
            if self.on_module is not None and isinstance(output, Tensor):
                self.on_module(name, self.lineage.node(output), output)

    # ---- the graph

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = func._schema.name.split("::")[1]
        # Before the call: an operation in place overwrites what it reads.
        known = self._guarded(op, self._look_at, op, args, kwargs)
        out = func(*args, **kwargs)
        if known is not None:
            self._guarded(op, self._record, func, op, args, kwargs, out, *known)
        return out

    def _guarded(self, op: str, part: Callable[..., Any], *arguments: Any) -> Any:
        """Do a part of the measurement, which must never break what it watches."""
        try:
            return part(*arguments)
        except Exception as error:
            if not self.failed:
                self.failed = True
                place = f" in {self.stack[-1]}" if self.stack and self.stack[-1] else ""
                warnings.warn(
                    f"the measurement, not the model, failed at {op}{place} ({type(error).__name__}: {error}): what "
                    "follows from there is not measured",
                    stacklevel=3,
                )
            return None

    def _look_at(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the tensors that an operation takes, their nodes, and the terms of an addition."""
        self.flush_gradient_hooks()
        taken = [*tensors_in(args), *tensors_in(kwargs.values())]
        parents = self.lineage.parents(op, taken)
        recurrent = bool(self.stack) and self.stack[-1] in self.recurrent
        terms = self._terms(op, args, kwargs) if parents and not recurrent else ()
        inputs = {} if self.on_operation is None else {id(t): n[-1] for t in taken if (n := self.lineage.nodes([t]))}
        return taken, parents, terms, inputs

    def _record(
        self, func: Any, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any,
        taken: list[Tensor], parents: tuple[int, ...], terms: tuple[Operand, ...], inputs: Mapping[int, int],
    ) -> None:  # fmt: skip
        if not parents:
            made = list(tensors_in((out,)))
            self.lineage.forget_overwritten(made, taken)
            self.lineage.pass_on_parameters(made, taken, same=op in VIEWS)
            return
        if op.startswith(NOT_A_FUNCTION_OF_VALUES):
            return
        self.tape.parameters.update(name for t in taken if (name := self.lineage.parameter(t)) is not None)
        written = written_by(func, args, kwargs)
        module = self.stack[-1] if self.stack else ""
        weight_layer = self.weights.are_in(func, op, args, out, module)
        counts_zeros = self.count_zeros and is_rectifier(op, args, kwargs)
        in_place = {id(tensor) for tensor in written}
        outputs: list[tuple[Tensor, Node]] = []
        for tensor in [*(t for t in tensors_in((out,)) if id(t) not in in_place), *written]:
            node = self._node_for(op, args, tensor, parents, terms, weight_layer)
            if id(tensor) in in_place:
                self.lineage.writes[_torch.storage_key(tensor)] = node.index
            if counts_zeros and has_statistics(tensor):
                node.zeros = channel_zeros(tensor, node.channel_axis)
            outputs.append((tensor, node))
        if self.on_operation is not None:
            self.on_operation(Operation(func, op, args, kwargs, inputs, outputs))

    def _add_node(self, op: str, tensor: Tensor, parents: tuple[int, ...], **attributes: Any) -> Node:
        module = self.stack[-1] if self.stack else ""
        attributes.setdefault("channel_axis", None)
        node = Node(len(self.tape.nodes), op, module, parents, tuple(tensor.shape), **attributes)
        self.tape.nodes.append(node)
        self.lineage.set_node(tensor, node.index)
        return node

    def _node_for(
        self, op: str, args: tuple[Any, ...], tensor: Tensor, parents: tuple[int, ...], terms: tuple[Operand, ...],
        weight_layer: bool,
    ) -> Node:  # fmt: skip
        node = self._add_node(
            op,
            tensor,
            parents,
            channel_axis=channel_axis_after(op, args, [self.tape.nodes[p] for p in parents], tensor),
            weight_layer=weight_layer,
            terms=terms,
            selects=op in SELECTIONS or (op == "index" and any(i.dtype in _MASKS for i in tensors_in(args[1:]))),
        )
        node.plain = weight_layer and self.weights.are_plain(op, args, node.module)
        if op in SCALINGS:
            self._note_scaling(node, op, args)
        if op == "add" and len(parents) == 1 and not isinstance(args[1], Tensor) and args[1] == 0:
            node.factor = 1.0  # how Python's sum() begins
        if op == "stack":
            node.stacked_along = int(args[1] if len(args) > 1 else 0) % tensor.ndim
        if terms or (node.weight_layer and self.reduce_weight_layers and has_statistics(tensor)):
            node.statistics = channel_statistics(tensor, node.channel_axis)
            if self.on_value is not None:
                self.on_value(node.index, tensor)
            if self.on_gradient is not None:
                self.awaiting_hook.append((weakref.ref(tensor), node.index))
        return node

    def note_outputs(self, outputs: Iterable[Tensor]) -> None:
        """Note the nodes of the outputs, and which tensors are still held by somebody."""
        self.tape.outputs = [self.lineage.node(tensor) for tensor in outputs]
        self.tape.held = self.lineage.held_nodes()

    # ---- what kind of operation

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
        nodes = [self.lineage.nodes([t]) for t in tensors]
        if len(tensors) < 2 or not all(nodes) or not all(map(has_statistics, tensors)):
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
        index = self.lineage.node(tensor)
        if index is None or not isinstance(dims, list | tuple) or len(dims) != 1:
            return ()
        node = self.tape.nodes[index]
        if node.stacked_along is None or dims[0] % tensor.ndim != node.stacked_along:
            return ()
        parts = tensor.unbind(dims[0])
        if len(parts) != len(node.parents) or not has_statistics(tensor):
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
        if isinstance(other, Tensor) and (name := self.lineage.parameter(other)) is not None:
            node.parameters = (name,)
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
        nothing = (node.masked or node.factor == 0) and op in ("mul", "div")
        if nothing and parent.statistics is None and has_statistics(activation):
            parent.statistics = channel_statistics(activation, parent.channel_axis)

    def _is_activation(self, value: Any) -> bool:
        return isinstance(value, Tensor) and bool(self.lineage.nodes([value]))

    # ---- gradients

    def flush_gradient_hooks(self) -> None:
        """Attach hooks a step later: tensors get their autograd history after the dispatcher returns."""
        for reference, index in self.awaiting_hook:
            tensor = reference()
            if tensor is not None and tensor.requires_grad and self.on_gradient is not None:
                tensor.register_hook(functools.partial(self.on_gradient, index))
        self.awaiting_hook.clear()
