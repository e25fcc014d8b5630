"""torch's private names: each in this one place, with what happens on a torch that does not have it any more.

Where a slower path exists it is taken, with one warning. A watched run has none: it raises, and names the versions.
Names are looked up when they are used, so that this module can be imported whatever torch has.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normfree.errors import SignalError

_KNOWN = "2.13 to 2.15"
"""The versions of torch that have every name below."""

try:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
except ImportError:

    class TorchDispatchMode:  # type: ignore[no-redef]
        """Stand-in that cannot be made."""

        def __init__(self) -> None:
            raise SignalError(
                "watching a run needs torch.utils._python_dispatch.TorchDispatchMode, which torch "
                f"{torch.__version__} does not have; torch {_KNOWN} has it"
            )


# Not exported by torch.jit for type checkers; TorchScript knows the first by its identity.
is_scripting: Callable[[], bool] = torch.jit.is_scripting  # type: ignore[attr-defined]
is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]
Function = TypeVar("Function", bound=Callable[..., Any])


def script_if_tracing(function: Function) -> Function:
    """Compile a function by TorchScript where a trace reaches it, so that it holds for other sizes too."""
    compiled: Function = torch.jit.script_if_tracing(function)
    return compiled


@functools.cache
def _warn(name: str, consequence: str) -> None:
    warnings.warn(
        f"torch {torch.__version__} has no {name}, which torch {_KNOWN} has: {consequence}", UserWarning, stacklevel=3
    )


def functorch_is_active() -> bool:
    """Tell whether a transform of `torch.func` is running. Without torch's name: always, by the slower path."""
    try:
        return bool(torch._C._are_functorch_transforms_active())
    except AttributeError:
        _warn("torch._C._are_functorch_transforms_active", "weights are standardized and kept the slower way")
        return True


def only_eager() -> bool:
    """Tell whether operations just run, perhaps observed: not compiled, traced, derived forward or transformed.

    Without torch's names: never.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        return not (
            torch._C._are_functorch_transforms_active()
            or torch._C._get_tracing_state()
            or torch.autograd.forward_ad._current_level >= 0
            or (torch._C._len_torch_dispatch_stack() and not only_observed())
        )
    except AttributeError:
        _warn("torch._C._are_functorch_transforms_active", "weights are standardized and kept the slower way")
        return False


def nobody_sees_operations() -> bool:
    """Tell whether operations just run, and no dispatch mode sees them. Without torch's names: never."""
    try:
        return only_eager() and not torch._C._len_torch_dispatch_stack()
    except AttributeError:
        _warn("torch._C._len_torch_dispatch_stack", "convolutions are computed the slower way")
        return False


def nobody_watches() -> bool:
    """Tell whether no dispatch mode sees operations, and no hook what is saved. Without torch's names: never."""
    try:
        return (
            not torch._C._len_torch_dispatch_stack()
            and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        )
    except AttributeError:
        _warn("torch._C._autograd._top_saved_tensors_default_hooks", "weights are computed layer by layer")
        return False


def shards() -> bool:
    """Tell whether some module is sharded by FSDP, which frees weights and takes gradients when it sees fit.

    Without torch's name: wherever processes work together.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError:
        _warn("torch.distributed._composable_state._module_state_mapping", "weights are computed layer by layer")
        return torch.distributed.is_initialized()
    return bool(_module_state_mapping)


def only_observed() -> bool:
    """Tell whether active dispatch modes, if any, only look at operations. Without torch's name: never."""
    try:
        from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    except ImportError:
        _warn("torch.utils._python_dispatch._get_current_dispatch_mode_stack", "GPUs do without the fused kernels")
        return False
    return not any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


def saved_tensors_hooks() -> tuple[bool, tuple[Callable[..., Any], Callable[..., Any]] | None]:
    """Return whether hooks on saved tensors are allowed, and the pair in force. Without torch's names: no."""
    try:
        enabled: Any = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
        top: Any = torch._C._autograd._top_saved_tensors_default_hooks
    except AttributeError:
        _warn("torch._C._autograd._top_saved_tensors_default_hooks", "tensors are kept rather than computed again")
        return False, None
    return bool(enabled()), top(True)


def has_global_hook() -> bool:
    """Tell whether some hook sees every module. Without torch's name: yes, so that outputs are copied."""
    try:
        return bool(nn.modules.module._has_any_global_hook())
    except AttributeError:
        _warn("torch.nn.modules.module._has_any_global_hook", "residual blocks copy what they could overwrite")
        return True


def storage_key(tensor: Tensor) -> int:
    """Return a number that tensors share exactly if they share memory. Without torch's name: the memory's address."""
    if tensor.layout != torch.strided:
        return id(tensor)
    return storage_number(tensor.untyped_storage())


def storage_number(storage: torch.UntypedStorage) -> int:
    """Return a number of a storage that no other living one has. Without torch's name: the memory's address."""
    try:
        return int(storage._cdata)
    except AttributeError:
        _warn("torch.UntypedStorage._cdata", "storages are told apart by their address")
        return storage.data_ptr()


def leaves(value: Any) -> list[Any]:
    """Return the leaves of nested containers. Without torch's name: of lists, tuples and dictionaries only."""
    try:
        from torch.utils._pytree import tree_leaves
    except ImportError:
        _warn("torch.utils._pytree.tree_leaves", "only lists, tuples and dictionaries are looked into")
        found: list[Any] = []
        _map_plain(found.append, value)
        return found
    return tree_leaves(value)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Return the same nesting with `function` of every leaf. Without torch's name: of lists, tuples, dictionaries."""
    try:
        from torch.utils._pytree import tree_map
    except ImportError:
        _warn("torch.utils._pytree.tree_map", "only lists, tuples and dictionaries are looked into")
        return _map_plain(function, value)
    return tree_map(function, value)


def _map_plain(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map_plain(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map_plain(function, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_map_plain(function, item) for item in value)
    return function(value)
