"""What a monitor measures of a training: zeros, branches, updates; loggers and frames."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import polars
import pytest
import torch
from torch import nn

from normfree.signal import SignalMonitor
from tests.helpers import assert_allclose
from tests.signal.small_trainings import Residual, everything, trained


def test_numbers_are_those_of_their_definitions():
    seen = {}

    def watched(model, optimizer):
        def keep(module, inputs, output):
            if "zeros" not in seen:
                x, (inner,) = model[0].out, inputs
                rectified = inner.clamp_min(0)
                seen["zeros"] = (rectified == 0).double().mean().item()
                seen["dead"] = (rectified.amax((0, 2, 3)) == 0).double().mean().item()
                seen["branch"] = (0.5 * rectified).square().mean().sqrt().item() / x.square().mean().sqrt().item()

        model[0].register_forward_hook(lambda module, _, out: setattr(module, "out", out.detach()))
        model[1].act.register_forward_pre_hook(
            lambda module, inputs: keep(module, [i.detach().clone() for i in inputs], 0)
        )
        seen["before"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return everything(model, optimizer)

    def first_gradients(optimizer_parameters):
        optimizer = torch.optim.SGD(optimizer_parameters, 0.1, momentum=0.9)

        def keep(optimizer, *_):
            seen.setdefault("gradients", [p.grad.clone() for p in optimizer.param_groups[0]["params"]])

        optimizer.register_step_pre_hook(keep)
        return optimizer

    _, _, monitor = trained(watched, optimizer_of=first_gradients)
    first = {(row["kind"], row["name"]): row for row in monitor.rows if row["step"] == 0}
    assert first["rectifier", "1.act"]["zeros"] == pytest.approx(seen["zeros"])
    assert first["rectifier", "1.act"]["dead"] == seen["dead"]
    assert first["join", "1"]["branch_to_stream"] == pytest.approx(seen["branch"], rel=1e-5)
    for (name, before), gradient in zip(seen["before"].items(), seen["gradients"], strict=True):
        row = first["parameter", name]
        rms = gradient.square().mean().sqrt().item()
        assert row["gradient_rms"] == pytest.approx(rms, rel=1e-5)
        assert row["update_ratio"] == pytest.approx(0.1 * rms / before.square().mean().sqrt().item(), rel=1e-3)
        assert row["shape"] == "x".join(map(str, before.shape))


def test_training_is_the_same_with_everything_watched():
    watched = trained(everything)[0]
    alone = trained(lambda model, _: SignalMonitor(model, every=10**6))[0]
    for (name, one), other in zip(watched.named_parameters(), alone.parameters(), strict=True):
        assert_allclose(one, other, atol=1e-6, what=name)


@pytest.mark.parametrize(
    ("act", "counts"),
    [
        (nn.ReLU(), True), (nn.ReLU6(), True), (nn.Hardtanh(0.0, 2.0), True), (nn.Threshold(0.0, 0.0), True),
        (nn.Hardtanh(), False), (nn.Threshold(0.5, 1.0), False), (nn.GELU(), False), (nn.LeakyReLU(), False),
    ],
    ids=str,
)  # fmt: skip
def test_rectifiers_are_known_by_what_they_do(act, counts):
    model = nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 2))
    with SignalMonitor(model, every=1, statistics=["zeros", "dead"]) as monitor:
        x = torch.randn(16, 6)
        model(x)
    hidden = act(model[0](x))
    assert [row["name"] for row in monitor.rows] == (["1"] if counts else [])
    assert all(row["zeros"] == (hidden == 0).float().mean() for row in monitor.rows)


def test_what_is_not_asked_for_is_not_measured():
    _, _, monitor = trained(lambda model, optimizer: SignalMonitor(
        model, every=2, statistics="update_ratio", optimizer=optimizer, names=["3.*", "*.inner.weight"]))  # fmt: skip
    assert {(row["step"], row["name"]) for row in monitor.rows} == {
        (step, name) for step in (0, 2) for name in ("1.inner.weight", "3.weight", "3.bias")
    }
    assert all(set(row) == {"step", "kind", "depth", "name", "shape", "update_ratio"} for row in monitor.rows)
    assert monitor._reader is None  # no tape was made
    _, _, monitor = trained(lambda model, _: SignalMonitor(model, every=1, statistics=["variance"], names="1"))
    assert {tuple(row)[6:] for row in monitor.rows} == {("variance",)}


def test_a_step_of_several_passes_is_read_when_it_is_taken():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with SignalMonitor(model, every=2, statistics="all", optimizer=[optimizer]) as monitor:
        for number in range(4):
            for _ in range(3):
                monitor.step = number
                model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [(row["step"], row["name"]) for row in monitor.rows if "update_ratio" in row] == [
        (0, "weight"), (0, "bias"), (2, "weight"), (2, "bias"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"statistics": ["variances"]}, ValueError, "choose from squared_mean"),
        ({"statistics": []}, ValueError, "choose from"),
        ({"statistics": ["update_ratio"]}, ValueError, "need the optimizer"),
        ({"statistics": "all", "optimizer": nn.Linear(2, 2)}, TypeError, "optimizer is a Linear"),
        ({"names": 3}, TypeError, "names is 3"),
        ({"names": []}, ValueError, "names is empty"),
        (
            {"statistics": "all", "optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)},
            ValueError,
            "no parameter of this model",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        SignalMonitor(nn.Linear(2, 2), **arguments)


def test_an_optimizer_that_calls_the_model_is_not_disturbed():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    with SignalMonitor(model, every=1, statistics="all", optimizer=optimizer) as monitor:
        for _ in range(3):
            optimizer.step(closure)
    assert closure().item() < first
    assert {row["name"] for row in monitor.rows} == {"Linear"}


# ---- loggers and frames


def test_frames_of_whichever_package_is_there(monkeypatch):
    _, _, monitor = trained(everything)
    frame = monitor.to_frame()
    assert isinstance(frame, polars.DataFrame)
    assert frame.height == len(monitor.rows)
    assert frame.filter(polars.col("kind") == "join")["variance"].to_list() == [
        row["variance"] for row in monitor.rows if row["kind"] == "join"
    ]
    made = []
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda columns: made.append(columns)))
    monkeypatch.setitem(sys.modules, "polars", None)
    monitor.to_frame()
    assert made[0]["step"] == [row["step"] for row in monitor.rows]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pandas or polars"):
        monitor.to_frame()


def test_tensorboard_and_wandb_get_every_number(tmp_path, monkeypatch):
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.chdir(tmp_path)
    writer, told = SummaryWriter("logs"), []
    run = wandb.init(project="test", mode="offline", settings=wandb.Settings(silent=True))

    def monitored(model, optimizer):
        monitor = everything(model, optimizer)
        monitor.on_record(lambda numbers, step: [writer.add_scalar(name, x, step) for name, x in numbers.items()])
        monitor.on_record(lambda numbers, step: run.log(dict(numbers), step=step))
        monitor.on_record(lambda numbers, step: told.append((step, numbers)))
        return monitor

    trained(monitored)
    writer.close()
    run.log({}, step=3)  # which closes the step before
    assert run.summary["signal/1/variance"] == pytest.approx(told[-1][1]["signal/1/variance"])
    run.finish()
    events = EventAccumulator("logs").Reload()
    name = "signal/3.weight/update_ratio"
    assert [event.step for event in events.Scalars(name)] == [0, 1, 2]
    assert events.Scalars(name)[1].value == pytest.approx(told[1][1][name], rel=1e-5)
    with pytest.raises(TypeError, match="callback is a str"):
        SignalMonitor(nn.Linear(2, 2)).on_record("print")


@pytest.fixture
def accelerate_as_it_was():
    """Take back what a Trainer sets for its whole process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate_as_it_was")
