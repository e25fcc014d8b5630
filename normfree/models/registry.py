"""The paper's networks by name."""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from normfree.arguments import checked
from normfree.errors import suggest
from normfree.models import baseline_resnet, fixup_resnet, nf_resnet, nfnet, regnet
from normfree.models.config import NetworkConfig
from normfree.models.network import ResidualNetwork
from normfree.models.saved_network import read_description

_FAMILIES: tuple[tuple[type[ResidualNetwork], Mapping[str, Any]], ...] = (
    (nf_resnet.NFResNet, nf_resnet.VARIANTS),
    (regnet.NFRegNet, regnet.VARIANTS),
    (nfnet.NFNet, nfnet.VARIANTS),
    (baseline_resnet.ResNet, baseline_resnet.VARIANTS),
    (fixup_resnet.FixUpResNet, fixup_resnet.VARIANTS),
)
_BUILDERS: dict[str, tuple[Callable[[Any], ResidualNetwork], Any]] = {
    name: (network, config) for network, variants in _FAMILIES for name, config in variants.items()
}


@checked
def list_models(pattern: str = "*") -> list[str]:
    """List the names that `create_model` knows, those that match a glob pattern such as "nf_*"."""
    return [name for name in _BUILDERS if fnmatch.fnmatchcase(name, pattern)]


@checked
def create_model(
    name: str, *, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, **overrides: Any
) -> ResidualNetwork:
    """Make a network of the paper with new parameters, in training mode.

    Args:
        name: Name of a variant, such as "nf_resnet50" (`list_models`).
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **overrides: Fields of the variant's configuration (`NFResNetConfig`, `ResNetConfig`, …) that replace its own,
            such as `num_classes=10` or `width=1`.

    Returns:
        The network.

    Raises:
        ValueError: For a name, a field or a value that is not known; says what would be.
    """
    network, config = _builder(name)
    fields = [field.name for field in dataclasses.fields(config)]
    for field in overrides:
        if field not in fields:
            raise ValueError(f"{name} has no argument {field!r}; it has {', '.join(fields)}")
    with _default_dtype(dtype), torch.device(device) if device is not None else contextlib.nullcontext():
        return network(dataclasses.replace(config, **overrides))


def model_config(name: str) -> NetworkConfig:
    """Return the configuration of a variant, without building it. Raises ValueError for a name that is not known."""
    return _builder(name)[1]


def from_pretrained(source: str | Path, **arguments: Any) -> ResidualNetwork:
    """Load a network that `save_pretrained` wrote to a folder or `push_to_hub` to a repository, in eval mode.

    Args:
        source: A folder, or a repository's "user/name".
        **arguments: Arguments of huggingface_hub's `from_pretrained`, such as `revision`, `token` and
            `local_files_only`.

    Returns:
        The network with its parameters.

    Raises:
        FileNotFoundError: For a folder that lacks a file.
        ValueError: For a configuration that is not of a network of this package, and for files that are damaged or not
            what was written.
    """
    described = read_description(source, **arguments)
    families: dict[str, Any] = {network.__name__: network for network, _ in _FAMILIES}
    if described["family"] not in list(families):
        raise ValueError(
            f"{described['path']} is not of a network that save_pretrained wrote: its family is "
            f"{described['family']!r}, not one of {', '.join(families)} (normfree.training.load_run loads runs)"
        )
    return families[described["family"]].from_pretrained(source, **arguments)


def _builder(name: str) -> tuple[Callable[[Any], ResidualNetwork], Any]:
    if name not in _BUILDERS:
        raise ValueError(f"no model is called {name!r}{suggest(name, _BUILDERS)}")
    return _BUILDERS[name]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
