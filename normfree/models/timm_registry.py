"""Networks of this package among timm's: `timm.create_model("normfree_nf_resnet50", features_only=True, …)`."""

from collections.abc import Callable
from typing import Any

from torch import nn

from normfree.models.network import default_cfg
from normfree.models.registry import create_model, list_models, model_config

PREFIX = "normfree_"
_OUR_NAMES = {"in_chans": "in_channels", "drop_path_rate": "stochastic_depth_rate", "act_layer": "activation"}

default_cfgs: dict[str, Any] = {}  # where timm's `register_model` looks for them


def register_with_timm() -> None:
    """Add every network to timm's registry, as `normfree_` and its name; none of timm's is replaced.

    `import normfree` does this by itself where timm has been imported before; else call it. Raises ImportError without
    timm.
    """
    from timm.models import generate_default_cfgs, is_model, register_model

    new = [name for name in list_models() if not is_model(PREFIX + name)]
    default_cfgs.update(generate_default_cfgs({PREFIX + name: default_cfg(model_config(name)) for name in new}))
    for name in new:
        register_model(_entrypoint(name))


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def build(**arguments: Any) -> nn.Module:
        ours = {_OUR_NAMES.get(key, key): value for key, value in arguments.items() if value is not None}
        activation = ours.get("activation")
        if isinstance(activation, type):  # timm takes classes too
            ours["activation"] = activation.__name__
        return create_model(name, **ours)

    def entrypoint(pretrained: bool = False, **arguments: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        return build_model_with_cfg(
            build, PREFIX + name, pretrained, feature_cfg={"feature_cls": "getter"}, **arguments
        )

    entrypoint.__name__ = entrypoint.__qualname__ = PREFIX + name
    entrypoint.__doc__ = f"`normfree.create_model({name!r})` under timm's names of arguments."
    return entrypoint
