"""Parameter groups: the one rule of which parameters decay, for anybody's optimizer and for the trainer."""

import fnmatch
from typing import Any

from torch import nn

from normfree.arguments import checked


@checked
def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Make parameter groups for an optimizer: gains, biases, skip gains and normalizers do not decay.

    A parameter decays if it has two axes at least, is called neither bias nor gain (timm's gains have four axes), and
    the model's own `no_weight_decay()`, as timm's have it, does not list its name or a pattern of it.

    Args:
        model: Network whose parameters are to be trained; frozen ones are left out.
        weight_decay: Weight decay of those that decay.

    Returns:
        Groups for `torch.optim`, those that decay first; a group without parameters is left out.

    Raises:
        ValueError: For a negative weight decay.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay}; it must not be negative")
    listed: set[str] = getattr(model, "no_weight_decay", set)()
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if _decays(name, parameter, listed) else exempt).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: nn.Parameter, listed: set[str]) -> bool:
    if parameter.ndim <= 1 or name.rpartition(".")[2] in ("bias", "gain"):
        return False
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in listed)
