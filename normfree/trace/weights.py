"""Weights: the operations of a run that mix channels by a parameter, which makes of them a weight layer."""

from typing import Any

from torch import Tensor, nn

from normfree.trace.lineage import Lineage
from normfree.trace.operations import WEIGHT_LAYERS, tensors_in

# Torch's quantized ones begin with these; their weight is packed into an object.
_QUANTIZED = ("conv1d", "conv2d", "conv3d", "conv_transpose", "linear")
# Others of torch's, whose weights may stand anywhere; operations that torch does not have are taken for some.
_ANYWHERE = {"_addmm_activation", "_cdist_forward", "_euclidean_dist", "_trilinear", "addbmm", "cdist"}
_MODULES = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)


class Weights:
    """Knowledge of which operations of a model have weights.

    A weight is a parameter, or computed from parameters or, as in conditional convolutions, from the input. A constant
    (an adjacency, a blur) is none, but in torch's own layers, whose weight may have been computed before the run.
    """

    def __init__(self, model: nn.Module, lineage: Lineage) -> None:
        self.lineage = lineage
        self.layers = {name for name, module in model.named_modules() if isinstance(module, _MODULES)}

    def are_in(self, func: Any, op: str, args: tuple[Any, ...], out: Any, module: str) -> bool:
        """Tell whether an operation that takes an activation has weights, in the module of this path."""
        if op.startswith(_QUANTIZED) and not any(isinstance(value, Tensor) for value in args[1:]):
            return True
        if op in WEIGHT_LAYERS:
            if "rnn" in op or ("conv" in op and self._is_activation(args[1])):
                return True
            # Attention multiplies two activations; that is no weight layer.
            others = [args[i] for i in WEIGHT_LAYERS[op] if not self._is_activation(args[i])]
            return len(others) == 1 and (module in self.layers or self.lineage.is_made_of_parameters(others[0]))
        matrices = [t for t in tensors_in(args) if self.lineage.is_made_of_parameters(t) and _is_matrix(t)]
        if op == "mul":  # as locally connected layers do, before they sum
            return bool(matrices) and out.numel() > max(
                (t.numel() for t in tensors_in(args) if self._is_activation(t)), default=0
            )
        return bool(matrices) and (op in _ANYWHERE or func.namespace not in ("aten", "prims"))

    def are_plain(self, op: str, args: tuple[Any, ...], module: str) -> bool:
        """Tell whether a convolution or a linear layer uses the weight and bias of its module as they are."""
        bias: Any = None
        if op == "convolution":
            weight, bias, transposed = args[1], args[2], args[6]
        elif op in ("addmm", "mm"):
            weight, bias = args[-1], args[0] if op == "addmm" else None
            transposed = weight.stride(0) != 1  # W is (out, in), and W.t() is what is multiplied by
        else:
            return False
        prefix = f"{module}." if module else ""
        known = bias is None or self.lineage.parameter(bias) == f"{prefix}bias"
        return known and not transposed and self.lineage.parameter(weight) == f"{prefix}weight"

    def _is_activation(self, value: Any) -> bool:
        return isinstance(value, Tensor) and bool(self.lineage.nodes([value]))


def _is_matrix(tensor: Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) > 1
