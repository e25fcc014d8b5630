"""Which operand is a branch, what is no residual join, what is no input, and layers that run several times."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree import characterize
from normfree.conversion import convert

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def layer(inputs, outputs, kernel=3, **options):
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.branch = nn.Sequential(*layer(channels, channels), nn.ReLU(), *layer(channels, channels))

    def forward(self, x):
        return (x + self.branch(x)).relu()


class LongSkip(nn.Module):
    """A skip over a chain of residual blocks."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = layer(3, 8), nn.Sequential(Block(), Block())

    def forward(self, x):
        h = self.stem(x)
        return h + self.blocks(h)


class Pyramid(nn.Module):
    """The top-down path of a feature pyramid."""

    def __init__(self, *, learned=False):
        super().__init__()
        self.stem = nn.Sequential(*layer(3, 8), nn.ReLU(), Block())
        self.downs = nn.ModuleList(nn.Sequential(*layer(8, 8, stride=2), nn.ReLU(), Block()) for _ in range(2))
        self.laterals = nn.ModuleList(layer(8, 8, 1) for _ in range(3))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8)) if learned else None

    def forward(self, x):
        levels = [self.stem(x)]
        for down in self.downs:
            levels.append(down(levels[-1]))
        merged = [lateral(level) for lateral, level in zip(self.laterals, levels, strict=True)]
        merged[1] = merged[1] + F.interpolate(merged[2], scale_factor=2)
        return merged[0] + (F.interpolate(merged[1], scale_factor=2) if self.up is None else self.up(merged[1]))


class Siamese(nn.Module):
    """Two runs of one encoder, combined."""

    def __init__(self, combine):
        super().__init__()
        self.encoder, self.head, self.combine = nn.Sequential(*layer(3, 8), nn.ReLU(), Block()), layer(8, 8), combine

    def forward(self, x):
        return self.head(self.combine(self.encoder(x), self.encoder(x.flip(3))))


class Gates(nn.Module):
    """The sum of two gates, which multiplies."""

    def __init__(self, gate=torch.sigmoid):
        super().__init__()
        self.stem, self.one, self.other, self.last = layer(3, 8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), layer(8, 8)
        self.gate = gate

    def forward(self, x):
        h = self.stem(x).relu()
        pooled = h.mean((2, 3), keepdim=True)
        return self.last(h * (self.gate(self.one(pooled)) + self.gate(self.other(h.amax((2, 3), keepdim=True)))))


def branch_ends(conversion):
    return {change.path for change in conversion.changes if change.note == "ends a residual branch"}


def test_a_skip_over_blocks_leaves_the_stem_alone():
    torch.manual_seed(0)
    conversion = convert(LongSkip(), IMAGES)
    assert branch_ends(conversion) == {"blocks.0.branch.3", "blocks.1.branch.3"}
    assert conversion.model.stem[0].out_scale == 1


@pytest.mark.parametrize("learned", [False, True])
def test_pyramids_are_fusions_and_keep_their_proportions(learned):
    torch.manual_seed(0)
    conversion = convert(Pyramid(learned=learned), IMAGES)
    fusions = [(b, a) for b, a in zip(conversion.before, conversion.after, strict=True) if b.shortcut == "fusion"]
    assert len(fusions) == 2
    for before, after in fusions:
        assert after.variance == pytest.approx(before.variance, rel=0.1)
    assert not any(path.startswith("laterals") for path in branch_ends(conversion))


@pytest.mark.parametrize("combine", [lambda a, b: (a - b).abs(), lambda a, b: a + b], ids=["difference", "sum"])
def test_two_runs_of_one_encoder_are_no_residual_join(combine):
    torch.manual_seed(0)
    conversion = convert(Siamese(combine), IMAGES)
    assert branch_ends(conversion) == {"encoder.3.branch.3"}
    assert {record.name.partition("#")[0] for record in conversion.before} == {"encoder.3"}


