"""The paper's networks by name."""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from normfree.errors import suggest
from normfree.models import nf_regnet, nf_resnet, nfnet, resnet

_FAMILIES: tuple[tuple[Callable[[Any], nn.Module], Mapping[str, Any]], ...] = (
    (nf_resnet.NFResNet, nf_resnet.VARIANTS),
    (nf_regnet.NFRegNet, nf_regnet.VARIANTS),
    (nfnet.NFNet, nfnet.VARIANTS),
    (resnet.ResNet, resnet.VARIANTS),
)
_BUILDERS: dict[str, tuple[Callable[[Any], nn.Module], Any]] = {
    name: (network, config) for network, variants in _FAMILIES for name, config in variants.items()
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows, those that match a glob pattern such as "nf_*"."""
    return [name for name in _BUILDERS if fnmatch.fnmatchcase(name, pattern)]


def create_model(
    name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **overrides: Any
) -> nn.Module:
    """A network of the paper with new parameters, in training mode.

    `overrides` replace fields of the variant's configuration (`NFResNetConfig`, `ResNetConfig`), such as
    `num_classes=10` or `width=1`.

    Raises ValueError for a name, a field or a value that is not known, and says what would be.
    """
    if name not in _BUILDERS:
        raise ValueError(f"no model is called {name!r}{suggest(name, _BUILDERS)}")
    network, config = _BUILDERS[name]
    fields = [field.name for field in dataclasses.fields(config)]
    for field in overrides:
        if field not in fields:
            raise ValueError(f"{name} has no argument {field!r}; it has {', '.join(fields)}")
    with _default_dtype(dtype), torch.device(device) if device is not None else contextlib.nullcontext():
        return network(dataclasses.replace(config, **overrides))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
