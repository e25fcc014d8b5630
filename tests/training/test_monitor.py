"""The signal of live training batches."""

import csv
import time

import pytest
import torch
from torch import nn

from normfree import characterize, create_model
from normfree.training import SignalMonitor


def network():
    torch.manual_seed(0)
    return create_model(
        "nf_resnet26", width=0.25, num_classes=3, skip_gain=0.5, stochastic_depth_rate=0.0, drop_rate=0.0
    )


def step(model, x, optimizer=None):
    loss = model(x).square().sum()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def test_it_tells_what_characterize_tells(tmp_path):
    model, x = network(), torch.randn(4, 3, 64, 64)
    expected = characterize(model, x, open_branches=False)
    with SignalMonitor(model, every=3, path=tmp_path / "signal.csv") as monitor:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(4):
            step(model, x, optimizer)
    assert sorted({row["step"] for row in monitor.rows}) == [0, 3]
    for row, record in zip(monitor.rows, expected, strict=False):
        assert row["name"] == record.name
        assert row["variance"] == pytest.approx(record.variance, rel=1e-5)
        assert row["squared_mean"] == pytest.approx(record.squared_mean, rel=1e-5)
        # The scales of the step that was measured, not those after the optimizer's.
        assert row["residual_variance"] == pytest.approx(record.residual_variance, rel=1e-5)
    written = list(csv.DictReader((tmp_path / "signal.csv").read_text().splitlines()))
    assert len(written) == len(monitor.rows) == 2 * len(expected)
    assert float(written[0]["variance"]) == monitor.rows[0]["variance"]


def test_gradients_are_those_of_the_loss():
    model, x, seen = network(), torch.randn(4, 3, 64, 64), {}
    with SignalMonitor(model, every=1) as monitor:

        def hook(module, inputs, output):
            output.register_hook(lambda gradient: seen.update(g=gradient))

        with model.stages[1][1].register_forward_hook(hook):
            step(model, x)
    (row,) = [row for row in monitor.rows if row["name"] == "stages.1.1"]
    assert row["gradient_variance"] == pytest.approx(seen["g"].var((0, 2, 3), correction=0).mean().item(), rel=1e-5)


def test_training_is_the_same_and_the_model_comes_back():
    results = []
    for watched in (False, True):
        model, x = network(), torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        if watched:
            with SignalMonitor(model, every=2):
                for _ in range(3):
                    step(model, x, optimizer)
        else:
            for _ in range(3):
                step(model, x, optimizer)
        assert "forward" not in model.__dict__
        results.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_only_training_counts_and_a_loop_may_set_the_step():
    model, x = network(), torch.randn(2, 3, 64, 64)
    with SignalMonitor(model, every=10) as monitor:
        model.eval()
        model(x)
        model.train()
        with torch.no_grad():
            model(x)
        assert monitor.step == 0
        for number in (20, 20, 25, 30):  # twice in one step: accumulated
            monitor.step = number
            step(model, x)
    assert sorted({row["step"] for row in monitor.rows}) == [20, 30]


def test_it_is_detached_after_an_error():
    model = network()
    with pytest.raises(RuntimeError, match="channels"), SignalMonitor(model):
        model(torch.randn(2, 5, 64, 64))
    assert "forward" not in model.__dict__
    step(model, torch.randn(2, 3, 64, 64))


def test_pictures_and_trackers(tmp_path):
    told = []
    model = network()
    monitor = SignalMonitor(model, every=1, log=lambda values, step: told.append((step, values)))
    with pytest.raises(ValueError, match="measured nothing"):
        monitor.draw(tmp_path / "signal.png")
    with monitor:
        step(model, torch.randn(2, 3, 64, 64))
    assert told[0][0] == 0
    assert told[0][1]["signal/stages.0.0/variance"] == monitor.rows[0]["variance"]
    for suffix in ("png", "svg", "html"):
        assert monitor.draw(tmp_path / f"signal.{suffix}").stat().st_size > 1000
    with pytest.raises(ValueError, match="suffix"):
        monitor.draw(tmp_path / "signal.gif")


def test_what_cannot_be_watched():
    with pytest.raises(ValueError, match="every is 0"):
        SignalMonitor(nn.Linear(2, 2), every=0)
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    with pytest.raises(ValueError, match="compiled"):
        SignalMonitor(compiled)


def test_a_step_that_is_not_due_costs_nothing():
    """A measured step may cost as much again as a step: every hundredth is then 1 %."""
    model, x = network(), torch.randn(16, 3, 96, 96)
    step(model, x)

    def seconds(every):
        times = []
        for _ in range(5):
            with SignalMonitor(model, every=every) as monitor:
                monitor.step = 1
                start = time.perf_counter()
                step(model, x)
                monitor.collect()
                times.append(time.perf_counter() - start)
        return sorted(times)[2]

    measured, plain = seconds(1), seconds(100)
    print(f"a measured step takes {measured / plain:.2f} of a step")
    assert measured < 2.5 * plain
