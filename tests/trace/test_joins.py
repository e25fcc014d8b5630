"""Joins that are found, in networks small enough to see, and in other people's.

The names in joins.json come from reading the networks' forward methods, not from the tool.
"""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from normfree import characterize
from tests.helpers import reference_json

JOINS = reference_json("joins.json")


def build(name):
    source, _, model = name.partition(":")
    if source == "timm":
        return timm.create_model(model)
    if model == "fasterrcnn_resnet50_fpn":  # the names in joins.json are those of its backbone
        return torchvision.models.get_model(model, weights=None, weights_backbone=None).backbone
    extra = {"weights_backbone": None} if model == "deeplabv3_resnet50" else {}
    extra |= {"init_weights": False} if model == "googlenet" else {}
    return torchvision.models.get_model(model, weights=None, **extra)


@pytest.mark.parametrize("name", JOINS)
def test_the_joins_of_other_people_s_networks_are_those_of_their_forward(name):
    model = build(name)
    shape = (2, 3, 4, 64, 64) if "r3d" in name else (2, 3, 96, 96) if "fasterrcnn" in name else None
    report = characterize(model, None if shape is None else torch.randn(shape))
    assert (report.kind == "join") == bool(JOINS[name])
    found = [record.name for record in report] if report.kind == "join" else []
    expected = [type(model).__name__ + path if path[:1] in ("", "#") else path for path in JOINS[name]]  # "": the root
    assert found == expected, f"{len(found)} joins ({found}), expected {len(expected)}"


class Branch(nn.Module):
    """x + f(x) in the form that a test asks for."""

    def __init__(self, join, channels=6):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.other = nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.full((), 0.25))
        self.head = nn.Linear(channels, 2)
        self.join = join

    def forward(self, x):
        return self.head(self.join(self, self.stem(x)).mean((2, 3)))


def inplace(m, x):
    out = m.conv(F.relu(x))
    out += x
    return out.relu_()


def through_views(m, x):
    """The branch is written into a slice of an empty tensor."""
    out = x.new_empty(x.shape)
    out[:, :] = m.conv(x)
    return out + x


def permuted(m, x):
    branch = m.conv(x).permute(0, 2, 3, 1)
    return (x.permute(0, 2, 3, 1) + branch).permute(0, 3, 1, 2)


