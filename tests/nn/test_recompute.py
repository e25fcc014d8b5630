"""Recomputation in the backward pass: the same gradients from less memory."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normfree import create_model
from normfree.benchmarks.measure import kept_bytes
from normfree.benchmarks.peers import PlainResNet, open_and_steady
from normfree.nn import ScaledWSConv2d
from normfree.nn.recompute import recomputing_activation
from tests.helpers import assert_close

NETWORKS = {
    "nf_resnet26": {"width": 0.5, "se_ratio": 0.25},
    "nf_regnet_b0": {"width": 0.25},
    "nfnet_f0": {"width": 0.25, "group_size": 32},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_without_recomputation(name):
    model = create_model(name, num_classes=3, stochastic_depth_rate=0.0, drop_rate=0.0, skip_gain=0.5, **NETWORKS[name])
    model, x = model.double(), torch.randn(2, 3, 50, 64, dtype=torch.float64)
    gradients = []
    for plain in (False, True):
        model.zero_grad()
        if plain:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                out = model(x)
        else:
            out = model(x)
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, 1e-12)


@pytest.mark.slow
def test_no_more_bytes_are_kept_than_the_limit():
    """The bars: 1.02 of plain convolutions; SiLU and GELU networks 0.65 of themselves with separate modules."""
    x = torch.randn(16, 3, 224, 224)
    for layout in (torch.contiguous_format, torch.channels_last):
        model, plain = (
            m.to(memory_format=layout) for m in (open_and_steady(create_model("nf_resnet50")), PlainResNet())
        )
        images = x.contiguous(memory_format=layout)
        ratio = kept_bytes(model, images) / kept_bytes(plain, images)
        assert ratio <= 1.02, f"{ratio:.3f} of plain convolutions, {layout}"
    for name in ("nf_regnet_b1", "nfnet_f0"):
        model = open_and_steady(create_model(name))
        x = torch.randn(8, 3, model.config.train_size, model.config.train_size)
        kept = kept_bytes(model, x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            separate = kept_bytes(model, x)
        print(f"{name} keeps {kept / separate:.3f}")
        assert kept <= 0.65 * separate, f"{name} keeps {kept / separate:.3f}"


def test_a_weight_that_outweighs_the_input_is_kept():
    """A single pixel: no weight is computed twice; many: only the input is kept."""
    conv = ScaledWSConv2d(64, 64, 3, padding=1)
    small, large = torch.randn(1, 64, 1, 1), torch.randn(1, 64, 32, 32)
    kept = kept_bytes(conv, small)
    assert kept >= conv.weight.nbytes, f"{kept} bytes, the weight has {conv.weight.nbytes}"
    kept = kept_bytes(conv, large) - large.nbytes  # its output, and a few numbers per filter
    assert kept < conv.weight.nbytes, f"{kept} bytes, the weight has {conv.weight.nbytes}"


def test_a_changed_source_is_noticed():
    model = create_model("nf_resnet26", width=0.25)
    out = model(torch.randn(2, 3, 32, 32)).sum()
    with torch.no_grad():
        model.stages[0][0].conv[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an in"):
        out.backward()


class Softplus(nn.Softplus):
    def forward(self, input):
        """In float32 under autocast, as on GPUs."""
        return super().forward(input.float() if torch.is_autocast_enabled("cpu") else input)


def test_an_activation_to_which_autocast_gives_another_dtype_has_its_gradient():
    activation, x = Softplus(), torch.randn(2, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        activated = activation(x)
        with recomputing_activation(activated, activation, x):
            out = nn.functional.avg_pool2d(activated, 2)
    out.sum().backward()
    assert_close(x.grad.float(), (x.detach().float().sigmoid() / 4), 1e-2)


def test_other_hooks_checkpoints_and_transforms_go_first():
    model = create_model(
        "nf_regnet_b0", width=0.25, stochastic_depth_rate=0.0, drop_rate=0.0, num_classes=3, skip_gain=0.5
    )
    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    for parameter, value in zip(model.parameters(), expected, strict=True):
        assert_close(parameter.grad, value, 1e-5)
    parameters = dict(model.named_parameters())

    def loss(values):
        return torch.func.functional_call(copy.copy(model), values, (x,)).sum()

    for value, other in zip(torch.func.grad(loss)(parameters).values(), expected, strict=True):
        assert_close(value.detach(), other, 1e-5)
