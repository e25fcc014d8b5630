"""Sharding: parameters and gradients that are spread over the processes (FSDP)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def configure_fsdp(plugin: Any) -> None:
    """Set accelerate's FSDP up as this training needs it. Raises ValueError where it cannot."""
    if plugin.activation_checkpointing:
        raise ValueError(
            "accelerate's FSDP is told to checkpoint activations, but it draws other numbers for stochastic depth when "
            "it computes them again: launch without --fsdp_activation_checkpointing"
        )
    # Checkpoints are whole: sharded ones are read with pickle, and by as many processes only.
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")
    # Autocast, as without sharding: weights are standardized before they are rounded.
    plugin.mixed_precision_policy = None
    # All processes build the network.
    plugin.cpu_ram_efficient_loading = False


def is_sharded(model: nn.Module) -> bool:
    """Tell whether each process holds but a part of the parameters; during a step it may hold them all."""
    return isinstance(model, FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor as it is on one process alone; of a sharded one all processes must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_finite(tensor: Tensor) -> bool:
    """Tell whether all of it is finite; of a sharded one all processes must ask for it together."""
    return bool(full_tensor(torch.isfinite(tensor).all()))


def load_full_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a full state, of which each process has all, into the model, sharded or not.

    Raises ValueError for the state of another model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if other := state.keys() ^ model.state_dict().keys():
        raise ValueError(f"one of the two has no {min(other)}")
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
