"""Small networks of our layers, and what a pass through them gives."""

import torch
from torch import nn

from normfree import ScaledWSConv2d
from normfree.nn import (
    ScaledWSLinear,
    scaled_layer,
)
from normfree.nn.weight_pass import attach
from tests.helpers import assert_close, assert_equal

F64 = torch.float64


def net(seed=0):
    torch.manual_seed(seed)
    layers = [
        ScaledWSConv2d(3, 6, 3, padding=1, in_scale=1.3), nn.ReLU(),
        ScaledWSConv2d(6, 6, 3, padding="same", stride=2, skip_gain=0.4, out_scale=0.7), nn.ReLU(),
        ScaledWSConv2d(6, 6, 3, padding=1, bias=False), nn.Flatten(), ScaledWSLinear(96, 5, out_scale=0.5),
    ]  # fmt: skip
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for layer in scaled(model):
            layer.gain.normal_(1, 0.3)
            if layer.bias is not None:
                layer.bias.normal_()
    return model


def scaled(model):
    return [module for module in model.modules() if isinstance(module, scaled_layer.ScaledWS)]


def images(count=2, size=8, dtype=F64):
    return torch.randn(count, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def outcome(model, x, *, passes=3):
    """The output and all gradients of the last of several passes; the order of layers is learned in the first."""
    for _ in range(passes):
        model.zero_grad()
        out = model(x)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours, theirs, tolerance=0.0):
    assert ours[1].keys() == theirs[1].keys()
    pairs = {"output": (ours[0], theirs[0])} | {name: (grad, theirs[1][name]) for name, grad in ours[1].items()}
    for name, (one, other) in pairs.items():
        assert (one is None) == (other is None), name
        if one is not None and tolerance:
            assert_close(one, other, tolerance, name)
        elif one is not None:
            assert_equal(one, other, name)


def attached(model):
    attach(model)
    return model


def hooked(model):
    return next(iter(model._forward_pre_hooks.values())).__self__


class ChannelsLast(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)
