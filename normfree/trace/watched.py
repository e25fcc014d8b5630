"""One run of any model, watched, after which the model and its inputs are as they were."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from normfree.errors import SignalError
from normfree.trace.inputs import map_tensors, tensors
from normfree.trace.preparation import measuring
from normfree.trace.recorder import recording
from normfree.trace.tape import Operation, Tape

P = ParamSpec("P")
R = TypeVar("R")
_ONE_AT_A_TIME = threading.RLock()


def run_watched(
    model: nn.Module,
    tape: Tape,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    batch_stats: bool = True,
    reduce_weight_layers: bool = False,
    on_gradient: Callable[[int, Tensor], None] | None = None,
    on_module: Callable[[str, int | None, Tensor], None] | None = None,
    on_value: Callable[[int, Tensor], None] | None = None,
    on_operation: Callable[[Operation], None] | None = None,
) -> list[Tensor]:
    """Run the model on copies of the inputs, in eval mode, recorded on `tape`; return its output's tensors.

    With `batch_stats` unfrozen BatchNorm normalizes with the batch's statistics. With `on_gradient`, which is called
    with nodes of the tape and their gradients, a backward pass follows, of each output times v ~ N(0, 1), summed.

    Raises SignalError, which names the module last reached, when the forward fails, and for outputs without gradient.
    """
    with measuring(model, batch_stats=batch_stats):
        try:
            # A forward may write into its inputs.
            copies: dict[int, Tensor] = {}
            args, kwargs = map_tensors(lambda t: copies.setdefault(id(t), _plain_copy(t)), (args, kwargs))
            if on_gradient is None:
                starts = tensors((args, kwargs))
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # noqa: SIM117, recording innermost
                    with recording(
                        tape,
                        model,
                        starts,
                        reduce_weight_layers=reduce_weight_layers,
                        on_module=on_module,
                        on_value=on_value,
                        on_operation=on_operation,
                    ) as note_outputs:
                        out = model(*args, **kwargs)
                        note_outputs(tensors(out))
                        return tensors(out)
            return _run_backward(model, tape, args, kwargs, list(copies.values()), reduce_weight_layers, on_gradient)
        except SignalError:
            raise
        except Exception as error:
            raise SignalError(_explain(model, tape, error)) from error


def _run_backward(
    model: nn.Module,
    tape: Tape,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    copies: list[Tensor],
    reduce_weight_layers: bool,
    on_gradient: Callable[[int, Tensor], None],
) -> list[Tensor]:
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        leaves = [t.detach_().requires_grad_() for t in copies if t.is_floating_point()]
        # Copies again: a leaf that needs a gradient cannot be written into.
        again = {id(t): t.clone() for t in copies}
        args, kwargs = map_tensors(lambda t: again[id(t)], (args, kwargs))
        starts = tensors((args, kwargs))
        # Of parameters only where no input has a gradient; others would get one from reentrant checkpointing.
        targets = [] if leaves else [p for p in model.parameters() if p.requires_grad]
        with _without_gradients(model if leaves else None):
            with recording(tape, model, starts, reduce_weight_layers=reduce_weight_layers, on_gradient=on_gradient):
                out = model(*args, **kwargs)
            ends = [t for t in tensors(out) if t.is_floating_point() and t.requires_grad]
            if not ends:
                raise SignalError("no output has a gradient: the forward detaches it, or returns no tensors")
            weights = [torch.randn_like(t) for t in ends]
            if leaves:
                torch.autograd.backward(ends, weights)
            else:
                torch.autograd.grad(ends, targets, weights, allow_unused=True)
        return ends


@contextlib.contextmanager
def _without_gradients(model: nn.Module | None) -> Iterator[None]:
    """Let no parameter ask for a gradient."""
    learning = [] if model is None else [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _plain_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor; of a subclass that only has methods of its own, as fastai's, the tensor that it is."""
    if type(tensor) is not Tensor and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        tensor = tensor.as_subclass(Tensor)
    return tensor.clone()


def exclusively(function: Callable[P, R]) -> Callable[P, R]:
    """Let one thread at a time measure: modes, buffers and hooks are changed for the time of a run."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _ONE_AT_A_TIME:
            return function(*args, **kwargs)

    return alone


def _explain(model: nn.Module, tape: Tape, error: Exception) -> str:
    path = tape.last_module
    place = f"{path} ({type(model.get_submodule(path)).__name__})" if path else type(model).__name__
    hint = ""
    if "Expected more than 1 value per channel" in str(error):
        hint = " Give a larger batch or larger images; `characterize` can do without, by batch_stats=False."
    return f"the forward of {type(model).__name__} failed; the last module reached was {place}: {error}{hint}"


def refuse_unrunnable(model: nn.Module) -> None:
    """Raise ValueError for a scripted model, and for parameters that have no values yet."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is scripted or traced: give the eager model that it was made from")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: give the model real parameters first")
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} is not initialized yet: run the model once before it is characterized")
