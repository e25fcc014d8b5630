"""Measuring never breaks what it watches: empty, scalar and sparse tensors, subclasses, threads, checkpointing."""

import threading
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normfree
from normfree import characterize, convert
from normfree.trace import recorder
from normfree.trace.tape import Tape
from normfree.trace.watched import run_watched
from normfree.training import SignalMonitor

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Odd(nn.Module):
    """A residual network that does something odd beside it."""

    def __init__(self, odd):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branch, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.odd = odd

    def forward(self, x):
        h = self.norm(self.stem(x)).relu()
        h = h + self.branch(h)
        return self.head(h.mean((2, 3))) + self.odd(self, h)


def empty_sum(self, h):
    chosen = h.mean((2, 3))[h.mean((1, 2, 3)) > 1e9]
    return (chosen + chosen * 2).sum() + self.head(chosen).sum()


def sparse_sum(self, h):
    rows = h.mean((2, 3)).to_sparse()
    return (rows + rows).to_dense().sum()


ODD = {
    "zero times a scalar": lambda self, h: 0 * self.head(h.mean((2, 3))).sum(),
    "scalars added": lambda self, h: h.sum() + h.mean(),
    "empty": empty_sum,
    "sparse": sparse_sum,
    "complex": lambda self, h: (torch.fft.fft2(h) + torch.fft.fft2(h)).real.mean(),
    "integers": lambda self, h: (h.argmax(1) + h.argmin(1)).sum() * 0.0,
    "half": lambda self, h: (h.half() + h.half()).float().mean(),
    "a list": lambda self, h: torch.cat([h.mean((2, 3)).split(4, 1)[0][:0], h.mean((2, 3))[:, :4]]).sum(),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_odd_tensors_are_passed_over(odd):
    torch.manual_seed(0)
    plain = characterize(Odd(lambda self, h: 0.0), IMAGES)
    torch.manual_seed(0)
    model = Odd(odd)
    found = characterize(model, IMAGES)
    assert [record.variance for record in found] == [record.variance for record in plain]
    assert not convert(model, IMAGES).kept
    with SignalMonitor(model, every=1) as monitor:
        model(IMAGES).sum().backward()
    assert len(monitor.rows) == 1


def test_a_failure_of_the_measurement_is_said_once_and_the_run_goes_on(monkeypatch):
    def failing(x, axis=None):
        if x.ndim == 2:
            raise ZeroDivisionError("by mistake")
        return statistics(x, axis)

    statistics = recorder.channel_statistics
    torch.manual_seed(0)
    model = Odd(lambda self, h: self.head(h.amax((2, 3))) + h.mean((2, 3))[:, :4])
    monkeypatch.setattr(recorder, "channel_statistics", failing)
    said = r"the measurement, not the model, failed at add \(ZeroDivisionError: by mistake\)"
    with pytest.warns(UserWarning, match=said) as caught:
        report = characterize(model, IMAGES)
    assert len(report) == 1
    assert len([w for w in caught if "measurement" in str(w.message)]) == 1


class TensorImage(torch.Tensor):
    """As fastai's batches."""


def test_subclasses_of_tensors_are_measured_as_what_they_are():
    torch.manual_seed(0)
    model = timm.create_model("resnet18")
    plain, found = characterize(model, IMAGES), characterize(model, IMAGES.as_subclass(TensorImage))
    assert [(r.name, r.variance) for r in found] == [(r.name, r.variance) for r in plain]
    assert not convert(model, IMAGES.as_subclass(TensorImage)).kept


def test_threads_measure_one_model_one_after_the_other():
    torch.manual_seed(0)
    model = timm.create_model("resnet18")
    expected, found = characterize(model, IMAGES), []
    threads = [threading.Thread(target=lambda: found.append(characterize(model, IMAGES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([r.variance for r in report] == [r.variance for r in expected] for report in found)
    assert len(found) == 4
    assert model.training
    assert model.bn1.running_var is not None


@pytest.mark.parametrize("layout", ["dense", "coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_inputs(layout):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 10)

        def forward(self, x, adjacency):
            return x + torch.sparse.mm(adjacency, self.layer(x))

    torch.manual_seed(0)
    model, x = Graph(), torch.randn(20, 10)
    dense = (torch.rand(20, 20) > 0.8).float()
    given = {"dense": dense, "coo": dense.to_sparse(), "csr": dense.to_sparse_csr()}[layout]
    (record,) = characterize(model, (x, given))
    expected = (x + dense @ model.layer(x)).var(0, correction=0).mean().item()
    assert record.variance == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_gradients(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            h = self.stem(x)
            return h + checkpoint(self.branch, h, use_reentrant=reentrant)

    torch.manual_seed(0)
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (record,) = characterize(model, IMAGES, backward=True)
    assert record.gradient_variance == pytest.approx(1, abs=0.1)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_conversions_inside_inference_mode_are_those_outside():
    torch.manual_seed(0)
    model = timm.create_model("resnet18")
    with torch.inference_mode():
        inside = normfree.convert(model, IMAGES)
    outside = normfree.convert(model, IMAGES)
    assert [(c.path, c.action, c.note) for c in inside.changes] == [(c.path, c.action, c.note) for c in outside.changes]
    inside.model(IMAGES).sum().backward()
    assert inside.model.conv1.gain.grad is not None


class TablesBesideASignal(nn.Module):
    """Constants of torch.tensor, in memory where a tensor was that the signal was written into."""

    def forward(self, x):
        for _ in range(20):
            y = x + 1
            y.mul_(2)
            del y
            torch.tensor([1.0] * 64).neg()
        return x.exp()


def test_what_torch_tensor_makes_is_never_the_signal_that_was_there_before():
    model, tape = TablesBesideASignal(), Tape()
    run_watched(model, tape, (torch.ones(1, 64),), {})
    assert "neg" not in {node.op for node in tape.nodes}
