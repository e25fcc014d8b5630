"""Ends of branches: closed ones are opened, scaled ones divided by their scale."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree import characterize, create_model
from tests.helpers import X, residual_network


def test_closed_branches_are_opened_and_named():
    model = residual_network(gain=0.0)
    with torch.no_grad():
        model[3].norm.weight.zero_()
    report = characterize(model, X)
    assert set(report.opened) == {"1.gain", "3.gain", "3.norm.weight"}
    assert report[0].variance > report[0].residual_variance > 0


def test_left_closed_the_residual_variance_comes_from_an_opened_run():
    model = residual_network(gain=0.0)
    opened, closed = characterize(model, X), characterize(model, X, open_branches=False)
    assert closed.opened == ()
    assert closed[0].residual_variance == pytest.approx(opened[0].residual_variance, rel=1e-5)
    with torch.no_grad():
        stem = model[0](X).var((0, 2, 3), correction=0).mean().item()
    assert closed[0].variance == pytest.approx(stem, rel=1e-5)


def test_layer_scale_is_found_by_what_it_does():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.whatever = nn.Parameter(torch.full((3,), 1e-5))

        def forward(self, x):
            return x + self.conv(x) * self.whatever[:, None, None]

    model = Scaled()
    report = characterize(model, X)
    assert report.opened == ("whatever",)
    with torch.no_grad():
        expected = model.conv(X).var((0, 2, 3), correction=0).mean().item()
    assert report[0].residual_variance == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        model.whatever.copy_(torch.tensor([0.1, 0.2, 0.3]))  # training has moved it
    assert characterize(model, X).opened == ()


def test_gains_that_training_has_moved_stay():
    model = residual_network(gain=-0.3)
    assert characterize(model, X).opened == ()


def test_opened_parameters_that_share_memory_come_back():
    model = residual_network(gain=0.0)
    shared = torch.zeros(1)
    model[1].gain.data = shared.expand(3)[0]
    assert set(characterize(model, X).opened) == {"1.gain", "3.gain"}
    assert model[1].gain.item() == 0
    assert shared.item() == 0


def test_a_scale_that_the_block_applies_itself_is_counted_once():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.register_buffer("out_scale", torch.tensor(0.2))

        def forward(self, x):
            return x + self.out_scale * F.relu(self.conv(x))

    model = Scaled()
    with torch.no_grad():
        expected = F.relu(model.conv(X)).var((0, 2, 3), correction=0).mean().item()
    assert characterize(model, X)[0].residual_variance == pytest.approx(expected, rel=1e-4)


def test_norms_that_multiply_by_one_plus_weight_are_left_alone():
    class PlusOneRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 1e-6
            self.weight = nn.Parameter(torch.zeros(16))

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    model = nn.Sequential(PlusOneRMSNorm(), nn.Linear(16, 16))
    assert characterize(model, torch.randn(4, 5, 16)).opened == ()


def test_our_branches_are_divided_by_the_scales_they_declare():
    for se_ratio in (0.0, 0.25):
        torch.manual_seed(0)
        model = create_model("nf_resnet26", width=1, se_ratio=se_ratio, skip_gain=0.5)
        block, x = model.stages[0][1], torch.randn(4, 64, 16, 16)
        record = characterize(block, x)[0]
        with torch.no_grad():
            branch = (block.eval()(x) - x) / (0.2 * 0.5)
        assert record.residual_variance == pytest.approx(branch.var((0, 2, 3), correction=0).mean().item(), rel=1e-4)
        assert record.expected_variance == pytest.approx(1.08)


def test_zero_convolutions_cannot_be_opened():
    model = residual_network()
    with torch.no_grad():
        model[3].conv.weight.zero_()
        model[3].conv.bias.zero_()
    report = characterize(model, X)
    assert report.closed == ["3"]
    assert any("cannot be opened" in verdict for verdict in report.verdicts)
