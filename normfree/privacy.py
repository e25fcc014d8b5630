"""Gradients per example for Opacus, which differentially private training needs and BatchNorm does not have."""

from typing import Any

import torch
from torch import Tensor, nn

from normfree.convert.layers import Copy, put
from normfree.nn.scaled import ScaledWS


def per_sample_gradients(model: nn.Module) -> Any:
    """`model` in Opacus' GradSampleModule: after a backward pass every parameter has a `grad_sample`, (N, …).

    What `PrivacyEngine.make_private` is to be given as its module. Opacus refuses layers that train and have buffers,
    since a normalizer's would leak; the buffers of `ScaledWS…` layers are constants, and are let through. What a layer
    puts out cannot be overwritten then: in-place activations of the model no longer are, and an `nn.Identity`, as a
    conversion leaves for a normalizer, copies.

    Raises ImportError without opacus, and ValueError for any other such layer, by name.
    """
    try:
        from opacus import GradSampleModule
        from opacus.grad_sample import register_grad_sampler
    except ImportError as error:
        raise ImportError(f"per_sample_gradients needs opacus: pip install 'normfree[privacy]' ({error})") from error
    for path, module in list(model.named_modules()):
        if getattr(module, "inplace", False) is True:
            module.inplace = False
        if type(module) is nn.Identity:
            put(model, module, Copy())
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, ScaledWS):
            register_grad_sampler(type(module))(_sampler)
        elif trains and next(module.buffers(), None) is not None:
            raise ValueError(
                f"{path} ({type(module).__name__}) trains and has buffers: Opacus cannot keep them private"
            )
    return GradSampleModule(model, strict=False)


def _sampler(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Gradients per example, by parameter, from the layer's input and the gradient of its output.

    One example after the other: mapped over the examples, the work on the weights takes many times as long on CPUs.
    """
    parameters = [p for p in layer.parameters() if p.requires_grad]
    found = [p.new_empty(len(backprops), *p.shape) for p in parameters]
    with torch.enable_grad():
        for index, (x, gradient) in enumerate(zip(activations[0].detach(), backprops, strict=True)):
            out = layer.forward(x[None])  # past the hooks, which are Opacus' own
            for gradients, one in zip(found, torch.autograd.grad(out, parameters, gradient[None]), strict=True):
                gradients[index] = one
    return dict(zip(parameters, found, strict=True))