def test_transformers_trainer_is_watched_by_the_documents_callback(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Residual(), nn.Flatten(), nn.Linear(256, 2))

        def forward(self, images, labels):
            logits = self.body(images)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    text = Path("docs/training.md").read_text()
    (block,) = [
        block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "TrainerCallback" in block
    ]
    namespace = {"SignalMonitor": SignalMonitor}
    exec(block, namespace)
    callback = namespace["SignalCallback"]()
    generator = torch.Generator().manual_seed(0)
    data = [{"images": torch.randn(3, 8, 8, generator=generator), "labels": i % 2} for i in range(16)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(Classifier(), arguments, train_dataset=data, callbacks=[callback]).train()
    found = callback.monitor.rows
    assert {row["step"] for row in found} == {0}
    assert {row["kind"] for row in found} == {"join", "rectifier", "parameter"}
    assert {row["name"] for row in found if row.get("update_ratio")} >= {"body.0.weight", "body.3.weight"}


def test_lightnings_hooks_watch_by_the_documents_callback():
    text = Path("docs/training.md").read_text()
    block = re.search(r"^    from lightning.pytorch import Callback\n\n((?:    .*\n|\n)+)", text, flags=re.MULTILINE)
    source = "\n".join(line.removeprefix("    ") for line in block.group(1).splitlines())
    namespace = {"Callback": object, "SignalMonitor": SignalMonitor}
    exec(source, namespace)
    callback, network = namespace["SignalCallback"](), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    trainer = SimpleNamespace(optimizers=[optimizer], global_step=100)
    module = SimpleNamespace(network=network)
    callback.on_train_start(trainer, module)
    for number in range(2):
        callback.on_train_batch_start(trainer, module, None, number)
        network(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        trainer.global_step += 1
    callback.on_train_end(trainer, module)
    assert {row["step"] for row in callback.monitor.rows} == {100}
    assert {row["kind"] for row in callback.monitor.rows} == {"weight layer", "rectifier", "parameter"}
