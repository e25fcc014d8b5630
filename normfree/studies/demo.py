"""The paper's central figure: what normalization does to the signal, and what replaces it."""

import functools
from collections.abc import Callable

from normfree.images import batch_function
from normfree.models import create_model
from normfree.signal import SignalReport, characterize
from normfree.trace.inputs import input_shape, noise


def networks(depth: int) -> tuple[str, ...]:
    """With BatchNorm; with nothing; scaled but not standardized; normalizer-free."""
    return (
        f"bn_resnet{depth}",
        f"unnormalized_resnet{depth}",
        f"nf_resnet{depth}_unstandardized",
        f"nf_resnet{depth}",
    )


def signal_propagation(
    depth: int = 50, *, seeds: int = 3, batch: int = 4, advance: Callable[[str], None] = lambda _: None
) -> dict[str, list[SignalReport]]:
    """Reports of four ResNets at initialisation, by input: white noise, photographs (Brock et al. 2021, figures 1–3).

    `advance` is called with what comes next, 8 times. Raises ValueError for a depth that the paper does not have.
    """
    photos = batch_function("photos", batch, input_shape)
    draw = {"white noise": lambda model: noise(model, batch), "photographs": photos}
    reports: dict[str, list[SignalReport]] = {label: [] for label in draw}
    for label, inputs in draw.items():
        for name in networks(depth):
            advance(f"{name} on {label}")
            reports[label].append(characterize(functools.partial(create_model, name), inputs, seeds=seeds, name=name))
    return reports
