"""The file of a conversion: the tensors, and the plan by which another network of the class is converted again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from normfree import _torch
from normfree.conversion.plan import Plan
from normfree.conversion.replacement import apply_plan

_PLAN = "normfree_plan"


def save(model: nn.Module, plan: Plan, path: Path) -> Path:
    """Write the file. Raises ValueError for another suffix than .safetensors, OSError where it cannot be written."""
    if path.suffix != ".safetensors":
        raise ValueError(f"cannot write {path}: the suffix must be .safetensors")
    try:
        save_file(_tensors_of(model), str(path), metadata={_PLAN: plan.to_json()})
    except Exception as error:  # safetensors has an error of its own
        raise OSError(f"cannot write {path}: {error}") from error
    return path


def load_converted(model: nn.Module, path: str | Path) -> nn.Module:
    """Convert `model` again as `Conversion.save` wrote it; in place.

    Args:
        model: Fresh network of the class that was converted.
        path: File that `Conversion.save` has written.

    Returns:
        The model, with the saved tensors.

    Raises:
        ValueError: For a file that is no conversion, or of another network.
        FileNotFoundError: Where there is no file.
    """
    try:
        with safe_open(str(path), "pt") as file:
            plan = Plan.from_json((file.metadata() or {}).get(_PLAN, ""))
            held = set(file.keys())
            for name, parameter in model.named_parameters():
                here = tuple(parameter.shape)
                if name in held and (there := tuple(file.get_slice(name).get_shape())) != here:
                    raise ValueError(f"{name} is {there} there and {here} here")
        apply_plan(plan, model)
        _load(model, load_file(str(path)))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no conversion of a {type(model).__name__} ({error})") from error
    return model


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors, each once, with memory of its own."""
    state, found, used = model.state_dict(), {}, set()
    for name, first in _first_names(state).items():
        if name == first:
            tensor = state[name].contiguous()
            storage = tensor.untyped_storage()
            whole = storage.nbytes() == tensor.numel() * tensor.element_size()
            found[name] = tensor if whole and _torch.storage_number(storage) not in used else tensor.clone()
            used.add(_torch.storage_number(storage))
    return found


def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    first = _first_names(model.state_dict())
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    loaded = {first[name] for name in tensors if name in first}
    missing = [name for name in missing if first[name] not in loaded]
    if missing or unexpected:
        here, there = ", ".join(missing) or "nothing", ", ".join(unexpected) or "nothing"
        raise ValueError(f"it lacks {here}, and has {there} besides")


def _first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name the first one that stands for the same values in the same memory, as tied weights have."""
    first: dict[Any, str] = {}
    return {
        name: first.setdefault(
            (_torch.storage_key(t), t.storage_offset(), t.shape, t.stride(), t.dtype) if t.numel() else name, name
        )
        for name, t in state.items()
    }
