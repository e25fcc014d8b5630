"""What counts as a weight layer: mixing channels by parameters, in whatever operation, and by nothing else."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from normfree.conversion import convert
from normfree.trace.tape import Tape
from normfree.trace.watched import run_watched

IMAGES = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))


class Apply(nn.Module):
    """An operation with parameters, or constants, of its own."""

    def __init__(self, function, *, constants=(), **parameters):
        super().__init__()
        self.function = function
        for name, shape in parameters.items():
            if name in constants:
                self.register_buffer(name, torch.randn(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.function(self, x)


def locally_connected(self, x):
    patches = F.unfold(x, 1).unsqueeze(1)  # N, 1, C, L
    return (patches * self.weight).sum(2).unflatten(2, (8, 8))


def conditional(self, x):
    weight = (x.mean((2, 3)) @ self.weight).view(-1, 1, 1, 1)
    return F.conv2d(x.flatten(0, 1)[None], weight, groups=24).view_as(x)


WITH_WEIGHTS = {
    "convolution": lambda: nn.Conv2d(6, 6, 1),
    "functional": lambda: Apply(lambda self, x: F.conv2d(x, self.weight), weight=(6, 6, 1, 1)),
    "computed weight": lambda: Apply(lambda self, x: F.conv2d(x, self.weight.tanh() * 2), weight=(6, 6, 1, 1)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(6, 6, 1)),
    "einsum": lambda: Apply(lambda self, x: torch.einsum("nchw,cd->ndhw", x, self.weight), weight=(6, 6)),
    "matmul": lambda: Apply(lambda self, x: (x.movedim(1, -1) @ self.weight).movedim(-1, 1), weight=(6, 6)),
    "tensordot": lambda: Apply(
        lambda self, x: torch.tensordot(x, self.weight, ([1], [0])).movedim(-1, 1), weight=(6, 6)
    ),
    "bilinear": lambda: Apply(
        lambda self, x: F.bilinear(x.movedim(1, -1), x.movedim(1, -1), self.weight).movedim(-1, 1), weight=(6, 6, 6)
    ),
    "distances": lambda: Apply(
        lambda self, x: torch.cdist(x.movedim(1, -1).flatten(0, 2), self.weight).view(4, 8, 8, 6).movedim(-1, 1),
        weight=(6, 6),
    ),
    "deformable": lambda: Apply(
        lambda self, x: torchvision.ops.deform_conv2d(x, x.new_zeros(4, 2, 8, 8), self.weight), weight=(6, 6, 1, 1)
    ),
    "locally connected": lambda: Apply(locally_connected, weight=(6, 6, 64)),
    "conditional": lambda: Apply(
        lambda self, x: F.conv2d(
            x.flatten(0, 1)[None], (x.mean((2, 3)) @ self.weight).view(-1, 1, 1, 1), groups=24
        ).view_as(x),
        weight=(6, 6),
    ),
}
WITHOUT = {
    "constant blur": lambda: Apply(
        lambda self, x: F.conv2d(x, self.blur, padding=1, groups=6), constants=("blur",), blur=(6, 1, 3, 3)
    ),
    "adjacency": lambda: Apply(
        lambda self, x: (self.adjacency @ x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x),
        constants=("adjacency",), adjacency=(64, 64),
    ),
    "scale": lambda: Apply(lambda self, x: x * self.scale, scale=(6, 1, 1)),
    "map": lambda: Apply(lambda self, x: x * self.map, map=(6, 8, 8)),
    "positions": lambda: Apply(lambda self, x: x + self.map, map=(1, 6, 8, 8)),
    "layer norm": lambda: nn.LayerNorm((6, 8, 8)),
    "PReLU": lambda: nn.PReLU(6),
    "attention of activations": lambda: Apply(
        lambda self, x: (x.flatten(2) @ x.flatten(2).mT @ x.flatten(2)).view_as(x)
    ),
    "token": lambda: Apply(lambda self, x: torch.cat([x[:, :5], self.token.expand(4, 1, 8, 8)], 1), token=(1, 1, 8, 8)),
}  # fmt: skip


def weight_layers(model):
    tape = Tape()
    run_watched(model, tape, (IMAGES,), {})
    return [node.module for node in tape.nodes if node.weight_layer]


@pytest.mark.parametrize("make", WITH_WEIGHTS.values(), ids=WITH_WEIGHTS)
def test_whatever_mixes_channels_by_parameters_is_a_weight_layer(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 6, 1), make(), nn.Conv2d(6, 6, 1))
    found = weight_layers(model)
    assert set(found) == {"0", "1", "2"}


@pytest.mark.parametrize("make", WITHOUT.values(), ids=WITHOUT)
def test_what_scales_adds_or_is_constant_is_none(make):
    torch.manual_seed(0)
    assert weight_layers(nn.Sequential(nn.Conv2d(6, 6, 1), make(), nn.Conv2d(6, 6, 1))) == ["0", "2"]


class Offsets(nn.Module):
    """A residual branch that ends in a deformable convolution, whose offsets are a convolution's."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.offset = nn.Conv2d(6, 18, 3, padding=1)
        self.deformed, self.last = torchvision.ops.DeformConv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        return x + self.last(self.deformed(y, self.offset(y)))


def test_what_cannot_be_converted_keeps_its_normalizer_and_what_feeds_it_is_no_branch():
    torch.manual_seed(0)
    conversion = convert(Offsets(), IMAGES)
    assert [(c.path, c.action) for c in conversion.changes] == [
        ("conv", "replaced"), ("norm", "removed"), ("last", "kept"),
    ]  # fmt: skip
    assert "DeformConv2d" in conversion.kept[0].note
    assert isinstance(conversion.model.offset, nn.Conv2d)
    assert not any(change.note for change in conversion.changes if change.path == "conv")
