"""The few numbers that a module multiplies by, kept exact."""

from typing import Any

import torch
from torch import Tensor, nn


class Scales(nn.Module):
    """Gives a module scalar buffers that are never rounded to half precision, and a learnable SkipInit gain if asked.

    The scales multiply whole networks: they are float32 whatever the module is converted to, float64 in a float64 one,
    then with all of their digits.
    """

    out_scale: Tensor  # where there is one
    skip_gain: nn.Parameter | None  # (1,)

    def _register_scales(self, like: Tensor, *, skip_gain: float | None = None, **scales: float) -> None:
        """Persistent buffers of these names and values, on the device of `like` and at least float32."""
        exact = torch.promote_types(like.dtype, torch.float32)
        self._initial_scales = scales
        self._initial_skip_gain = skip_gain
        for name in scales:
            self.register_buffer(name, torch.empty((), dtype=exact, device=like.device))
        # Of one dimension: torch's FSDP shards no scalars.
        self.skip_gain = None if skip_gain is None else nn.Parameter(like.new_empty(1))

    def _out_scale(self) -> Tensor:
        """out_scale · skip_gain, a scalar."""
        return self.out_scale if self.skip_gain is None else self.out_scale * self.skip_gain.squeeze(0)

    def reset_scales(self) -> None:
        """The values that the module was made with."""
        with torch.no_grad():
            for name, value in self._initial_scales.items():
                getattr(self, name).fill_(value)
            if self.skip_gain is not None and self._initial_skip_gain is not None:
                self.skip_gain.fill_(self._initial_skip_gain)

    def take_scales(self, other: "Scales") -> None:
        """The values that `other` was made with, which may be on the meta device; the SkipInit gain stays."""
        self._initial_scales = dict(other._initial_scales)
        with torch.no_grad():
            for name, value in self._initial_scales.items():
                getattr(self, name).fill_(value)

    def reset_parameters(self) -> None:
        """`reset_scales`: what initialisation after a meta device calls."""
        self.reset_scales()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        exact = {name: self._buffers[name] for name in self._initial_scales}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if before is None or after is None:
                continue
            if after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = before.to(after.device, torch.float32)
            elif after.dtype != before.dtype and not after.is_meta:
                exact_value = torch.full_like(after, self._initial_scales[name])
                if torch.equal(exact_value.to(before.dtype), after.to(before.dtype)):  # it is still the initial one
                    self._buffers[name] = exact_value
        return self
