""".safetensors files: tensors with a checksum, each once, written whole or not at all."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from normfree import _torch
from normfree.files.whole import replacing, require_file

_CHECKSUM = "normfree_checksum"


def write_tensors(path: Path, state: Mapping[str, Tensor], described: Mapping[str, str] | None = None) -> None:
    """Write tensors, and texts that describe them. Of those that share memory one is written, as tied weights have.

    Raises WritingError where they cannot be written; the file that was there is then as it was.
    """
    tensors, described = _independent(state), dict(described or {})
    described[_CHECKSUM] = _checksum(tensors, described)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=described)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file, and the texts that describe them.

    Raises ValueError for a file that is cut off, of another format, or not what was written; FileNotFoundError where
    there is none, OSError where it cannot be read.
    """
    path = Path(path)
    require_file(path)
    path.open("rb").close()  # safetensors has no error of its own for a file that may not be read
    try:
        with safe_open(str(path), "pt") as file:
            described = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except Exception as error:  # safetensors' own
        raise ValueError(f"{path} is no .safetensors file, or cut off or damaged: {error}") from error
    written = described.pop(_CHECKSUM, None)
    if written is not None and written != _checksum(tensors, described):
        raise ValueError(f"{path} is not what was written (its checksum is another): take a whole copy")
    if written is None:
        broken = [n for n, t in tensors.items() if t.is_floating_point() and bool(t.isnan().any())]
        if broken:
            raise ValueError(f"{path} has values that are no numbers in {', '.join(broken[:3])}")
    return tensors, described


def load_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set all parameters and buffers of a model, where of those that share memory one is enough.

    Raises ValueError that names what is missing, unexpected or of another shape; the model is then as it was.
    """
    state = model.state_dict()
    first = _first_names(state)
    loaded = {first[name] for name in tensors if name in first}
    missing = [name for name in state if first[name] not in loaded]
    unexpected = [name for name in tensors if name not in state]
    if missing or unexpected:
        here, there = ", ".join(missing) or "nothing", ", ".join(unexpected) or "nothing"
        raise ValueError(f"it lacks {here}, and has {there} besides")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} there and {tuple(state[name].shape)} here")
    model.load_state_dict(tensors, strict=False)


def _checksum(tensors: Mapping[str, Tensor], described: Mapping[str, str]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name, text in sorted(described.items()):
        found.update(f"{name}={len(text)}:{text}\n".encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}:{tensor.dtype}{tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _independent(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, each once, with memory of its own."""
    found, used = {}, set()
    for name, first in _first_names(state).items():
        if name == first:
            tensor = state[name].detach().contiguous()
            storage = tensor.untyped_storage()
            whole = storage.nbytes() == tensor.numel() * tensor.element_size()
            found[name] = tensor if whole and _torch.storage_number(storage) not in used else tensor.clone()
            used.add(_torch.storage_number(storage))
    return found


def _first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name the first one that stands for the same values in the same memory."""
    first: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} of the state is a {type(value).__name__}, which .safetensors files do not hold")
    return {
        name: first.setdefault(
            (_torch.storage_key(t), t.storage_offset(), t.shape, t.stride(), t.dtype) if t.numel() else name, name
        )
        for name, t in state.items()
    }
