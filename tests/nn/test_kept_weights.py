"""Weights that inference keeps are those of the parameters as they are."""

import copy

import pytest
import torch

from normfree.nn import kept_weights, weight_pass
from normfree.nn.weight_pass import detach
from tests.helpers import assert_close
from tests.nn.small_networks import F64, attached, hooked, images, net


@pytest.mark.parametrize("write", ["data", "no_grad", "swap", "gain", "scale"])
def test_inference_keeps_weights_until_something_changes(write, monkeypatch):
    monkeypatch.setattr(kept_weights, "_KEPT", 1)
    model, x = attached(net()).eval(), images()
    calls = []
    compute = weight_pass._compute
    monkeypatch.setattr(weight_pass, "_compute", lambda *found: calls.append(len(found[1])) or compute(*found))
    with torch.no_grad():
        for _ in range(3):
            model(x)
        assert calls == [4]
        layer = model[2]
        if write == "data":
            layer.weight.data[1, 2] *= 1.5
        elif write == "no_grad":
            layer.weight[0, 0].add_(1)
        elif write == "swap":  # of two filters
            layer.weight.data.copy_(layer.weight.data.flip(0))
        elif write == "gain":
            layer.gain.data.mul_(2)
        else:
            layer.out_scale.data.fill_(3)
        plain = copy.deepcopy(model)
        detach(plain)
        assert_close(model(x), plain(x), 0)
        assert calls == [4, 1]
    model.train()
    model(x)
    assert not hooked(model).keep.kept


def test_networks_made_or_moved_in_inference_mode_run():
    x = images()
    with torch.inference_mode():
        made = attached(net()).eval()
        expected = made(x)
        assert torch.equal(made(x), expected)
    moved = attached(net().float()).eval()
    with torch.inference_mode():
        moved.double()
        for _ in range(2):
            assert_close(moved(x), moved.to(F64)(x), 0)
