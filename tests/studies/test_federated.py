"""Federated averaging: what is averaged, who has what, and a study of two rounds."""

import copy

import pytest
import torch

from normfree.errors import NotFiniteError
from normfree.studies import federated
from normfree.studies.federated import KINDS, Federation, average, define, federate, split
from normfree.studies.in_memory import accuracies
from normfree.studies.runner import run_cells
from normfree.training.data.datasets import load
from tests.helpers import assert_allclose


def test_states_are_averaged_by_the_sizes_of_the_clients():
    states = [{"w": torch.full((2,), value), "n": torch.tensor(number)} for value, number in ((1.0, 5), (4.0, 7))]
    found = average(states, [1, 3])
    assert_allclose(found["w"], torch.full((2,), 3.25))
    assert found["n"] == 5


def test_every_image_is_one_client_s_and_sorted_clients_have_two_classes_at_most():
    labels = torch.arange(10).repeat(20)
    for clients in ("mixed", "sorted"):
        parts = split(labels, clients, 0)
        assert len(parts) == 10
        assert sorted(torch.cat(parts).tolist()) == list(range(200))
        most = max(len(labels[part].unique()) for part in parts)
        assert most <= 2 if clients == "sorted" else most > 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_whose_clients_do_not_move_stays_as_it_was(kind):
    torch.manual_seed(0)
    images, labels = torch.randn(64, 1, 16, 16), torch.arange(64) % 10
    recipe = Federation(kind, "mixed", 1, 0.0)
    before = federated.make_network(recipe, images)
    after = federate(recipe, images, labels)
    for name, parameter in before.named_parameters():
        assert_allclose(dict(after.named_parameters())[name], parameter, atol=1e-6, what=name)
    moved = any(not torch.allclose(b, dict(before.named_buffers())[n]) for n, b in after.named_buffers() if b.ndim == 1)
    assert moved is (kind == "BatchNorm, statistics averaged too")


def test_balanced_accuracy_is_the_mean_over_the_classes():
    labels = torch.tensor([0, 0, 0, 1])
    said = torch.eye(2)[torch.tensor([0, 0, 0, 0])]
    assert accuracies(lambda _: said, labels, labels) == (75.0, 50.0)


def test_a_training_that_fails_says_so():
    with pytest.raises(NotFiniteError, match="the loss of a client is not finite"):
        federate(Federation("GroupNorm", "mixed", 2, 1e30), torch.randn(64, 1, 16, 16), torch.arange(64) % 10)


def test_two_rounds_fill_the_table(tmp_path):
    work, study = federated.Federations(tmp_path, load("digits")), define(1)
    assert [len(part[1]) for part in (work.training, work.validation, work.testing)] == [1282, 156, 359]
    few = copy.copy(work)
    few.training = tuple(part[:80] for part in work.training)
    found = run_cells(study, tmp_path, few, seeds=1, only=["converted", "sorted"])
    assert [len(entry.tests) for entry in found] == [0, 0, 0, 0, 0, 0, 0, 1]
    assert "| converted | missing | " in (tmp_path / "table.md").read_text()
    (tmp_path / "tests.csv").unlink()
    again = run_cells(study, tmp_path, few, seeds=1, only=["converted", "sorted"])
    assert again == found  # tested by the weights that were kept
