"""Weights that several passes share have the gradients of all."""

import pytest
import torch

from normfree.nn import scaled_layer, shared_weights, weight_pass
from normfree.nn.weight_pass import attach
from tests.helpers import assert_close
from tests.nn.small_networks import images, net


@pytest.mark.parametrize("passes", [1, 3])
def test_shared_weights_are_computed_once_and_have_exact_gradients(passes, monkeypatch):
    model, parts = net(), [images(2) + i for i in range(passes)]
    for part in parts:
        model(part).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    attach(model)
    calls = []
    compute = weight_pass._compute
    monkeypatch.setattr(weight_pass, "_compute", lambda *found: calls.append(len(found[1])) or compute(*found))
    with shared_weights(model):
        for part in parts:
            model(part).square().sum().backward()
        assert model[0].weight.grad is None
    assert sum(calls) == 4
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-12)


def test_shared_weights_refuse_what_would_be_lost():
    model, x = net(), images()
    with shared_weights(model):
        out = model(x)
    with pytest.raises(RuntimeError, match="must end within it"):
        out.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an in-place"):
        _change_inside(model, x)
    assert scaled_layer.in_force.source is None
    with pytest.raises(KeyError), shared_weights(model):
        raise KeyError
    assert scaled_layer.in_force.source is None


def _change_inside(model, x):
    with shared_weights(model):
        model(x).sum().backward()
        with torch.no_grad():
            model[0].weight.mul_(2)
