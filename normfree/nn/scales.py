"""The few numbers that a module multiplies by, kept exact."""

from typing import Any

import torch
from torch import Tensor, nn

from normfree.arguments import require_moderate


class Scales(nn.Module):
    """Module with scalar buffers that are never rounded to half precision, and a learnable SkipInit gain if asked.

    The scales multiply whole networks: they are float32 whatever the module is converted to, float64 in a float64 one,
    then with all of their digits. They always have values, on the meta device too: nothing but `convert`, or whoever
    writes into the buffers, sets them again.
    """

    out_scale: Tensor  # where there is one
    skip_gain: nn.Parameter | None  # (1,)

    def _register_scales(self, like: Tensor, *, skip_gain: float | None = None, **scales: float) -> None:
        """Register persistent buffers of these names and values, on the device of `like` and at least float32."""
        require_moderate(**scales, skip_gain=skip_gain)
        exact = torch.promote_types(like.dtype, torch.float32)
        device = torch.device("cpu") if like.is_meta else like.device
        for name, value in scales.items():
            self.register_buffer(name, torch.tensor(value, dtype=exact, device=device))
        self._digits = dict(scales)  # what float32 has rounded away, for a later conversion to float64
        self._initial_skip_gain = skip_gain
        # Of one dimension: torch's FSDP shards no scalars.
        self.skip_gain = None if skip_gain is None else nn.Parameter(like.new_full((1,), skip_gain))

    def _out_scale(self) -> Tensor:
        """Return out_scale · skip_gain, a scalar."""
        return self.out_scale if self.skip_gain is None else self.out_scale * self.skip_gain.squeeze(0)

    def copy_scales(self, other: "Scales") -> None:
        """Set the scales to those of `other`, which may be on the meta device; the SkipInit gain stays."""
        self._digits = dict(other._digits)
        with torch.no_grad():
            for name in self._digits:
                getattr(self, name).copy_(getattr(other, name))

    def reset_parameters(self) -> None:
        """Set the SkipInit gain to its initial value; scales are no parameters and stay."""
        if self.skip_gain is not None and self._initial_skip_gain is not None:
            nn.init.constant_(self.skip_gain, self._initial_skip_gain)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in self._digits}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new is not old:
                self._buffers[name] = self._converted(name, old, new)
        return self

    def _converted(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        """Return the value of `old` where `new` is, unless on the meta device; of its dtype, but no half precision."""
        dtype, device = torch.promote_types(new.dtype, torch.float32), old.device if new.is_meta else new.device
        if dtype != old.dtype:
            exact = torch.tensor(self._digits[name], dtype=torch.float64, device="cpu")
            if torch.equal(exact.to(old.dtype), old.detach().cpu()):  # nobody has set another value
                return exact.to(device, dtype)
        return old.to(device, dtype)
