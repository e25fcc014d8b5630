"""Effective weights that inference keeps between calls, until something that they are computed from has changed."""

import functools
from typing import Any

import torch
from torch import Tensor

from normfree.nn.scaled_layer import ScaledWS
from normfree.nn.standardization import Effective

# Inference keeps weights of at least so many elements: to see that they are as before takes a fifth of the time.
_KEPT = 2**16


class KeptWeights:
    """The effective weights that inference keeps between calls.

    Versions of tensors do not tell whether one has changed, since what writes to `parameter.data` leaves them as they
    are: a probe of the contents does.
    """

    def __init__(self) -> None:
        self.kept: dict[ScaledWS, tuple[Tensor, Effective]] = {}

    def unchanged(self, probes: dict[ScaledWS, Tensor]) -> dict[ScaledWS, Effective]:
        """Return those of which everything that they were computed from is as it was."""
        return {
            layer: self.kept[layer][1]
            for layer, probe in probes.items()
            if layer in self.kept and torch.equal(self.kept[layer][0], probe)
        }

    def add(self, computed: dict[ScaledWS, Effective], probes: dict[ScaledWS, Tensor]) -> None:
        """Keep those that have a probe."""
        self.kept.update(
            (layer, (probes[layer], effective)) for layer, effective in computed.items() if layer in probes
        )


def probes_of(sources_of: dict[ScaledWS, tuple[Any, ...]]) -> dict[ScaledWS, Tensor]:
    """Return a probe of each layer whose weight is large enough to be kept, from all that it is computed from.

    Not on a GPU, where to look at a probe is to wait for all that has been launched.
    """
    return {
        layer: _probe(layer, sources)
        for layer, sources in sources_of.items()
        if sources[0].is_cpu and sources[0].numel() >= _KEPT
    }


def _probe(layer: ScaledWS, sources: tuple[Any, ...]) -> Tensor:
    """Return numbers that change with the weight, by more than rounding, and all else that is a factor."""
    rows = layer.filters(sources[0]).flatten(1)
    return torch.cat(
        [rows.mv(_direction(rows.shape[1], rows.dtype)), *(t.view(-1) for t in sources[1:] if t is not None)]
    )


@functools.cache
def _direction(size: int, dtype: torch.dtype) -> Tensor:
    """Return numbers between 1/2 and 3/2, no two alike: no two weights can change places unseen."""
    with torch.inference_mode(False):
        return torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=dtype) + 0.5
