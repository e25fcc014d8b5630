"""Predictions from weights and structure: rules against samples, networks against measurements, what ends them."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree
from normfree.cli import main
from normfree.signal.moments import Moments, normal, rectified
from normfree.signal.prediction import predict
from normfree.studies.prediction_coverage import TOLERANCE, measure


class Through(nn.Module):
    """One operation between two convolutions, the second of which is the record."""

    def __init__(self, operation):
        super().__init__()
        self.first = nn.Conv2d(16, 16, 1)  # the identity, and a bias: what comes out is white
        self.operation = operation
        self.last = nn.Conv2d(16, 128, 1)
        nn.init.dirac_(self.first.weight)
        self.first.bias.data.copy_(torch.linspace(-0.5, 0.5, 16))

    def forward(self, x):
        return self.last(self.operation(self.first(x)))


def departures(model, x=None, **options):
    x = torch.randn(64, 3, 16, 16) if x is None else x
    report = normfree.characterize(model, x, predict=True, **options)
    assert report.predicted
    return report, [math.nan if p is None else p[1] / r.variance for p, r in zip(report.predicted, report, strict=True)]


OPERATIONS = {
    "relu": torch.relu, "relu in place": lambda x: x.relu_(), "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu,
    "hardswish": F.hardswish, "leaky_relu": lambda x: F.leaky_relu(x, 0.3), "elu": F.elu, "tanh": torch.tanh,
    "mish": F.mish, "softplus": F.softplus, "swish by hand": lambda x: x * torch.sigmoid(x),
    "sum of two functions of one": lambda x: x + 2 * x.relu() - x.abs(), "square": lambda x: x.square(),
    "scale and shift": lambda x: 3 * (x + 1) / 2 - 0.5, "minus": lambda x: 1 - x,
    "chained": lambda x: F.relu(F.silu(x) - 0.1) * 2,
    "average pool": lambda x: F.avg_pool2d(x.relu(), 2), "padded average pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "valid average pool": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 4),
    "uneven adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 5),
    "max pool": lambda x: F.max_pool2d(x.relu(), 3, 2, 1), "max pool of x": lambda x: F.max_pool2d(x, 2),
    "relu behind max pool": lambda x: F.relu(F.max_pool2d(x, 3, 2, 1) - 1.5),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "nearest": lambda x: F.interpolate(x, scale_factor=2), "pad": lambda x: F.pad(x, (1, 2, 3, 4), value=2.0),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]), "group norm": lambda x: F.group_norm(x, 2),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True), "shuffle": lambda x: F.channel_shuffle(x, 4),
    "split and join": lambda x: torch.cat([part * (i + 1) for i, part in enumerate(x.chunk(4, 1))], 1),
    "join of functions": lambda x: torch.cat([x.relu(), x.tanh()], 1).relu()[:, 4:20],
    "stack and sum": lambda x: torch.stack([a.relu() for a in x.chunk(2, 1)], 1).sum(1).repeat(1, 2, 1, 1),
    "permute": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2),
    "addcmul": lambda x: torch.addcmul(x, x.new_tensor(2.0), x.new_tensor(0.5)),
    "relu of a sum": lambda x: (x[:, :8].relu() + x[:, 8:]).relu().repeat(1, 2, 1, 1),
    "product": lambda x: (x[:, :8].relu() * x[:, 8:]).repeat(1, 2, 1, 1), "quotient": lambda x: x / (1 + x.square()),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_rule_gives_what_samples_give(name):
    torch.manual_seed(0)
    _, ratios = departures(Through(OPERATIONS[name]), torch.randn(256, 16, 12, 12))
    assert ratios == pytest.approx([1, 1], abs=0.06), name


def test_borders_are_counted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 64, 5, padding=2))
    _, ratios = departures(model, torch.randn(256, 3, 5, 5))
    assert ratios == pytest.approx([1, 1], abs=0.05)


def test_closed_forms_and_quadrature_agree():
    mean, variance = torch.randn(500), torch.rand(500) * 3
    closed = rectified(normal(mean, variance))
    identity = Moments(mean, variance, torch.zeros(500), mean, variance.sqrt(), lambda x: x)
    for name in ("mean", "variance", "third"):
        torch.testing.assert_close(getattr(closed, name), getattr(rectified(identity), name), atol=0.03, rtol=0.02)


@pytest.mark.parametrize(
    "network", ["timm:resnet18", "timm:regnetx_002", "timm:mobilenetv2_100", "torchvision:shufflenet_v2_x1_0"]
)
def test_networks_are_predicted_within_a_tenth(network):
    row = measure(network)
    assert row.holds, row
    assert max(map(abs, row.departures)) <= TOLERANCE


def test_it_is_taken_from_the_inputs_means_and_variances():
    model = nn.Sequential(nn.Conv2d(3, 256, 1))
    x = torch.randn(8, 3, 32, 32) * torch.tensor([1.0, 5.0, 0.1]).view(3, 1, 1) + 3
    report, ratios = departures(model, x)
    assert ratios == pytest.approx([1], abs=0.02)
    assert report.predicted[0][0] == pytest.approx(report[0].squared_mean, rel=0.02)


def test_seeds_are_averaged_and_saved(tmp_path):
    report = normfree.characterize(
        lambda: normfree.create_model("nf_resnet26"),
        lambda _: torch.randn(8, 3, 96, 96),
        seeds=2,
        predict=True,
    )
    assert report[0].predicted_variance == pytest.approx(report[0].variance, rel=0.15)
    assert any("follows from weights and structure" in verdict for verdict in report.verdicts)
    assert "predicted" in str(report)
    assert "predicted_variance" in report.save(tmp_path / "report.json").read_text()
    assert report.save(tmp_path / "report.svg").stat().st_size > 1000
    assert (
        normfree.characterize(normfree.create_model("nf_resnet26", width=0.25), torch.randn(2, 3, 64, 64)).predicted
        == []
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        x = x + self.inner(x)
        return x + self.inner(x.softmax(1))


class PartlyWritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = self.first(x)
        x[:, :4].relu_()
        return self.last(x)


def test_what_is_written_in_part_is_not_predicted_wrongly():
    report, ratios = departures(PartlyWritten())
    assert ratios[0] == pytest.approx(1, abs=0.1)
    assert report.predicted[1] is None
    assert report.unpredicted == ("convolution in last",)


def test_where_there_is_no_rule_it_ends_and_says_so():
    report, ratios = departures(Attention())
    assert ratios[0] == pytest.approx(1, abs=0.5)
    assert report.predicted[1] is None
    assert report.unpredicted == ("_softmax in the network",)
    assert any("the prediction ends at _softmax" in verdict for verdict in report.verdicts)


class Pooled(nn.Module):
    """Averages, again and again, what is alike already."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.layers = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            pooled = F.avg_pool2d(F.avg_pool2d(x, 3, 1, 1), 3, 1, 1)
            x = pooled + layer(pooled)
        return x


