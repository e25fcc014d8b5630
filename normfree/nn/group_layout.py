"""Layout of a group of layers: what is the same in every step, so that it is found out but once."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Weights of fewer elements are standardized together, where their filters are of one shape, and always kept.
SMALL = 2**15


class _Layer(NamedTuple):
    """Description of a layer."""

    shape: torch.Size
    joins: bool  # whether its filters can be standardized together with others of their shape
    has_bias: bool
    has_skip_gain: bool
    in_scale: float
    out_scale: float
    eps: float


class Multipliers:
    """Factors of joined vectors, one vector per layer: a constant for each element, and a skip gain for some."""

    def __init__(
        self, sizes: Sequence[int], numbers: Sequence[float], owners: Sequence[int], dtype: torch.dtype
    ) -> None:
        """Spread a number over the elements of each vector, and the place of its skip gain among the joined ones."""
        self.sizes = sizes
        each = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        self.constant = torch.tensor(numbers, dtype=dtype, device="cpu").repeat_interleave(each)
        self.owner = torch.tensor(owners, dtype=torch.int64, device="cpu").repeat_interleave(each)

    def times(self, skip_gains: Tensor | None) -> Tensor:
        """Return the product of both for each element."""
        return self.constant if skip_gains is None else self.constant * skip_gains.index_select(0, self.owner)

    def split(self, joined: Tensor) -> Sequence[Tensor]:
        """Return the vectors of a joined one."""
        return joined.split_with_sizes(self.sizes)


class Layout:
    """Kernels that small weights share, and what gains and biases are multiplied by.

    Filters of all layers are joined in the order of `order`; `members` are the layers of each kernel, `filters` its
    number of filters. `skipping` are the layers with a skip gain, `biased` those whose bias is multiplied.
    """

    def __init__(self, dtype: torch.dtype, layers: Sequence[_Layer]) -> None:
        alike: dict[Any, list[int]] = {}
        for index, layer in enumerate(layers):
            alike.setdefault((layer.shape[1:], layer.eps) if layer.joins else index, []).append(index)
        self.members = list(alike.values())
        self.order = list(itertools.chain.from_iterable(self.members))
        self.filters = [sum(layers[i].shape[0] for i in members) for members in self.members]
        self.skipping = [index for index, layer in enumerate(layers) if layer.has_skip_gain]
        self.one = torch.ones(1, dtype=dtype, device="cpu")  # the skip gain of layers that have none
        # A bias that nothing multiplies is its own effective bias.
        self.biased = [
            index
            for index, layer in enumerate(layers)
            if layer.has_bias and (layer.has_skip_gain or layer.out_scale != 1)
        ]
        places = {index: place for place, index in enumerate(self.skipping)}

        def multipliers(chosen: Sequence[int], numbers: Sequence[float]) -> Multipliers:
            owners = [places.get(i, len(places)) for i in chosen]
            return Multipliers([layers[i].shape[0] for i in chosen], numbers, owners, dtype)

        of_gains = [
            layers[i].in_scale * layers[i].out_scale / math.sqrt(math.prod(layers[i].shape[1:])) for i in self.order
        ]
        self.of_gains = multipliers(self.order, of_gains)
        self.of_biases = multipliers(self.biased, [layers[i].out_scale for i in self.biased])

    def joined_skip_gains(self, skip_gains: Sequence[Tensor]) -> Tensor | None:
        """Join the skip gains of `skipping`, for `Multipliers.times`; None where there are none."""
        return torch.cat([*skip_gains, self.one]) if skip_gains else None


_laid_out = functools.lru_cache(maxsize=256)(Layout)


def layout_of(group: Sequence[Any]) -> Layout:
    """Return the layout of layers, given as `Factors`."""
    layers = tuple(
        [
            _Layer(
                weight.shape, weight.numel() < SMALL and weight.is_contiguous(), bias is not None,
                skip_gain is not None, in_scale, out_scale, eps,
            )
            for weight, _, bias, skip_gain, in_scale, out_scale, eps in group
        ]
    )  # fmt: skip
    with torch.inference_mode(False):
        return _laid_out(group[0].weight.dtype, layers)
