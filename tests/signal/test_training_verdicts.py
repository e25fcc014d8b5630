"""Verdicts on a training: what they say, and that following their remedies ends them."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from normfree.errors import SignalError
from normfree.signal import SignalMonitor
from normfree.signal.training_verdicts import find_training_verdicts
from tests.signal.small_trainings import Residual, everything, trained


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


def run_of(layer=Residual, *, sign=1.0, rate=0.01, of_gate=None, last_rate=None, decay=0.0):
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
    assert any(words in verdict for verdict in run_of(**broken))
    assert not any(words in verdict for verdict in run_of(**mended))


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