def test_a_departure_is_named_with_its_place_and_size():
    report, ratios = departures(Pooled())
    assert ratios[0] < 0.8
    (verdict,) = [verdict for verdict in report.verdicts if "departs from its prediction" in verdict]
    assert "first at Pooled, by" in verdict


def test_the_model_and_the_random_state_come_back():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 3, 16, 16)
    torch.manual_seed(5)
    normfree.characterize(model, x, predict=True)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert drawn == torch.rand(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)

    def forward(self, x):
        return self.conv(x.view(8, 3, 16, 16))


def test_a_network_for_one_batch_size_is_followed_at_that():
    _, ratios = departures(Fixed(), torch.randn(8, 3, 16, 16))
    assert ratios == pytest.approx([1], abs=0.1)


def test_other_inputs_and_precisions():
    linear = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256)).double()
    _, ratios = departures(linear, torch.randn(512, 64, dtype=torch.float64))
    assert ratios == pytest.approx([1, 1], abs=0.1)
    sequence = nn.Sequential(nn.Conv1d(4, 32, 5, padding=2), nn.ReLU(), nn.Conv1d(32, 64, 3))
    _, ratios = departures(sequence, torch.randn(32, 4, 50))
    assert ratios == pytest.approx([1, 1], abs=0.1)
    volume = nn.Sequential(nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 8, 1))
    report, ratios = departures(volume, torch.randn(8, 1, 10, 10, 10))
    assert ratios[0] == pytest.approx(1, abs=0.1)
    assert report.unpredicted[0].startswith("max_pool3d")
    embedding = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 8))
    found = predict(embedding, (torch.randint(10, (4, 6)),), {}, batch_stats=True, weight_layers=True)
    assert found.values == (None,)


def test_command(monkeypatch, capsys):
    arguments = ["spp", "nf_resnet26", "--predict", "--size", "64", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", ["normfree", *arguments])
    main()
    assert "predicted" in capsys.readouterr().out