@pytest.mark.parametrize("gate", [torch.sigmoid, torch.tanh, F.hardsigmoid])
def test_a_sum_of_gates_is_none(gate):
    torch.manual_seed(0)
    report = characterize(Gates(gate), IMAGES)
    assert report.kind == "weight layer"


class Tower(nn.Module):
    """A head that several levels share."""

    def __init__(self, depth):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(*layer(3 if i == 0 else 8, 8), nn.ReLU()) for i in range(depth)))

    def forward(self, x):
        return [self.layers(x), self.layers(x[..., ::2, ::2] * 0.3), self.layers(x[..., ::4, ::4] * 0.1 + 0.5)]


@pytest.mark.parametrize("depth", [1, 4, 8])
def test_layers_that_run_several_times_are_right_on_average(depth):
    torch.manual_seed(0)
    conversion = convert(Tower(depth), IMAGES)
    found = {}
    for record in conversion.after:
        found.setdefault(record.name.partition("#")[0], []).append(record.variance)
    assert conversion.departure < 0.02
    assert len(found) == depth
    for name, variances in found.items():
        assert len(variances) == 3
        assert sum(variances) / 3 == pytest.approx(1, abs=0.03), name


class Beside(nn.Module):
    """A normalized layer, and an input that is not the signal."""

    def __init__(self, use, *, images=False):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 1) if images else nn.Linear(3, 8)
        self.norm, self.use = nn.BatchNorm2d(8) if images else nn.BatchNorm1d(8), use

    def forward(self, x, beside):
        return self.norm(self.use(self.layer(x), beside)).relu()


POINTS = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
ADJACENCY = (torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) > 0.5).float()
EDGES = torch.randint(32, (2, 200), generator=torch.Generator().manual_seed(1))
SIDE_INPUTS = {
    "mask": (lambda h, mask: h.masked_fill(mask, 0.0), ADJACENCY[:, :8] > 0),
    "float mask": (lambda h, mask: h * mask, ADJACENCY[:, :8]),
    "mask by where": (lambda h, mask: torch.where(mask, h, 0.0), ADJACENCY[:, :8] > 0),
    "integer mask": (lambda h, mask: h * mask, (ADJACENCY[:, :8] > 0).long()),
    "edges": (lambda h, edges: torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]), EDGES),
    "edges scattered": (
        lambda h, edges: torch.zeros_like(h).scatter_add(0, edges[1][:, None].expand(-1, 8), h[edges[0]]), EDGES
    ),
    "adjacency": (lambda h, adjacency: adjacency @ h, ADJACENCY),
    "sparse adjacency": (lambda h, adjacency: torch.sparse.mm(adjacency, h), ADJACENCY.to_sparse()),
    "lengths": (lambda h, lengths: h * (torch.arange(8) < lengths[:, None]), torch.randint(4, 9, (32,))),
}  # fmt: skip


@pytest.mark.parametrize(("use", "beside"), SIDE_INPUTS.values(), ids=SIDE_INPUTS)
def test_masks_lengths_and_edges_are_no_signal(use, beside):
    torch.manual_seed(0)
    conversion = convert(Beside(use), (POINTS, beside))
    assert not conversion.kept


def test_what_normalizes_the_input_itself_stays():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="it normalizes the network's input too, past all weight layers"):
        convert(Beside(lambda h, beside: h + beside), (POINTS, torch.randn(32, 8)))


class GatedInput(nn.Module):
    """The signal is the input, and only its gate has weights."""

    def __init__(self):
        super().__init__()
        self.gate, self.norm, self.head = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), layer(3, 8)

    def forward(self, x):
        return self.head(self.norm(x * torch.sigmoid(self.gate(x))))


def test_a_gate_is_not_what_is_normalized():
    torch.manual_seed(0)
    conversion = convert(GatedInput(), IMAGES)
    assert [change.path for change in conversion.kept] == ["norm"]
