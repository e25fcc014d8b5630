"""Differentially private training of the study: what a gradient is averaged over, and a table of one epoch."""

import copy

import pytest
import torch
from torch import nn

from normfree.studies import private
from normfree.studies.private import FIXED, Private, PrivateTrainings, define, make_network, shifted
from normfree.studies.runner import run_cells
from normfree.training.data.datasets import load


@pytest.mark.parametrize("kind", [FIXED, "converted"])
def test_networks_have_no_batch_norm_and_gradients_per_example(kind):
    network = make_network(Private(kind, 1, 8.0, 100, 1, 0.5), 16)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    assert any(isinstance(module, nn.GroupNorm) for module in network.modules()) is (kind == FIXED)
    wrapped = private.per_sample_gradients(network)
    wrapped(torch.randn(4, 1, 16, 16).requires_grad_()).square().mean().backward()
    before = {name: p.grad_sample.clone() for name, p in wrapped.named_parameters()}
    private._average(wrapped, 2, 2)
    for name, parameter in wrapped.named_parameters():
        assert torch.equal(parameter.grad_sample, (before[name][0::2] + before[name][1::2]) / 2)


def test_images_are_shifted_each_on_its_own():
    torch.manual_seed(0)
    image = torch.arange(64.0).view(1, 1, 8, 8).expand(50, 1, 8, 8)
    found = {tuple(x.flatten().tolist()) for x in shifted(image)}
    assert 10 < len(found) <= 25
    assert tuple(range(64)) in found


def test_a_table_is_filled_at_the_epsilon_that_it_says(tmp_path, monkeypatch):
    work = PrivateTrainings(tmp_path, load("digits"), 64)
    assert len(work.training[1]) == 64
    few = copy.copy(work)
    few.validation, few.testing = ([part[:40] for part in parts] for parts in (work.validation, work.testing))
    study = define(64, 1)
    assert len({cell.recipe for cell in study.cells}) == 12
    found = run_cells(study, tmp_path, few, seeds=1, only=["converted, 1 view", "8"])
    assert [bool(entry.tests) for entry in found] == [i == 10 for i in range(12)]
    assert "| converted, 1 view | missing | missing | " in (tmp_path / "table.md").read_text()
