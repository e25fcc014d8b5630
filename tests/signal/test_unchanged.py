"""Models come back as they were, whatever happens."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from normfree import SignalError, characterize
from tests.helpers import X, assert_equal, residual_network


def snapshot(model):
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "global hooks": (len(module_hooks._global_forward_hooks), len(module_hooks._global_forward_pre_hooks)),
        "buffers": [name for name, _ in model.named_buffers()],
        "rng": torch.get_rng_state(),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_unchanged(before, model):
    for key, value in snapshot(model).items():
        after, earlier = (each if isinstance(each, dict) else {"": each} for each in (value, before[key]))
        assert after.keys() == earlier.keys(), f"{key} has changed"
        for name, found in after.items():
            if isinstance(found, torch.Tensor) and isinstance(earlier[name], torch.Tensor):
                assert_equal(found, earlier[name], f"{key}: {name}")
            else:
                assert found == earlier[name], f"{key}: {name} has changed"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("batch_stats", [False, True])
def test_the_model_comes_back_as_it_was(backward, batch_stats):
    model = residual_network(gain=0.0)
    model[1].norm.eval()
    model[1].norm.weight.requires_grad_(False)
    model[0](X).sum().backward()  # the first convolution alone has gradients
    x = X.clone()
    before = snapshot(model)
    characterize(model, x, backward=backward, batch_stats=batch_stats)
    assert_unchanged(before, model)
    assert_equal(x, X, "the input")
    assert not x.requires_grad


def test_the_model_comes_back_when_its_forward_raises():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("boom")

    model = nn.Sequential(*residual_network(gain=0.0), nn.Sequential(Failing()))
    before = snapshot(model)
    with pytest.raises(SignalError, match=r"last module reached was 4\.0 \(Failing\): boom"):
        characterize(model, X)
    assert_unchanged(before, model)


def test_the_model_comes_back_when_it_is_interrupted():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(*residual_network(gain=0.0), Interrupted())
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        characterize(model, X)
    assert_unchanged(before, model)


def test_inputs_that_a_model_overwrites_come_back():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x.sub_(1)
            return x + self.conv(x)

    x = X.clone()
    for backward in (False, True):
        characterize(Overwrites(), x, backward=backward)
        assert_equal(x, X, "the input")


def test_memory_does_not_grow_with_depth():
    """A run keeps no activation: the tape holds numbers."""
    import weakref

    alive = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            out = x + self.conv(x)
            alive.append(weakref.ref(out))
            counts.append(sum(reference() is not None for reference in alive))
            return out

    counts = []
    characterize(nn.Sequential(nn.Conv2d(3, 8, 1), *(Watched() for _ in range(10))), X)
    assert max(counts) <= 2, f"{max(counts)} activations were alive at once"
