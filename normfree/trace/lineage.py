"""Lineage of tensors in a run: the node of the tape that a tensor stands for, and the parameters that it comes from."""

import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from normfree import _torch


class Lineage:
    """Memory of a run's tensors, none of which it keeps alive.

    Tensors are known by their id; a weak reference tells one from a later one at the same address.
    """

    def __init__(self, model: nn.Module) -> None:
        self.node_of: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.parameter_of: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self.made_of_parameters: dict[int, weakref.ref[Tensor]] = {}
        self.writes: dict[int, int] = {}  # storage -> the last node that was written into it
        for name, parameter in model.named_parameters():
            self.parameter_of[id(parameter)] = (weakref.ref(parameter), name)
            self.made_of_parameters[id(parameter)] = weakref.ref(parameter)

    def set_node(self, tensor: Tensor, index: int) -> None:
        """Note the node of a tensor."""
        self.node_of[id(tensor)] = (weakref.ref(tensor), index)

    def node(self, tensor: Tensor) -> int | None:
        """Return the node of a tensor, or None."""
        entry = self.node_of.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def nodes(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        """Find the nodes that the tensors stand for, later writes to their storage (through another view) included."""
        found: dict[int, None] = {}
        for tensor in tensors:
            index = self.node(tensor)
            if index is not None:
                found[index] = None
            write = self.writes.get(_torch.storage_key(tensor)) if self.writes else None
            if write is not None and (index is None or write > index):
                found[write] = None
        return tuple(found)

    def parents(self, op: str, taken: Sequence[Tensor]) -> tuple[int, ...]:
        """Find the nodes that an operation takes."""
        if op == "lift_fresh":  # torch.tensor filled memory unseen, where a tensor may have been that was written to
            self.forget_overwritten(taken, ())
        return self.nodes(taken)

    def held_nodes(self) -> set[int]:
        """Return the nodes whose tensors are still there."""
        return {index for reference, index in self.node_of.values() if reference() is not None}

    def forget_overwritten(self, made: Iterable[Tensor], taken: Iterable[Tensor]) -> None:
        """Forget what was once written at the address of new memory."""
        if self.writes:
            old = {_torch.storage_key(t) for t in taken}
            for key in map(_torch.storage_key, made):
                if key not in old:
                    self.writes.pop(key, None)

    def parameter(self, tensor: Tensor) -> str | None:
        """Return the name of the parameter that a tensor is, or is a view or a copy of."""
        entry = self.parameter_of.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def is_made_of_parameters(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter, or computed from parameters."""
        reference = self.made_of_parameters.get(id(tensor))
        return reference is not None and reference() is tensor

    def pass_on_parameters(self, made: Iterable[Tensor], taken: Iterable[Tensor], *, same: bool) -> None:
        """Note what is computed from parameters, and with `same`, that it still is the parameter."""
        parents = [tensor for tensor in taken if self.is_made_of_parameters(tensor)]
        if not parents:
            return
        name = self.parameter(parents[0]) if same else None
        for tensor in made:
            self.made_of_parameters[id(tensor)] = weakref.ref(tensor)
            if name is not None and tensor is not parents[0]:
                self.parameter_of[id(tensor)] = (weakref.ref(tensor), name)
