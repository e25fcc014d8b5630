"""Updates of parameters: how far an optimizer's step moves each of them, and the gradient that it takes."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class UpdateReader:
    """Reader of a model's parameters around the steps of its optimizers; between those asked for it holds nothing.

    Of sharded parameters it reads the shards of this process.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Any], statistics: Collection[str], wanted: Callable[[str], bool]
    ) -> None:
        self.model = model
        self.optimizers = [_innermost(optimizer) for optimizer in optimizers]
        self.wanted = wanted
        strangers = [o for o in self.optimizers if not self._parameters_of(o, lambda name: True)]
        if strangers:
            raise ValueError(f"the optimizer ({type(strangers[0]).__name__}) holds no parameter of this model")
        self.reads_updates = "update_ratio" in statistics
        self.reads_gradients = "gradient_rms" in statistics
        self.due = False  # whether the next step of each optimizer is read
        self._stepped: set[int] = set()
        self._before: dict[str, Tensor] = {}
        self._found: dict[str, dict[str, Tensor]] = {}

    def attach(self, hooks: contextlib.ExitStack) -> None:
        """Watch the optimizers until the stack is closed."""
        for optimizer in self.optimizers:
            hooks.callback(optimizer.register_step_pre_hook(self._before_step).remove)
            hooks.callback(optimizer.register_step_post_hook(self._after_step).remove)

    def begin(self) -> None:
        """Read the next step."""
        self.due = True
        self._stepped.clear()
        self._before.clear()

    @property
    def is_read(self) -> bool:
        """True when every optimizer has taken the step."""
        return len(self._stepped) == len(self.optimizers)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per parameter that was stepped, in the model's order, and forget them."""
        self.due = False
        found, self._found = self._found, {}
        order = [name for name, _ in self.model.named_parameters()]
        return [
            {"kind": "parameter", "depth": depth, "name": name, "shape": _shape(self.model, name)}
            | {statistic: float(value) for statistic, value in found[name].items()}
            for depth, name in enumerate(order)
            if name in found
        ]

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if not self.due or id(optimizer) in self._stepped:
            return
        for name, parameter in self._parameters_of(optimizer, self.wanted):
            if self.reads_gradients and parameter.grad is not None:
                self._found.setdefault(name, {})["gradient_rms"] = _rms(parameter.grad)
            if self.reads_updates:
                self._before[name] = _local(parameter).clone()

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if not self.due or id(optimizer) in self._stepped:
            return
        self._stepped.add(id(optimizer))
        for name, parameter in self._parameters_of(optimizer, self.wanted) if self.reads_updates else ():
            before = self._before.pop(name, None)
            if before is None:
                continue  # a forward pass within the step, as of L-BFGS, has begun the measurement
            size = _rms(before)
            moved = _rms(_local(parameter) - before)
            # What starts at zero, as biases do, has no size that its step could be compared with.
            if bool(size > 0):
                self._found.setdefault(name, {})["update_ratio"] = moved / size

    def _parameters_of(self, optimizer: Any, wanted: Callable[[str], bool]) -> list[tuple[str, nn.Parameter]]:
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if id(parameter) in known and parameter.numel() and wanted(name)
        ]


def _innermost(optimizer: Any) -> Any:
    """Return the optimizer that takes the steps, of one that wraps another, as accelerate's."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; give a torch.optim.Optimizer")
        optimizer = inner
    return optimizer


def _local(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "to_local", None)
    return (tensor if local is None else local()).detach()


def _rms(tensor: Tensor) -> Tensor:
    x = _local(tensor)
    x = x.coalesce().values() if x.is_sparse else x
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else None
    return torch.linalg.vector_norm(x, dtype=dtype) / max(x.numel(), 1) ** 0.5


def _shape(model: nn.Module, name: str) -> str:
    return "x".join(map(str, model.get_parameter(name).shape))
