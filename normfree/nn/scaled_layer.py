"""Base of layers with scaled standardized weights: all that a normalizer would do, done to the weights."""

import copy
import functools
import importlib.util
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfree import _torch
from normfree.nn.group_layout import SMALL
from normfree.nn.matrix_form import LARGE, apply_to_patches
from normfree.nn.recompute import recomputing
from normfree.nn.scales import Scales
from normfree.nn.standardization import (
    Effective,
    Factors,
    computes_fast,
    effective_parameters,
    standardized,
    standardized_again,
)

# An effective weight is computed again in the backward pass, which saves its memory, unless it is `SMALL`, or so many
# times smaller than the layer's input, which is kept anyway, or applied to so few positions that the time would show.
_FAR = 16
_FEW = 512


class _InForce(threading.local):
    """Whoever computes effective weights for the layers that are called in this thread; see `weight_pass`."""

    source: Any = None  # has take(layer) -> Effective | None


in_force = _InForce()


class ScaledWS(Scales):
    """Scaled weight standardization for a weight layer of torch, before which it comes in the method resolution order.

    W_eff and b_eff carry every scalar, so that none is left for a pass over activations:

        W_eff = in_scale · out_scale · skip_gain · gain ⊙ (W − mean(W)) · rsqrt(max(N · var(W), eps))
        b_eff = out_scale · skip_gain · bias

    per output channel, N = fan-in. `gain` is (out_channels,), `skip_gain` (1,); `in_scale` and `out_scale` are
    persistent float32 buffers (float64 in a float64 layer). `out_channels` and `channel_axis` say what the output's
    channels are and where it has them.

    With `standardize=False` filters stay as they are, W instead of (W − mean(W)) · rsqrt(…). Such a layer may hold the
    statistics that a normalizer had when it was removed, `channel_scale` and `channel_center`, (out_channels,): the
    gain then scales what is centred, as the normalizer's did, at the learning rates that suited it:

        W_eff = out_scale · skip_gain · slope ⊙ W                        slope = in_scale · gain · channel_scale
        b_eff = out_scale · skip_gain · (bias − slope · channel_center)
    """

    in_scale: Tensor
    gain: nn.Parameter
    channel_scale: Tensor  # where `hold_statistics` was called
    channel_center: Tensor
    weight: Tensor
    bias: Tensor | None
    out_channels: int
    channel_axis = 1
    recompute_weight = False
    written: nn.Module | None = None

    def __init__(
        self, *args: Any, in_scale: float, out_scale: float, skip_gain: float | None, eps: float, standardize: bool
    ) -> None:
        if not eps > 0:
            raise ValueError(f"eps is {eps}; it must be positive, or constant filters divide by zero")
        super().__init__(*args)
        self.eps = eps
        self.standardize = standardize
        self._register_scales(self.weight, in_scale=in_scale, out_scale=out_scale, skip_gain=skip_gain)
        self.gain = nn.Parameter(self.weight.new_empty(self.out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 1/fan_in), or N(0, 2/fan_in) (He) without standardization; gains 1, biases 0.

        The SkipInit gain gets its initial value; `in_scale` and `out_scale` stay as they are. Statistics of what went
        through the old weights are forgotten, as BatchNorm's are: `channel_scale` 1, `channel_center` 0.
        """
        if "gain" not in self._parameters:
            return  # torch's constructor calls this before the gains exist
        fan_in = self.weight.numel() // self.out_channels
        with torch.no_grad():
            self.weight.normal_(0, math.sqrt((1 if self.standardize else 2) / fan_in))
            self.gain.fill_(1)
            if self.bias is not None:
                self.bias.zero_()
            if "channel_scale" in self._buffers:
                self.channel_scale.fill_(1)
                self.channel_center.zero_()
        super().reset_parameters()

    def hold_statistics(self) -> None:
        """Register `channel_scale`, ones, and `channel_center`, zeros. Raises ValueError where it standardizes."""
        if self.standardize or self.bias is None:
            raise ValueError("statistics are held by layers with a bias that do not standardize")
        self.register_buffer("channel_scale", torch.ones_like(self.gain, requires_grad=False))
        self.register_buffer("channel_center", torch.zeros_like(self.gain, requires_grad=False))

    def filters(self, weight: Tensor) -> Tensor:
        """Return the weight as (out_channels, …), a filter for each channel of the output."""
        return weight

    def unfilters(self, filters: Tensor) -> Tensor:
        """Undo `filters`."""
        return filters

    def effective_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return W_eff, of the weight's shape, and b_eff, (out_channels,) or None: those of an equal plain layer."""
        kernels = self.kernels()
        if kernels is not None:
            weight, bias = kernels.effective_parameters([self.factors()], self.weight.dtype)[0]
            return weight, bias
        return self._effective()[:2]

    def _effective(self) -> Effective:
        """Compute what the layer computes with."""
        if self.standardize and self.weight.dtype is self.in_scale.dtype:
            factors = self.factors()
            if computes_fast(factors):
                factors = factors._replace(in_scale=self.in_scale.item(), out_scale=self.out_scale.item())
                weight, bias, scale = effective_parameters([factors])[0]
                return Effective(self.unfilters(weight), bias, scale)
        out_scale = self._out_scale()
        bias = None if self.bias is None else self.bias * out_scale.to(self.bias.dtype)
        scale = self.gain * (self.in_scale * out_scale)
        if bias is not None and "channel_scale" in self._buffers:
            scale = scale * self.channel_scale
            bias = bias - (scale * self.channel_center).to(bias.dtype)
        filters = self.filters(self.weight)
        if self.standardize:
            weight = standardized(filters, scale, self.eps)
        else:
            weight = filters * scale.to(filters.dtype).view(-1, *[1] * (filters.ndim - 1))
        return Effective(self.unfilters(weight), bias, None)

    def factors(self) -> Factors:
        """Return the factors of the effective weight and bias."""
        filters = self.filters(self.weight)
        return Factors(filters, self.gain, self.bias, self.skip_gain, self.in_scale, self.out_scale, self.eps)

    def _weight_again(self, weight: Tensor, scale: Tensor) -> Tensor:
        return self.unfilters(standardized_again(self.filters(weight), scale, self.eps))

    def _with_effective_parameters(self, input: Tensor, call: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """Return call(W_eff, b_eff), which takes `input`."""
        if torch.compiler.is_compiling():
            return call(*self.effective_parameters())
        source = in_force.source
        found = None if source is None else source.take(self)
        if found is None and (kernels := self.kernels()) is not None:
            return self._with_kernels(kernels, input, call)
        weight, bias, scale = found or self._effective()
        if scale is None or not self._computes_again(weight, input):
            return call(weight, bias)
        with recomputing(weight, self._weight_again, self.weight, scale):
            return call(weight, bias)

    def keep_forward_of(self, plain: nn.Module) -> None:
        """Compute by W_eff and b_eff as the class of this layer does, which pads or crops around what torch's does.

        It is kept without the values of its parameters, and without hooks; it is no child of this module, which has its
        children.
        """
        written = copy.copy(plain)
        hooks = {name: OrderedDict[int, Any]() for name in vars(plain) if name.endswith(("_hooks", "_with_kwargs"))}
        vars(written).update(_parameters={}, _buffers={}, _modules=plain._modules, **hooks)
        vars(self)["_modules"] = plain._modules
        for name in ("weight", "bias"):
            values = getattr(self, name)
            stand_in = None if values is None else nn.Parameter(torch.empty_like(values, device="meta"), False)
            written.register_parameter(name, stand_in)
        vars(self)["written"] = written

    def _as_written(self, *args: Any, **kwargs: Any) -> Tensor:
        def call(weight: Tensor, bias: Tensor | None) -> Tensor:
            assert self.written is not None
            if torch.compiler.is_compiling():
                values = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
                out: Tensor = torch.func.functional_call(self.written, values, args, kwargs)
                return out
            written: Any = copy.copy(self.written)  # its own in each thread
            vars(written).update(weight=weight, bias=bias, _parameters={})
            out = type(written).forward(written, *args, **kwargs)
            return out

        return self._with_effective_parameters(args[0], call)

    def _may_take_matrix_form(self, input: Tensor) -> bool:
        """Tell whether the layer may be computed as `matrix_form` does, if that is faster."""
        weight = self.weight
        return (
            weight.numel() >= LARGE
            and weight.is_cpu
            and type(input) is Tensor
            and input.dtype is weight.dtype
            and torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and self.standardize
            and self.in_scale.dtype is weight.dtype
            and computes_fast(self.factors())
            and weight.is_contiguous()
            and _torch.nobody_watches()
        )

    def _apply_to_patches(self, patches: Tensor) -> Tensor | None:
        before, after = self.in_scale.item(), self.out_scale.item()
        return apply_to_patches(patches, self.factors()._replace(in_scale=before, out_scale=after))

    def _with_kernels(self, kernels: Any, input: Tensor, call: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        factors, dtype = self.factors(), autocast_dtype(self.weight)
        weight, bias = kernels.effective_parameters([factors], dtype)[0]
        if dtype is not self.weight.dtype or not self._computes_again(weight, input):
            return call(weight, bias)

        def again(*tensors: Any) -> Tensor:
            found: Tensor = kernels.effective_parameters([Factors._make([*tensors, self.eps])], dtype)[0][0]
            return found

        with recomputing(weight, again, *factors[:-1]):
            return call(weight, bias)

    def _computes_again(self, weight: Tensor, input: Tensor) -> bool:
        """Tell whether W_eff is computed again in the backward pass rather than kept."""
        if self.recompute_weight or weight.is_cuda:  # a GPU would wait for the launches
            return self.recompute_weight
        size = weight.numel()
        positions = input.numel() // max(1, input.shape[self.channel_axis])
        return size >= SMALL and positions > _FEW and input.numel() < _FAR * size

    def kernels(self) -> Any:
        """Return the module of fused kernels where they can be used, or None."""
        if not (self.weight.is_cuda and self.standardize and type(self).filters is ScaledWS.filters):
            return None
        kernels = None if torch.compiler.is_compiling() else _import_fused()
        return kernels if kernels is not None and kernels.supports(self.factors()) else None

    def __prepare_scriptable__(self) -> nn.Module:
        """Say that TorchScript knows no weights that are computed."""
        raise ValueError("TorchScript takes folded networks: give it normfree.fold(model)")

    def extra_repr(self) -> str:
        """Show what differs from a plain layer."""
        parts = [super().extra_repr()]
        if self.skip_gain is not None:
            parts.append("skip_gain=True")
        if not self.standardize:
            parts.append("standardize=False")
        return ", ".join(parts)


@functools.cache
def _import_fused() -> Any:
    """Import the fused kernels where Triton is, which torch brings along for its GPUs; else warn, and give None."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn("weights are standardized by slower kernels: triton is not installed", stacklevel=2)
        return None
    from normfree.nn import fused

    return fused


def autocast_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that a convolution or a linear layer gives the weight under autocast."""
    kind = weight.device.type
    rounded = weight.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if rounded else weight.dtype
