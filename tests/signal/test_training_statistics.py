"""What a monitor measures of a training: zeros, branches, updates; verdicts on them; loggers and frames."""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import polars
import pytest
import torch
from torch import nn

from normfree.errors import SignalError
from normfree.signal import SignalMonitor
from normfree.signal.training_verdicts import find_training_verdicts
from tests.helpers import assert_allclose


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return x + 0.5 * self.act(self.inner(x))


def trained(monitor_of, *, steps=3, optimizer_of=None, loss_of=None, model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Residual(), nn.Flatten(), nn.Linear(256, 2))
    optimizer = (optimizer_of or (lambda parameters: torch.optim.SGD(parameters, 0.1)))(model.parameters())
    x = torch.randn(4, 3, 8, 8)
    with monitor_of(model, optimizer) as monitor:
        for _ in range(steps):
            (loss_of or (lambda out: out.square().mean()))(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, x, monitor


def everything(model, optimizer):
    return SignalMonitor(model, every=1, statistics="all", optimizer=optimizer)


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


# ---- verdicts


def rows(kind, statistic, series, shape="4x4"):
    return [
        {"step": step, "kind": kind, "depth": depth, "name": name, "shape": shape, statistic: value}
        for step in sorted({step for values in series.values() for step in values})
        for depth, (name, values) in enumerate(series.items())
        for value in [values[step]]
    ]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (rows("rectifier", "dead", {"a": {0: 0, 1200: 0, 2400: 0}, "layer3.4": {0: 0, 1200: 0.3, 2400: 0.4}}),
         "channels of layer3.4 died from step 1,200 on: 40% are zero for the whole batch at step 2,400"),
        (rows("rectifier", "dead", {"a": {0: 0.2, 100: 0.2}, "b": {0: 0.2, 100: 0.2}}),
         "channels of a died from step 0 on, the first of 2 rectifiers"),
        (rows("parameter", "update_ratio", {"stem": {0: 1e-3, 50: 1e-4}, "fc": {0: 1e-3, 50: 3.1e-3}}),
         "fc moves 31 times as much as stem, relative to their sizes, from step 50 on"),
        (rows("parameter", "update_ratio", {"stem": {0: 0.2, 50: 0.3}}), "stem by more than a tenth .* from step 0 on"),
        (rows("join", "variance", {"a": {0: 1, 50: 1}, "b": {0: 1, 50: 1e3}}), "passes 100 at b from step 50 on"),
        (rows("join", "variance", {"a": {0: 1, 50: 1}, "b": {0: 1, 50: 1e-3}}), "below 0.01 at b from step 50 on"),
        (rows("weight layer", "variance", {"a": {0: 1}, "b": {0: 1e3}}), "passes 100 at b from step 0 on"),
        (rows("weight layer", "variance", {"a": {0: 1}, "b": {0: 1e-3}}), "below 0.01 at b from step 0 on"),
        (rows("join", "variance", {"a": {0: 1, 50: 1}, "b": {0: 1, 50: math.nan}}), "not finite at b at step 50"),
        (rows("join", "branch_to_stream", {"a": {0: 1e-3, 50: 1e-3}}), "branch of a adds less than a hundredth"),
    ],
)  # fmt: skip
def test_verdicts_name_the_place_and_the_step(found, words):
    (verdict,) = find_training_verdicts(found)
    assert re.search(words, verdict)
    assert verdict.remedy
    page, section = verdict.page.split("#")
    headings = re.findall(r"^#+ (.*)$", (Path("docs") / page).read_text(), flags=re.MULTILINE)
    assert section in {heading.lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "found",
    [
        rows("rectifier", "dead", {"a": {0: 0.5, 50: 0.0}}),  # it came back
        rows("join", "branch_to_stream", {"a": {0: 0.0}}),  # SkipInit begins closed
        rows("parameter", "update_ratio", {"bias": {0: 1e-3}, "fc": {0: 0.0}}, shape="4"),
        rows("join", "variance", {"a": {0: 1, 50: 2}}),
        [],
    ],
)
def test_nothing_is_said_of_what_is_well(found):
    assert find_training_verdicts(found) == []


class Gated(nn.Module):
    """A residual block whose branch has a gate that is learned."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x + self.gate * torch.relu(self.inner(x))


def small(*layers):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(256, 2))


def run_of(layer, *, sign=1.0, rate=0.01, of_gate=None, last_rate=None, decay=0.0):
    """Train on the size of the output, made small or, with sign=-1, large; gate and classifier have their own rates."""
    torch.manual_seed(0)
    model = small(layer())
    gates = [p for name, p in model.named_parameters() if name.endswith("gate")]
    last = list(model[-1].parameters())
    others = [p for p in model.parameters() if not any(p is q for q in gates + last)]
    groups = [
        {"params": others, "weight_decay": decay},
        {"params": last, "lr": last_rate or rate},
        {"params": gates, "weight_decay": of_gate or 0.0},
    ]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]], rate)
    x = torch.randn(4, 3, 8, 8)
    with everything(model, optimizer) as monitor:
        for _ in range(12):
            (sign * model(x).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return monitor.verdicts


@pytest.mark.parametrize(
    ("words", "broken", "mended"),
    [
        ("not finite", {"rate": 1e9}, {}),
        ("passes 100", {"sign": -1.0, "rate": 0.02}, {"sign": -1.0, "rate": 1e-3}),
        ("passes 100", {"sign": -1.0, "rate": 0.02, "layer": nn.ReLU}, {"sign": -1.0, "rate": 1e-3, "layer": nn.ReLU}),
        ("falls below", {"decay": 40.0}, {}),
        ("falls below", {"decay": 40.0, "layer": nn.ReLU}, {"rate": 1e-3, "layer": nn.ReLU}),
        ("died from step", {"rate": 0.3, "layer": nn.ReLU}, {"rate": 1e-3, "layer": nn.ReLU}),
        ("adds less than a hundredth", {"layer": Gated, "of_gate": 60.0}, {"layer": Gated}),
        ("by more than a tenth of its size", {"sign": -1.0}, {"sign": -1.0, "rate": 1e-3}),
        ("times as much as", {"rate": 1e-5, "last_rate": 0.01}, {}),
    ],
)  # fmt: skip
def test_a_training_that_goes_wrong_is_told_and_following_the_remedy_ends_it(words, broken, mended):
    assert any(words in verdict for verdict in run_of(broken.pop("layer", Residual), **broken))
    assert not any(words in verdict for verdict in run_of(mended.pop("layer", Residual), **mended))


def test_check_raises_at_the_first_place_outside_a_limit():
    _, _, monitor = trained(everything)
    monitor.check(max_variance=100, max_dead=1.0, max_update_ratio=10, max_update_spread=1e6)
    for limit in ({"max_variance": 1e-9}, {"max_dead": -1.0}, {"max_update_ratio": 1e-12}, {"max_update_spread": 1.0}):
        with pytest.raises(SignalError, match="at step 2, above"):
            monitor.check(**limit)
    _, _, bare = trained(lambda model, _: SignalMonitor(model, every=1))
    with pytest.raises(SignalError, match="dead was not measured"):
        bare.check(max_dead=0.1)
    with pytest.raises(SignalError, match="nothing yet"):
        SignalMonitor(nn.Linear(2, 2)).check(max_variance=1)


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
