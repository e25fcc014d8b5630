"""The demonstration: the paper's central figure, and three networks trained four images at a time."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from normfree.errors import NotFiniteError
from normfree.images import batch_function
from normfree.models import create_model
from normfree.plotting import COLORS, altair
from normfree.signal import SignalReport, characterize
from normfree.trace.inputs import input_shape, noise
from normfree.training import RECIPES, train
from normfree.training.run.curves import read_curves

TRAINED: dict[str, tuple[str, tuple[str, ...]]] = {
    "BatchNorm": ("bn_resnet26", ()),
    "nothing": ("unnormalized_resnet26", ()),
    "normalizer-free": ("nf_resnet26", ("skip_gain=null",)),
}
"""Networks that are trained: name -> model and its arguments."""

BATCH = 4
"""Images of a training step."""


def propagation_networks(depth: int) -> tuple[str, ...]:
    """Name the networks of the figure: BatchNorm; nothing; scaled but not standardized; normalizer-free."""
    return (
        f"bn_resnet{depth}",
        f"unnormalized_resnet{depth}",
        f"nf_resnet{depth}_unstandardized",
        f"nf_resnet{depth}",
    )


def measure_propagation(
    depth: int = 50, *, seeds: int = 3, batch: int = 4, advance: Callable[[str], None] = lambda _: None
) -> dict[str, list[SignalReport]]:
    """Characterize four ResNets at initialisation, on white noise and on photographs (Brock et al. 2021, figures 1–3).

    `advance` is called with what comes next, 8 times. Returns reports by input. Raises ValueError for a depth that the
    paper does not have.
    """
    photos = batch_function("photos", batch, input_shape)
    draw = {"white noise": lambda model: noise(model, batch), "photographs": photos}
    reports: dict[str, list[SignalReport]] = {label: [] for label in draw}
    for label, inputs in draw.items():
        for name in propagation_networks(depth):
            advance(f"{name} on {label}")
            reports[label].append(characterize(functools.partial(create_model, name), inputs, seeds=seeds, name=name))
    return reports


def train_small_batches(*, epochs: int = 2, advance: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Train narrow ResNet-26s alike on digits, in batches of four, and test them after every epoch.

    Returns dictionaries of network, epoch and accuracy; a network whose loss is not finite has no more of them.
    `advance` is called with what comes next, three times.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, arguments) in TRAINED.items():
            advance(f"{name} on batches of {BATCH}")
            recipe = dataclasses.replace(
                RECIPES["digits"], model=model, model_args=("width=0.25", *arguments), batch=BATCH, epochs=epochs,
                lr=0.4, log_every=100,
            )  # fmt: skip
            run = Path(folder) / name
            with contextlib.suppress(NotFiniteError):
                train(recipe, run, quiet=True)
            tested = [point for point in read_curves(run) if (point["of"], point["what"]) == ("test", "top1")]
            found += [
                {"network": name, "epoch": epoch, "accuracy": point["value"]}
                for epoch, point in enumerate(tested, start=1)
            ]
    return found


def accuracy_panel(found: list[dict[str, Any]]) -> Any:
    """Draw an Altair chart of what `train_small_batches` found, a curve per network."""
    alt = altair()
    # The colours that these networks have in the signal's panels, of which the third is scaled only.
    color = alt.Color("network:N", title=None, sort=list(TRAINED)).scale(
        domain=list(TRAINED), range=[COLORS[0], COLORS[1], COLORS[3]]
    )
    title = alt.Title(f"Trained on digits, {BATCH} images at a time", anchor="start", fontSize=13)
    return (
        alt.Chart(alt.Data(values=found), width=300, height=220, title=title)
        .mark_line(point=True)
        .encode(
            x=alt.X("epoch:O", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("accuracy:Q", title="Test accuracy, %").scale(domain=[0, 100]),
            color=color,
        )
    )
