"""Sweeps over widths, depths and any argument: slopes that theory gives, files that are taken up again, figures."""

import json
import statistics
import sys

import pytest
import torch
from torch import nn

import normfree
from normfree.cli import main
from normfree.errors import SignalError
from normfree.signal.sweep_point import measure_point
from normfree.trace.inputs import noise

WIDTHS = [128, 256, 512, 1024, 2048]


class Perceptron(nn.Module):
    def __init__(self, width, output_std):
        super().__init__()
        self.first = nn.Linear(32, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.third = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, 10, bias=False)
        for layer in (self.first, self.second, self.third):
            nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)
        nn.init.normal_(self.output.weight, std=output_std)

    def forward(self, x):
        for layer in (self.first, self.second, self.third):
            x = torch.relu(layer(x))
        return self.output(x)


def standard(width):
    return Perceptron(width, (2 / width) ** 0.5)


def mu(width):
    return Perceptron(width, 1 / width)


def examples(model, batch=4):
    return torch.randn(batch, 32), None


def same_rate(model):
    return torch.optim.Adam(model.parameters(), 1e-5)


def mu_rates(model, width):
    hidden = [model.second.weight, model.third.weight, model.output.weight]
    return torch.optim.Adam([{"params": [model.first.weight], "lr": 1e-3}, {"params": hidden, "lr": 0.1 / width}])


@pytest.mark.parametrize(
    ("factory", "optimizer", "initial", "change", "words"),
    [
        (standard, same_rate, (0, 0, 0, 0), (0, 1, 1, 1.5), "change after 1 step of output grows as width^1.4"),
        (mu, mu_rates, (0, 0, 0, -0.5), (0, 0, 0, 0), "change after 1 step does not depend on width"),
    ],
    ids=["standard", "mu"],
)
def test_slopes_of_perceptrons_are_the_theorys(factory, optimizer, initial, change, words):
    """Yang et al. 2022, appendix D: Adam's step moves every weight by the rate, in the direction of its input."""
    report = normfree.sweep(factory, {"width": WIDTHS}, data=examples, optimizer=optimizer, seeds=5)
    found = {(slope.quantity, slope.name): slope.exponent for slope in report.slopes}
    layers = ("first", "second", "third", "output")
    for quantity, expected in (("rms", initial), ("change", change)):
        for layer, exponent in zip(layers, expected, strict=True):
            assert found[quantity, layer] == pytest.approx(exponent, abs=0.1), (quantity, layer)
    assert words in report.verdicts[1]
    assert ("transfers" in report.verdicts[1]) == (factory is mu)
    assert bool(report.verdicts[1].remedy) == (factory is standard)


def paper_resnet(depth):
    return normfree.create_model(f"nf_resnet{depth}", skip_gain=1.0)


def large_noise(model):
    return noise(model, 2, (192, 192)), None


def test_variance_of_the_papers_resnets_is_the_ledgers_at_every_depth():
    report = normfree.sweep(paper_resnet, {"depth": [26, 50]}, data=large_noise, steps=0, seeds=3)
    for depth in (26, 50):
        expected = [r.expected_variance for r in normfree.characterize(paper_resnet(depth), torch.randn(1, 3, 64, 64))]
        found = [
            [place.numbers["variance"] for place in places if place.kind == "join"]
            for point, _, places in report.networks
            if point["depth"] == depth
        ]
        for variances, variance in zip(zip(*found, strict=True), expected, strict=True):
            assert statistics.fmean(variances) == pytest.approx(variance, rel=0.05)
    assert {slope.name for slope in report.slopes} >= {"stages.0.0", "the last join"}
    assert len(report.verdicts) == 1  # no steps, no changes


def convnet(width):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 2)
    )


def images(model, batch=3):
    return torch.randn(batch, 3, 8, 8), torch.zeros(batch, dtype=torch.long)


