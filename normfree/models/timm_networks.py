"""timm's normalizer-free networks on our layers: the same function, faster to fine-tune, and ready to fold."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from normfree.nn import EfficientChannelAttention, PreActivationBlock, ScaledWSConv2d, SqueezeExcite, VarianceLedger
from normfree.nn.weight_pass import attach


def from_timm(model: Any) -> nn.Module:
    """Copy timm's `NormFreeNet` (nf_resnet*, nf_regnet_b*, nfnet_f*, dm_nfnet_f*, eca_nfnet_l*, …) onto our layers.

    The same function with the same parameters, in eval and in training mode, and still timm's class with all of its
    methods. Every scalar of timm's blocks (β, γ where it stands in the activation, the attention's gain, α, SkipInit
    gain) moves into the weights of a convolution or into a gate. timm's √(var + eps) is absorbed into the gains, so
    parameters that a training changes afterwards are clamped as the authors' are.

    Args:
        model: One of timm's normalizer-free networks.

    Returns:
        The copy, of timm's class.

    Raises:
        ValueError: By name, for any other model, and for a layer that is not supported.
    """
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if kind != "timm.models.nfnet.NormFreeNet":
        raise ValueError(f"the model is a {kind}; from_timm takes timm's NormFreeNet")
    for block in (block for stage in model.stages for block in stage):
        if type(block).__name__ != "NormFreeBlock":
            raise ValueError(f"a block is a {type(block).__name__}; from_timm takes timm's NormFreeBlock")
    converted: Any = copy.deepcopy(model)
    _convert_stem(converted.stem)
    for stage in converted.stages:
        ledger: VarianceLedger | None = None
        for position, block in enumerate(stage):
            ledger = ledger or VarianceLedger(block.alpha)
            ledger.enter_block(first_in_stage=position == 0)
            stage[position] = _block(block, ledger.variance).train(model.training)
    if not isinstance(converted.final_conv, nn.Identity):
        converted.final_conv = _conv(converted.final_conv)
    converted.final_act = _activation(converted.final_act, keep_gamma=True)
    attach(converted)
    return converted


def _convert_stem(stem: nn.Sequential) -> None:
    gamma = 1.0
    for name, layer in stem.named_children():
        if isinstance(layer, nn.Conv2d):
            setattr(stem, name, _conv(layer, in_scale=gamma))
            gamma = 1.0
        elif not isinstance(layer, nn.MaxPool2d):  # which commutes with a positive factor
            gamma = _gamma(layer)
            setattr(stem, name, _activation(layer))


def _block(block: Any, expected_variance: float) -> PreActivationBlock:
    middle = [(block.act2, block.conv2), (block.act2b, block.conv2b)]
    layers = [(block.act1, block.conv1), *((act, conv) for act, conv in middle if conv is not None)]
    layers.append((block.act3, block.conv3))
    end: dict[str, Any] = {"out_scale": block.alpha, "skip_gain": block.skipinit_gain}
    gate = inner_gate = None
    if block.attn_last is not None:
        gate = _gate(block.attn_last, block.attn_gain, **end)
        end = {}
    if block.attn is not None:
        inner_gate = _gate(block.attn, block.attn_gain)
    convolutions = []
    for index, (act, conv) in enumerate(layers):
        scale = _gamma(act) * (block.beta if index == 0 else 1.0)
        convolutions.append(_conv(conv, in_scale=scale, **(end if index == len(layers) - 1 else {})))
    shortcut = None
    if block.downsample is not None:
        conv = _conv(block.downsample.conv, in_scale=_gamma(block.act1) * block.beta)
        shortcut = nn.Sequential(block.downsample.pool, conv)
    return PreActivationBlock(
        pre=[_activation(act) for act, _ in layers],
        conv=convolutions,
        shortcut=shortcut,
        gate=gate,
        inner_gate=inner_gate,
        drop_rate=getattr(block.drop_path, "drop_prob", 0.0),
        rescale_drop=getattr(block.drop_path, "scale_by_keep", False),
        expected_variance=expected_variance,
    )


def _conv(
    conv: Any, *, in_scale: float = 1.0, out_scale: float = 1.0, skip_gain: nn.Parameter | None = None
) -> ScaledWSConv2d:
    if type(conv).__name__ not in ("ScaledStdConv2d", "ScaledStdConv2dSame"):
        raise ValueError(f"a convolution is a {type(conv).__name__}; from_timm takes timm's ScaledStdConv2d(Same)")
    weight, fan_in = conv.weight, conv.weight[0].numel()
    ours = ScaledWSConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
        "same" if getattr(conv, "same_pad", False) else conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, device=weight.device, dtype=weight.dtype,
        in_scale=in_scale * conv.scale * math.sqrt(fan_in), out_scale=out_scale,
        skip_gain=None if skip_gain is None else 0.0,
    )  # fmt: skip
    variance = weight.detach().double().var((1, 2, 3), correction=0)
    clamped = (fan_in * variance).clamp(min=ours.eps)
    gain = conv.gain.detach().double().flatten() * (clamped / (fan_in * (variance + conv.eps))).sqrt()
    _take(ours.weight, weight)
    _take(ours.gain, conv.gain, gain)
    _take(ours.bias, conv.bias)
    _take(ours.skip_gain, skip_gain)
    return ours


def _take(ours: Tensor | None, theirs: Any, value: Tensor | None = None) -> None:
    """Their value (or `value`), and whether it trains."""
    if ours is None or theirs is None:
        return
    with torch.no_grad():
        ours.copy_((theirs if value is None else value).reshape(ours.shape))
    ours.requires_grad_(theirs.requires_grad)


def _gate(
    attention: Any, gain: float, *, out_scale: float = 1.0, skip_gain: nn.Parameter | None = None
) -> SqueezeExcite | EfficientChannelAttention:
    kind = type(attention).__name__
    scales: dict[str, Any] = {
        "gate_scale": gain, "out_scale": out_scale, "skip_gain": None if skip_gain is None else 0.0
    }  # fmt: skip
    if type(getattr(attention, "gate", None)).__name__ != "Sigmoid":
        raise ValueError(f"the gate of a {kind} is no sigmoid; from_timm does not support it")
    ours: SqueezeExcite | EfficientChannelAttention
    if kind == "SEModule" and isinstance(attention.act, nn.ReLU) and isinstance(attention.bn, nn.Identity):
        if attention.add_maxpool or attention.fc1.bias is None:
            raise ValueError("a SEModule has add_maxpool, or no biases; from_timm does not support it")
        ours = SqueezeExcite(attention.fc1.in_channels, attention.fc1.out_channels, **scales)
        for layer, theirs in ((ours.fc0, attention.fc1), (ours.fc1, attention.fc2)):
            _take(layer.weight, theirs.weight)
            _take(layer.bias, theirs.bias)
    elif kind == "EcaModule" and attention.conv2 is None:
        ours = EfficientChannelAttention(attention.conv.kernel_size[0], **scales)
        _take(ours.conv.weight, attention.conv.weight)
    else:
        raise ValueError(f"an attention layer is a {kind}; from_timm supports SEModule (with ReLU) and EcaModule")
    like = attention.conv.weight if kind == "EcaModule" else attention.fc1.weight
    ours = ours.to(device=like.device, dtype=like.dtype)
    _take(ours.skip_gain, skip_gain)
    return ours


def _gamma(activation: Any) -> float:
    """Return the factor of timm's `GammaAct` after its function; 1 for another activation."""
    return float(activation.gamma) if type(activation).__name__ == "GammaAct" else 1.0


def _activation(activation: Any, *, keep_gamma: bool = False) -> nn.Module:
    """Take γ out of timm's activation; in place where that saves memory: where its derivative needs its output."""
    if type(activation).__name__ == "GammaAct":
        from timm.layers.create_act import create_act_layer

        plain = _activation(create_act_layer(activation.act_fn.__name__))
        return _Multiplied(plain, activation.gamma) if keep_gamma else plain
    if hasattr(activation, "inplace") and not isinstance(activation, nn.ReLU):
        activation.inplace = False
    return activation


class _Multiplied(nn.Module):
    """activation(x) · γ."""

    def __init__(self, activation: nn.Module, gamma: float) -> None:
        super().__init__()
        self.activation = activation
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x) * self.gamma
