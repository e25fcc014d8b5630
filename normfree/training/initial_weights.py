"""Weights that a training begins with: of another run, or of a file that somebody trained on other classes."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfree.errors import TrainingError
from normfree.files.tensors import load_state, read_tensors
from normfree.files.whole import require_file
from normfree.training.build import classifiers

_NESTED = ("state_dict", "model_state_dict", "model")
_COUNTER = "num_batches_tracked"  # which files of before 2019 lack, and frozen normalizers do not have


def load_initial(model: nn.Module, path: str | Path) -> None:
    """Set the parameters and buffers of a model from a .safetensors file, or a file that torch.save wrote.

    A classifier for another number of classes stays new. Where the file has other names, its tensors are taken in their
    order, if all of them are called weight, bias, running_mean and so on, and shaped, as the model's in their order; a
    warning says so. Nothing that a file holds is run.

    Raises FileNotFoundError where there is none, TrainingError for one that is damaged or does not fit.
    """
    path = Path(path)
    tensors = _read(path)
    state = model.state_dict()
    counters = {name: tensor for name, tensor in state.items() if name.endswith(_COUNTER)}
    if _without_counters(tensors) != _without_counters(state):
        tensors = _in_order(tensors, state, path)
    tensors = {**counters, **{n: tensor for n, tensor in tensors.items() if n in state or not n.endswith(_COUNTER)}}
    new = {name: state[name] for name in _classifier_names(model) if _of_other_classes(tensors.get(name), state[name])}
    try:
        load_state(model, tensors | new)
    except ValueError as error:
        raise TrainingError(f"{path} does not fit {type(model).__name__}: {error}") from error


def _without_counters(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.endswith(_COUNTER)}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)[0]
        require_file(path)
        tensors = _unwrapped(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception as error:  # what a damaged pickle raises is not documented
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TrainingError(f"{path} holds no weights that can be read: {reason}") from error
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and bool(tensor.isnan().any())]
    if broken:
        raise TrainingError(f"{path} has values that are no numbers in {', '.join(broken[:3])}")
    return tensors


def _unwrapped(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, without the prefix of a network that processes shared."""
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"it holds a {type(content).__name__}, not the names and tensors of a state_dict")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{name!r} of it is a {type(tensor).__name__}: give a state_dict")
    shared = all(name.startswith("module.") for name in content)
    return {name.removeprefix("module.") if shared else name: tensor for name, tensor in content.items()}


def _in_order(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Give the file's tensors the model's names, one after the other; as they are where that cannot be."""
    theirs = [(name, tensor) for name, tensor in tensors.items() if not name.endswith(_COUNTER)]
    mine = [(name, tensor) for name, tensor in state.items() if not name.endswith(_COUNTER)]
    alike = len(theirs) == len(mine) and all(
        there.rpartition(".")[2] == here.rpartition(".")[2] and tensor.shape[1:] == value.shape[1:]
        for (there, tensor), (here, value) in zip(theirs, mine, strict=True)
    )
    if not alike or path.suffix == ".safetensors":  # which is in the order of the names
        return dict(tensors)
    warnings.warn(
        f"{path} has other names, and is taken in its order: {theirs[0][0]} as {mine[0][0]}, …, {theirs[-1][0]} as "
        f"{mine[-1][0]}",
        stacklevel=3,
    )
    return {here: tensor for (_, tensor), (here, _) in zip(theirs, mine, strict=True)}


def _classifier_names(model: nn.Module) -> set[str]:
    """Find the names of the parameters of what gives the logits."""
    held = {id(parameter) for head in classifiers(model) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in held}


def _of_other_classes(there: Tensor | None, here: Tensor) -> bool:
    if there is None or there.ndim != here.ndim:
        return False
    return there.shape[:1] != here.shape[:1] and there.shape[1:] == here.shape[1:]