def test_numbers_are_those_of_a_loop_by_hand():
    report = normfree.sweep(convnet, {"width": [4]}, data=images, seeds=1, steps=2)
    torch.manual_seed(0)
    model = convnet(4)
    x, labels = images(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def values():
        hidden = model[0](x)
        normal = nn.functional.batch_norm(hidden, None, None, model[1].weight, model[1].bias, training=True)
        return hidden.detach(), model[4](normal.relu().flatten(1)).detach()

    before = values()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    ((_, _, places),) = report.networks
    assert [place.name for place in places] == ["0", "4"]
    for place, old, new in zip(places, before, values(), strict=True):
        assert place.numbers["rms"] == pytest.approx(old.square().mean().sqrt().item(), rel=1e-5)
        assert place.numbers["change"] == pytest.approx((new - old).square().mean().sqrt().item(), rel=1e-3)
    assert report.slopes == []
    assert "no two values" in report.verdicts[0]


def test_arguments_go_to_whatever_names_them():
    report = normfree.sweep(convnet, {"width": [4, 8], "batch": [2, 6]}, data=images, seeds=1)
    assert [point for point, _, _ in report.networks] == [
        {"width": w, "batch": b} for w in (4, 8) for b in (2, 6)
    ]  # fmt: skip
    assert {slope.name for slope in report.slopes} == {"0", "4"}
    assert str(report).count("\n") >= 4
    rates = normfree.sweep(
        lambda: convnet(4), {"lr": [1e-4, 1e-3]}, data=images, seeds=1,
        optimizer=lambda model, lr: torch.optim.Adam(model.parameters(), lr),
    )  # fmt: skip
    assert "grows as lr^" in rates.verdicts[1]
    assert "transfer" not in str(rates)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_sweep_that_was_stopped_goes_on(tmp_path, monkeypatch, processes):
    path = tmp_path / "sweep.csv"
    whole = normfree.sweep(convnet, {"width": [4, 8]}, data=images, seeds=2)
    calls = []

    def interrupted(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return measure_point(*arguments)

    monkeypatch.setattr("normfree.signal.sweeping.measure_point", interrupted)
    with pytest.raises(KeyboardInterrupt):
        normfree.sweep(convnet, {"width": [4, 8]}, data=images, seeds=2, path=path)
    monkeypatch.undo()
    assert path.read_text().count("\n") == 1 + 2 * 2
    path.write_text(path.read_text().removesuffix("\n")[:-3])  # killed within a row
    resumed = normfree.sweep(convnet, {"width": [4, 8]}, data=images, seeds=2, path=path, processes=processes)
    assert path.read_text().count("\n") >= 1 + 2 * 4
    for (_, _, one), (_, _, other) in zip(whole.networks, resumed.networks, strict=True):
        for place, again in zip(one, other, strict=True):
            assert place.name == again.name
            assert again.numbers == pytest.approx(place.numbers, rel=1e-4)
    monkeypatch.setattr("normfree.signal.sweeping.measure_point", None)  # nothing is measured again
    normfree.sweep(convnet, {"width": [4, 8]}, data=images, seeds=2, path=path)
    with pytest.raises(ValueError, match="no file of this sweep"):
        normfree.sweep(convnet, {"width": [4, 8]}, data=images, seeds=2, steps=3, path=path)


class Transformer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Linear(6, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.layer(self.embedding(x)).mean(1))


def test_transformers_are_swept_too():
    report = normfree.sweep(
        Transformer, {"width": [16, 64, 256]}, data=lambda model: (torch.randn(4, 5, 6), None), seeds=2
    )
    names = {(slope.kind, slope.name) for slope in report.slopes}
    assert ("join", "layer") in names
    assert {("weight layer", "embedding"), ("weight layer", "layer.linear2"), ("weight layer", "head")} <= names
    assert "does not transfer" in report.verdicts[1]  # Adam at one rate, without µP


def broken(width):
    model = convnet(width)
    with torch.no_grad():
        model[0].weight.fill_(torch.inf)
    return model


def test_what_is_not_finite_is_said(tmp_path):
    report = normfree.sweep(broken, {"width": [4, 8]}, data=images, seeds=1)
    assert report.verdicts[0].startswith("the signal is not finite at 0 with width 4")
    with pytest.raises(SignalError, match="not finite"):
        report.check()
    assert json.loads(report.save(tmp_path / "sweep.json").read_text())["rows"][0]["rms"] is None


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"over": {}}, ValueError, "name an argument"),
        ({"over": {"width": []}}, ValueError, "no values of width"),
        ({"over": {"width": [4, 4]}}, ValueError, "twice"),
        ({"over": {"widht": [4]}}, ValueError, "nor the optimizer takes an argument called 'widht'"),
        ({"over": {"width": [4]}, "steps": -1}, ValueError, "steps is -1"),
        ({"over": {"width": [4]}, "seeds": 0}, ValueError, "seeds 0"),
        ({"over": {"width": [4]}, "path": "sweep.txt"}, ValueError, "suffix must be .csv"),
        ({"over": {"seed": [4]}, "factory": lambda seed: convnet(seed)}, ValueError, "cannot be called 'seed'"),
        ({"over": {"width": [4]}, "factory": lambda width: width}, TypeError, "returned a int"),
        ({"over": {"width": [4]}, "data": lambda model: torch.randn(2, 3, 8, 8)}, TypeError, "two things"),
        ({"over": {"width": [4]}, "factory": lambda width: nn.Conv2d(3, width, 3)}, SignalError, "loss of your own"),
        ({"over": {"width": [4]}, "factory": lambda width: nn.Flatten(), "steps": 0}, SignalError, "no weight layer"),
        ({"over": {"width": [4]}, "factory": lambda width: convnet(4), "processes": 2}, ValueError, "cannot import"),
        ({"over": [4]}, TypeError, "over is a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(arguments, error, words):
    with pytest.raises(error, match=words):
        normfree.sweep(**({"factory": convnet, "data": images, "seeds": 1} | arguments))


def test_check_and_files(tmp_path):
    report = normfree.sweep(convnet, {"width": [4, 8, 16]}, data=images, seeds=2)
    report.check(max_growth=5, max_change_growth=5)
    with pytest.raises(SignalError, match=r"rms of \S+ goes as width\^"):
        report.check(max_growth=0)
    for suffix in ("png", "svg", "html", "csv", "json"):
        assert report.save(tmp_path / f"sweep.{suffix}").stat().st_size > 300
    with pytest.raises(ValueError, match="suffix"):
        report.save(tmp_path / "sweep.gif")


def test_command(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["normfree", "sweep", "nf_resnet26", *arguments])
        main()
        return capsys.readouterr().out

    table, out = tmp_path / "sweep.csv", tmp_path / "sweep.svg"
    common = ("--size", "32", "--batch", "2", "--seeds", "1", "--table", str(table))
    text = run("--over", "width=0.25,0.5", *common, "--out", str(out))
    assert "head.fc" in text
    assert "written" in text
    assert out.exists()
    document = json.loads(run("--over", "width=0.25,0.5", *common, "--json"))
    assert document["slopes"][0]["name"] == "stages.0.0"
    for bad in (("width",), ("width=",), ("nothing=1",)):
        with pytest.raises(SystemExit) as raised:
            run("--over", *bad, "--size", "32")
        assert raised.value.code == 2