FORMS = {
    "add": (lambda m, x: x + m.conv(x), 1, "identity"),
    "add in place": (inplace, 1, "identity"),
    "add with alpha": (lambda m, x: torch.add(x, m.conv(x), alpha=0.5), 1, "identity"),
    "sub": (lambda m, x: x - m.conv(x), 1, "identity"),
    "addcmul": (lambda m, x: torch.addcmul(x, m.conv(x), m.scale), 1, "identity"),
    "sum of a stack": (lambda m, x: torch.stack([x, m.conv(x)]).sum(0), 1, "identity"),
    "sum of three": (lambda m, x: torch.stack([x, m.conv(x), m.conv(m.conv(x))], 1).sum(1), 1, "identity"),
    "built-in sum": (lambda m, x: sum([x, m.conv(x)]), 1, "identity"),
    "slice": (through_views, 1, "identity"),
    "channels last": (permuted, 1, "identity"),
    "projection": (lambda m, x: m.other(x) + m.conv(F.relu(m.conv(x))), 1, "projection"),
    "pooling": (lambda m, x: F.max_pool2d(x, 3, 1, 1) + m.conv(x), 1, "pooling"),
    "padding": (lambda m, x: F.pad(x[:, :3], (0, 0, 0, 0, 0, 3)) + m.conv(x), 1, "padding"),
    "broadcast context": (lambda m, x: x + m.other(x.mean((2, 3), keepdim=True)), 1, "identity"),
    "parallel branches": (lambda m, x: x + m.conv(F.relu(m.conv(x))) + m.other(x), 2, "identity"),
    "divided by a number": (lambda m, x: x + m.conv(x) / x.square().mean().view(1, 1, 1, 1), 1, "identity"),
    "consumed by an activation": (lambda m, x: torch.sigmoid(x + m.conv(x)), 1, "identity"),
    "broadcast embedding": (lambda m, x: m.conv(x) + m.other(x.mean((2, 3), keepdim=True)), 0, None),
    "hand-written activation": (lambda m, x: x * torch.sigmoid(x) + 0.1 * x**3, 0, None),
    "constant": (lambda m, x: x + torch.ones_like(x) * m.scale, 0, None),
    "gate": (lambda m, x: x * torch.sigmoid(m.conv(x) + m.other(x)), 0, None),
    "attention logits": (lambda m, x: x * torch.softmax((m.conv(x) + m.other(x)).flatten(2), -1).view_as(x), 0, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_addition_is_a_join_and_nothing_else_is(form):
    join, count, shortcut = FORMS[form]
    torch.manual_seed(0)
    model = Branch(join)
    report = characterize(model, torch.randn(4, 3, 8, 8))
    assert (len(report) if report.kind == "join" else 0) == count, [record.name for record in report]
    if count:
        assert report[0].shortcut == shortcut
        assert report[0].residual_variance > 0


@pytest.mark.parametrize("form", ["add", "add in place", "add with alpha", "sub", "addcmul", "slice", "channels last"])
def test_statistics_are_the_definition_s(form):
    torch.manual_seed(0)
    model, x = Branch(FORMS[form][0]), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        stem = model.stem(x)
        branch = model.conv(F.relu(stem) if "place" in form else stem)
        factor = {"add with alpha": 0.5, "sub": -1, "addcmul": 0.25}.get(form, 1)
        total = stem + factor * branch
    record = characterize(model, x)[0]
    mean = total.mean((0, 2, 3))
    assert record.squared_mean == pytest.approx(mean.square().mean().item(), rel=1e-4)
    assert record.variance == pytest.approx(total.var((0, 2, 3), correction=0).mean().item(), rel=1e-4)
    assert record.residual_variance == pytest.approx(branch.var((0, 2, 3), correction=0).mean().item(), rel=1e-4)


def test_parallel_branches_are_told_from_the_stream():
    """(x + f(x)) + g(x): the second join's branch is g, however short."""
    torch.manual_seed(0)
    model, x = Branch(FORMS["parallel branches"][0]), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        branch = model.other(model.stem(x))
    expected = branch.var((0, 2, 3), correction=0).mean().item()
    assert characterize(model, x)[1].residual_variance == pytest.approx(expected, rel=1e-4)


def test_recurrent_layers_neither_hide_a_join_nor_have_one():
    class Net(nn.Module):
        def __init__(self, cell):
            super().__init__()
            self.stem, self.cell = nn.Linear(8, 16), cell(16, 16, batch_first=True)

        def forward(self, x):
            x = self.stem(x)
            return x + self.cell(x)[0]

    for cell in (nn.GRU, nn.LSTM, nn.RNN):
        report = characterize(Net(cell), torch.randn(3, 5, 8), backward=True)
        assert [record.name for record in report] == ["Net"], cell.__name__


def test_stochastic_depth_of_the_user_is_seen_through():
    """A mask per example, drawn in eval mode too: the residual variance is that before the mask."""
    torch.manual_seed(0)

    def masked(m, x):
        return x + m.conv(x) * torch.tensor([0.0, 2.0, 0.0, 2.0]).view(4, 1, 1, 1)

    model, x = Branch(masked), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = model.conv(model.stem(x)).var((0, 2, 3), correction=0).mean().item()
    assert characterize(model, x)[0].residual_variance == pytest.approx(expected, rel=1e-4)


def test_two_joins_of_a_module_are_numbered_and_channels_are_the_last_of_three_axes():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Linear(5, 5)
            self.channel = nn.Linear(7, 7)

        def forward(self, x):
            x = x + self.token(x.transpose(1, 2)).transpose(1, 2)
            return x + self.channel(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(7, 7), Block(), Block()), torch.randn(3, 5, 7)
    report = characterize(model, x)
    assert [record.name for record in report] == ["1", "1#2", "2", "2#2"]
    with torch.no_grad():
        out = model[1](model[0](x))
    expected = out.var((0, 1), correction=0).mean().item()
    assert report[1].variance == pytest.approx(expected, rel=1e-5), f"channel axis of shape {report[1].shape}"
