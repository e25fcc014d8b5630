"""Signal of live training batches."""

import copy
import csv
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack

from normfree import characterize, create_model, fold
from normfree.errors import TrainingError
from normfree.training import SignalMonitor
from tests.helpers import assert_allclose


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
    for row, record in zip(monitor.rows[: len(expected)], expected, strict=True):
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
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
    plain, watched = results
    for name, value in plain.items():
        assert_allclose(watched[name], value, rtol=1e-4, atol=1e-6, what=name)


def test_without_joins_weight_layers_are_measured():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(4, 3, 8, 8)
    with SignalMonitor(model, every=2) as monitor:
        for _ in range(3):
            step(model, x)
    assert [(row["step"], row["name"]) for row in monitor.rows] == [(s, n) for s in (0, 2) for n in ("0", "4")]
    assert all(row["variance"] > 0 and row["gradient_variance"] > 0 for row in monitor.rows)
    expected = characterize(model, x)
    assert [record.name for record in expected] == ["0", "4"]


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
    assert not model._forward_hooks
    step(model, torch.randn(2, 3, 64, 64))


def test_an_interrupted_forward_pass_leaves_nothing_behind():
    model, x = network(), torch.randn(2, 3, 64, 64)

    def interrupt(*_):
        raise KeyboardInterrupt

    monitor = SignalMonitor(model)
    with model.stages[1][0].register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt), monitor:
        model(x)
    assert monitor.rows == []
    assert _len_torch_dispatch_stack() == 0
    step(model, x)


def test_copies_made_meanwhile_are_networks_of_their_own(tmp_path):
    """Averaged weights, the best so far, a saved or a folded model."""
    model, x = network(), torch.randn(2, 3, 64, 64)
    with SignalMonitor(model, path=tmp_path / "signal.csv") as monitor:
        step(model, x)
        expected = model.eval()(x)
        torch.save(model, tmp_path / "model.pt")
        saved = torch.load(tmp_path / "model.pt", weights_only=False)
        copies = [copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model), saved, fold(model)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        for other in copies:
            assert_allclose(other(x), expected, atol=1e-4, what=type(other).__name__)
        copies[0].train()(x)
    assert monitor.step == 1


def test_a_pass_is_over_when_its_gradients_have_come():
    """Two views of each image: two forward passes, one backward pass."""
    model, x = network(), torch.randn(4, 3, 64, 64)
    with SignalMonitor(model, every=4) as monitor:
        for _ in range(3):
            (model(x) + model(x + 1)).square().sum().backward()
    assert {row["step"] for row in monitor.rows} == {0, 4}
    assert all(row["gradient_variance"] > 0 for row in monitor.rows)


def test_a_training_that_goes_on_keeps_what_was_measured(tmp_path):
    model, x = network(), torch.randn(2, 3, 64, 64)
    path = tmp_path / "signal.csv"
    for start in (0, 2):
        with SignalMonitor(model, every=1, path=path, step=start) as monitor:
            for _ in range(3):
                step(model, x)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["step"] for row in rows if row["depth"] == "0"] == ["0", "1", "2", "3", "4"]
    assert len(monitor.rows) == len(rows)
    path.write_text("step,loss\n1,2.0\n")
    with pytest.raises(TrainingError, match="another place"), SignalMonitor(model, path=path):
        pytest.fail("a table of something else was taken for a signal")
    assert path.read_text() == "step,loss\n1,2.0\n"


def test_the_network_that_a_compiled_one_was_made_from_is_watched():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.layer(x).relu()

    model, x = Residual(), torch.randn(8, 4)
    compiled = torch.compile(model, backend="eager")
    with SignalMonitor(model, every=2) as monitor:
        for _ in range(3):
            step(compiled, x)
    assert [row["step"] for row in monitor.rows] == [0, 2]
    assert monitor.rows[0]["variance"] == pytest.approx(model(x).var(0, correction=0).mean().item(), rel=1e-5)
    assert monitor.rows[0]["gradient_variance"] > 0


def test_it_draws_pictures_and_tells_trackers(tmp_path):
    told = []
    model = network()
    monitor = SignalMonitor(model, every=1)
    monitor.on_record(lambda numbers, step: told.append((step, numbers)))
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


def test_no_interval_below_1_and_no_compiled_network():
    with pytest.raises(ValueError, match="every is 0"):
        SignalMonitor(nn.Linear(2, 2), every=0)
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    with pytest.raises(ValueError, match="compiled"):
        SignalMonitor(compiled)


def operations(model, x):
    """How often each operation runs in a step."""
    counts = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[func._schema.name] += 1
            return func(*args, **(kwargs or {}))

    model.zero_grad()
    with Watch():
        step(model, x)
    return counts


def test_steps_between_measurements_are_not_touched_and_a_measured_one_runs_no_second_pass():
    model, x, seen = network(), torch.randn(2, 3, 64, 64), []

    def look(module, inputs, output):
        hooks = len(module_hooks._global_forward_hooks) + len(module_hooks._global_forward_pre_hooks)
        seen.append((_len_torch_dispatch_stack() - 1, hooks))  # one mode is the test's

    model.stages[1][0].register_forward_hook(look)
    inside = [module for module in model.modules() if module is not model]
    attached = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in inside]
    expected = operations(model, x)
    assert expected["aten::convolution"] > 25
    with SignalMonitor(model, every=3) as monitor:
        for number in range(5):
            found = operations(model, x)
            if number % 3:
                assert found == expected, f"step {number}: {found - expected} more, {expected - found} fewer"
            else:
                assert sum((found - expected).values()) > 0, f"step {number}"
                for name in ("aten::convolution", "aten::convolution_backward"):
                    assert found[name] == expected[name], f"step {number}: {found[name]} {name}"
            assert attached == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in inside]
            monitor.collect()
    nothing = (0, 0)
    assert seen == [nothing, (1, 2), nothing, nothing, (1, 2), nothing]
    assert sorted({row["step"] for row in monitor.rows}) == [0, 3]
