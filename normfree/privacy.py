"""Gradients per example for Opacus: differentially private training needs them, and BatchNorm has none."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn.gates import Gate
from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.surgery import Copy, Removed, replace_modules


def per_sample_gradients(model: nn.Module) -> Any:
    """Wrap `model` in Opacus' GradSampleModule: after a backward pass every parameter has a `grad_sample`, (N, …).

    The result is the module to give to `PrivacyEngine.make_private`. Opacus refuses layers that train and have buffers,
    since a normalizer's would leak; the buffers of `ScaledWS…` layers and of gates are constants, and are let through.
    (Set them on noise or public images: a conversion looks at its images without privacy.) What a layer puts out
    cannot be overwritten then: in the model itself, in-place activations are switched to ordinary ones, and every
    `nn.Identity`, as a conversion leaves for a normalizer, becomes a copy.

    Args:
        model: Network without BatchNorm, in training mode.

    Returns:
        Opacus' module.

    Raises:
        ImportError: Without opacus.
        ValueError: By name, for any other layer that trains and has buffers, and for a BatchNorm that normalizes with
            the batch's statistics.
    """
    try:
        from opacus import GradSampleModule
        from opacus.grad_sample import register_grad_sampler
    except ImportError as error:
        raise ImportError(f"per_sample_gradients needs opacus: pip install 'normfree[privacy]' ({error})") from error
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{path} ({type(module).__name__}) normalizes with the batch's statistics: convert it first"
            )
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if trains and not isinstance(module, ScaledWS | Gate) and next(module.buffers(), None) is not None:
            raise ValueError(
                f"{path} ({type(module).__name__}) trains and has buffers: Opacus cannot keep them private"
            )
    replace_modules(model, {module: Copy() for module in model.modules() if type(module) in (nn.Identity, Removed)})
    for module in model.modules():
        if isinstance(module, ScaledWS | Gate):
            register_grad_sampler(type(module))(_sampler)
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010
    return GradSampleModule(model, strict=False)


def _sampler(layer: Any, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Gradients per example, by parameter, from the layer's input and the gradient of its output.

    One example after the other: mapped over the examples, the work on the weights takes many times as long on CPUs.
    """
    parameters = [p for p in layer.parameters(recurse=False) if p.requires_grad]
    layer = _without_hooks(layer)
    found = [p.new_empty(len(backprops), *p.shape) for p in parameters]
    with torch.enable_grad():
        for index, (x, gradient) in enumerate(zip(activations[0].detach(), backprops, strict=True)):
            more = [gradient.shape[1:]] if isinstance(layer, nn.modules.conv._ConvTransposeNd) else []  # output_size
            out = layer(x[None].to(parameters[0].dtype), *more)
            for gradients, one in zip(found, torch.autograd.grad(out, parameters, gradient[None].to(out)), strict=True):
                gradients[index] = one
    return dict(zip(parameters, found, strict=True))


def _without_hooks(module: nn.Module) -> Any:
    """Return a module of the same parameters that nobody watches; the hooks of this one are Opacus' own."""
    bare = copy.copy(module)
    hooks = {name: OrderedDict[int, Any]() for name in vars(module) if name.endswith("_hooks")}
    children = {name: child and _without_hooks(child) for name, child in module._modules.items()}
    vars(bare).update(hooks, _modules=children)
    return bare
