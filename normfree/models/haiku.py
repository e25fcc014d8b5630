"""Parameters from the authors' Haiku networks."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from normfree.arguments import checked
from normfree.models.baseline_resnet import ResNet, ResNetConfig
from normfree.models.fixup_resnet import FixUpResNet
from normfree.models.network import ResidualNetwork
from normfree.models.nf_blocks import NFConfig
from normfree.models.nf_resnet import NFResNet
from normfree.models.nfnet import NFNet
from normfree.models.regnet import NFRegNet
from normfree.models.safe_pickle import read_arrays
from normfree.nn import Bias, ScaledWSConv2d
from normfree.nn.scales import Scales


@checked
def load_haiku(
    model: ResidualNetwork, params: Mapping[str, Any] | str | Path, state: Mapping[str, Any] | None = None
) -> ResidualNetwork:
    """Set the parameters of `model` to those of the authors' network, and return it.

    The network's γ become the authors' constants, which are slightly off the exact ones (gains="reference").

    Args:
        model: Network of the same variant.
        params: Mapping of "<module path>//<parameter name>" (or nested, {module path: {parameter name: array}}) to
            arrays in Haiku's layouts: convolutions (height, width, in, out), linear (in, out), normalizers
            (1, 1, 1, C); or the path of a file of such a mapping, like the published F0_haiku.npz, which is read
            without running what it may hold.
        state: Moving averages of BatchNorm in the same form.

    Returns:
        The model.

    Raises:
        ValueError: Lists everything missing, unexpected or of another shape, or says what else than arrays a file
            holds; the model is then unchanged.
        OSError: For a file that cannot be read.
    """
    if isinstance(params, str | Path):
        params = read_arrays(params)
    arrays = _flatten(params) | _flatten(state or {})
    targets: dict[str, Tensor] = dict(model.named_parameters())
    if state is not None:
        targets |= {name: b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    problems: list[str] = []
    values: dict[str, Tensor] = {}
    expected = {haiku_key(model, name): name for name in targets}
    for key, name in expected.items():
        if key not in arrays:
            problems.append(f"missing: {key} (for {name}, shape {tuple(targets[name].shape)})")
            continue
        try:
            value = _from_haiku(torch.as_tensor(arrays[key]), targets[name])
        except (TypeError, ValueError, RuntimeError) as error:
            problems.append(f"no array: {key} ({error})")
            continue
        if value.shape != targets[name].shape:
            problems.append(f"shape: {key} is {tuple(value.shape)} in our layout, {name} {tuple(targets[name].shape)}")
        values[name] = value
    ignored = ("//counter", "//hidden")
    problems += [f"unexpected: {key}" for key in arrays if key not in expected and not key.endswith(ignored)]
    if problems:
        raise ValueError(f"these parameters do not fit {type(model).__name__}:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    if isinstance(model.config, NFConfig) and model.config.gains != "reference":
        _take_reference_gains(model, model.config)
    return model


def _take_reference_gains(model: ResidualNetwork, config: NFConfig) -> None:
    config = dataclasses.replace(config, gains="reference")
    with torch.device("meta"):
        twin = cast(Any, type(model))(config)
    for ours, theirs in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(ours, Scales):
            ours.copy_scales(theirs)
    model.config = model._hub_mixin_config = config


def _flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}//{name}": array for name, array in value.items()}
        else:
            flat[key] = value
    return flat


def _from_haiku(value: Tensor, target: Tensor) -> Tensor:
    if target.ndim == 4:
        return value.permute(3, 2, 0, 1) if value.ndim == 4 else value
    if target.ndim == 2:
        return value.T
    return value.flatten() if target.ndim == 1 else value


def haiku_key(model: ResidualNetwork, name: str) -> str:
    """Haiku's key of our parameter or buffer `name`; blocks are numbered across stages, the first has no suffix."""
    network, block = _haiku_classes(model)
    path, _, leaf = name.rpartition(".")
    parts = path.split(".")
    owner = model.get_submodule(path)
    scope = network
    if parts[0] == "stages":
        stage, position = int(parts[1]), int(parts[2])
        index = sum(len(cast(nn.Sequential, model.stages[s])) for s in range(stage)) + position
        scope += f"/~/{block}" if index == 0 else f"/~/{block}_{index}"
        parts = parts[3:]
    if leaf == "skip_gain":
        return f"{scope}//{'scale' if isinstance(model, FixUpResNet) else 'skip_gain'}"
    if isinstance(owner, Bias):
        return f"{scope}//{parts[1] if parts[0] == 'branch' else _FIXUP_BIASES[parts[0]]}"
    layer = _haiku_layer(model, owner, parts)
    module = f"{scope}/{layer}" if layer == "shortcut_bn" else f"{scope}/~/{layer}"
    if isinstance(owner, ScaledWSConv2d):
        return f"{module}//{'w' if leaf == 'weight' else leaf}"
    if not isinstance(owner, nn.BatchNorm2d):
        return f"{module}//{'w' if leaf == 'weight' else 'b'}"
    if leaf.startswith("running"):
        return f"{module}/~/{leaf.removeprefix('running_')}_ema//average"
    return f"{module}//{'scale' if leaf == 'weight' else 'offset'}"


_FIXUP_BIASES = {"stem": "bias1", "head": "bias2", "entry": "bias1a"}


def _haiku_classes(model: ResidualNetwork) -> tuple[str, str]:
    """Haiku's names of the network and of its blocks."""
    if isinstance(model, ResNet):
        if cast(ResNetConfig, model.config).skip_gain is not None:
            return "SkipInit_ResNet", "nf_res_block"
        return "ResNet", "res_block_v2" if cast(ResNetConfig, model.config).preactivation else "res_block_v1"
    return {
        NFResNet: ("NF_ResNet", "nf_res_block"),
        NFRegNet: ("NF_RegNet", "nf_block"),
        NFNet: ("NFNet", "nf_block"),
        FixUpResNet: ("FixUp_ResNet", "res_block"),
    }[type(model)]


def _haiku_layer(model: ResidualNetwork, owner: nn.Module, parts: list[str]) -> str:
    """Haiku's name of a layer within the network or a block; `parts` is our path to it."""
    part, batch_norm = parts[0], isinstance(owner, nn.BatchNorm2d)
    if part == "branch":
        part = parts[1]
        return f"bn{part[-1]}" if batch_norm else part if part != "gate" else _haiku_gate(parts)
    if "gate" in part:
        return _haiku_gate(parts)
    if part == "conv":
        layers = ["conv0", "conv1", "conv1b", "conv2"]
        return layers[int(parts[1])] if isinstance(model, NFNet) else f"conv{parts[1]}"
    if part == "pre":
        return f"bn{parts[1]}"
    if part == "stem" and isinstance(model, NFNet):
        return f"stem_conv{int(parts[1]) // 2}"
    if batch_norm:
        return {"stem": "initial_bn", "final": "final_bn", "shortcut": "shortcut_bn"}[part]
    return {"stem": "initial_conv", "head": "linear", "shortcut": "conv_shortcut", "final": "final_conv"}[part]


def _haiku_gate(parts: list[str]) -> str:
    return "squeeze_excite/~/" + ("linear" if parts[-1] == "fc0" else "linear_1")
