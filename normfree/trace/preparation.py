"""A model made ready to be measured, and put back as it was."""

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Learnable scalars and vectors that multiply a weight or a branch, by the names in use.
_GAIN = re.compile(r"(^|\.)(skip_?(init_?)?gain|gain)$")
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_TORCH_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@contextlib.contextmanager
def restoring_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own mode back, so that what was frozen stays so."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Hold every module in eval mode."""
    with restoring_modes(model):
        for module in model.modules():
            module.training = False
        yield


@contextlib.contextmanager
def isolated_rng() -> Iterator[None]:
    """Put back the random state of the CPU and of every initialized CUDA device afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        yield


@contextlib.contextmanager
def measuring(model: nn.Module, *, batch_stats: bool) -> Iterator[None]:
    """Hold every module in eval mode; with `batch_stats`, unfrozen BatchNorm normalizes with the batch's statistics.

    Buffers are not touched: a BatchNorm without running statistics uses the batch's. Fused paths that hide operations
    are off. Everything is restored on the way out.
    """
    frozen = {module for module in model.modules() if isinstance(module, _BATCH_NORM) and _is_frozen(module, model)}
    hidden: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for module in model.modules():
            if batch_stats and isinstance(module, _BATCH_NORM) and module not in frozen and not is_quantized(module):
                names = ("running_mean", "running_var")
                hidden.append((module, {name: module._buffers[name] for name in names}))
                module._buffers.update(dict.fromkeys(names))
        with in_eval_mode(model):
            yield
    finally:
        for module, buffers in hidden:
            module._buffers.update(buffers)
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _is_frozen(norm: nn.Module, model: nn.Module) -> bool:
    """Tell whether a norm is in eval mode inside a model that trains, or alone has an affine part that does not."""
    if model.training and not norm.training:
        return True
    own = list(norm.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own) and any(p.requires_grad for p in model.parameters())


def is_quantized(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's quantized layers, or one that is trained to be."""
    return type(module).__module__.startswith("torch.ao.nn.")


def is_normalizer(module: nn.Module) -> bool:
    """Tell whether a module normalizes: torch's own, and what is called a norm and has an eps."""
    return "Norm" in type(module).__name__ and hasattr(module, "eps")


def standardizes_weights(module: nn.Module) -> bool:
    """Tell whether a module standardizes its weights: it says so (`standardize`), or is called "…Std…", as timm's."""
    return bool(getattr(module, "standardize", "Std" in type(module).__name__))


def closed_parameters(model: nn.Module) -> list[str]:
    """Find the parameters that close a branch: gains and normalizers' weights that are all zero."""
    found = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            # Others' may multiply by 1 + weight.
            is_norm_weight = name == "weight" and isinstance(module, _TORCH_NORMS)
            if (is_norm_weight or _GAIN.search(full)) and parameter.numel() and not bool(parameter.any()):
                found.append(full)
    return found


def closed_multipliers(model: nn.Module, names: set[str]) -> list[str]:
    """Find those of the named parameters that hold the branch they multiply closed: the same small number everywhere.

    LayerScale starts at 1e-6 to 0.1 in every channel, SkipInit and ReZero at 0; what training has moved is left alone.
    """
    parameters = dict(model.named_parameters())
    found = []
    for name in sorted(names & parameters.keys()):
        value = parameters[name].detach().flatten()
        limit = 1.0 if value.numel() > 1 else 1e-2
        if value.numel() and bool((value == value[0]).all()) and abs(float(value[0])) < limit:
            found.append(name)
    return found


@contextlib.contextmanager
def opened_branches(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Hold the named parameters at one; their memory is exchanged, not written."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].data for name in names}
    try:
        for name, value in before.items():
            parameters[name].data = torch.ones_like(value)
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value
