"""This package's networks among timm's: `timm.create_model("normfree_nf_resnet50", features_only=True, …)`."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from normfree.models.network import default_cfg
from normfree.models.registry import create_model, list_models, model_config

PREFIX = "normfree_"
_OUR_NAMES = {"in_chans": "in_channels", "drop_path_rate": "stochastic_depth_rate"}


def register_with_timm() -> None:
    """Add our networks to timm's registry, under `PREFIX`: now if timm is imported, else when it will be."""
    if "timm" in sys.modules:
        _register()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder(importlib.abc.MetaPathFinder):
    """Waits for timm, so that importing this package does not import it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _then_register(spec.loader.exec_module)  # type: ignore[assignment, method-assign]
        return spec


def _then_register(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        execute(module)
        _register()

    return exec_module


default_cfgs: dict[str, Any] = {}  # where timm's `register_model` looks for them


def _register() -> None:
    from timm.models import generate_default_cfgs, register_model

    default_cfgs.update(
        generate_default_cfgs({PREFIX + name: default_cfg(model_config(name)) for name in list_models()})
    )
    for name in list_models():
        register_model(_entrypoint(name))


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def build(*, global_pool: str | None = None, **arguments: Any) -> nn.Module:
        model = create_model(name, **{_OUR_NAMES.get(key, key): value for key, value in arguments.items()})
        if global_pool is not None:
            model.reset_classifier(model.num_classes, global_pool)
        return model

    def entrypoint(pretrained: bool = False, **arguments: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        return build_model_with_cfg(
            build, PREFIX + name, pretrained, feature_cfg={"feature_cls": "getter"}, **arguments
        )

    entrypoint.__name__ = entrypoint.__qualname__ = PREFIX + name
    entrypoint.__doc__ = f"`normfree.create_model({name!r})` under timm's names of arguments."
    return entrypoint
