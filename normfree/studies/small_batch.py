"""What the demonstration trains: three networks, four images at a time."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from normfree.errors import NotFiniteError
from normfree.plotting import COLORS, altair
from normfree.training import RECIPES, train
from normfree.training.run.curves import points

NETWORKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "BatchNorm": ("bn_resnet26", ()),
    "nothing": ("unnormalized_resnet26", ()),
    "normalizer-free": ("nf_resnet26", ("skip_gain=null",)),
}
BATCH = 4


def small_batch(*, epochs: int = 2, advance: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Test accuracy on the digits after every epoch of narrow ResNet-26s, trained alike on batches of four.

    Dictionaries of network, epoch and accuracy. `advance` is called with what comes next, three times. A network whose
    loss is not finite has no more points.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (model, arguments) in NETWORKS.items():
            advance(f"{name} on batches of {BATCH}")
            recipe = dataclasses.replace(
                RECIPES["digits"], model=model, model_args=("width=0.25", *arguments), batch=BATCH, epochs=epochs,
                lr=0.4, log_every=100,
            )  # fmt: skip
            run = Path(folder) / name
            with contextlib.suppress(NotFiniteError):
                train(recipe, run, quiet=True)
            tested = [point for point in points(run) if (point["of"], point["what"]) == ("test", "top1")]
            found += [
                {"network": name, "epoch": epoch, "accuracy": point["value"]}
                for epoch, point in enumerate(tested, start=1)
            ]
    return found


def panel(found: list[dict[str, Any]]) -> Any:
    """An Altair chart of what `small_batch` found, a curve per network."""
    alt = altair()
    # The colours that these networks have in the signal's panels, of which the third is scaled only.
    color = alt.Color("network:N", title=None, sort=list(NETWORKS)).scale(
        domain=list(NETWORKS), range=[COLORS[0], COLORS[1], COLORS[3]]
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
