"""Models by name of their source: ours, timm's, torchvision's, or a function of the user's."""

import contextlib
import functools
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from normfree.errors import suggest
from normfree.models import create_model, from_pretrained, list_models


def model_factory(name: str) -> Callable[[], nn.Module]:
    """Find a function that builds the model, with new parameters and nothing downloaded unless its name asks for it.

    `name` is one of ours ("nf_resnet50"), "timm:NAME", "torchvision:NAME", or "package.module:factory", where factory
    is called without arguments and the current folder is searched too; or, with its parameters, a folder written by
    `save_pretrained`, or "hub:USER/NAME".

    Raises ValueError for a name that is not known, with near misses; ImportError where a module cannot be imported.
    """
    if name not in list_models() and Path(name).is_dir():
        return functools.partial(from_pretrained, name)
    source, colon, rest = name.partition(":")
    if not colon:
        if name not in list_models():
            raise ValueError(
                f"no model is called {name!r}{suggest(name, list_models())} (`normfree models` lists ours; "
                "timm:NAME, torchvision:NAME and package.module:factory are others)"
            )
        return functools.partial(create_model, name)
    if source == "hub":
        return functools.partial(from_pretrained, rest)
    if source == "timm":
        return _from_timm(rest)
    if source == "torchvision":
        return _from_torchvision(rest)
    return _from_module(source, rest)


def _from_timm(name: str) -> Callable[[], nn.Module]:
    timm = _import("timm", "'timm:' needs timm: pip install 'normfree[timm]'")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{suggest(name.split('.')[0], timm.list_models())}")
    return functools.partial(timm.create_model, name, pretrained=False)


def _from_torchvision(name: str) -> Callable[[], nn.Module]:
    models = _import("torchvision.models", "'torchvision:' needs torchvision: pip install 'normfree[timm]'")
    if name not in models.list_models():
        raise ValueError(f"torchvision has no model {name!r}{suggest(name, models.list_models())}")
    # Detectors and segmenters would fetch their backbone's weights unless told not to.
    accepted = inspect.signature(models.get_model_builder(name)).parameters
    arguments: dict[str, Any] = {key: None for key in ("weights", "weights_backbone") if key in accepted}
    if name in ("googlenet", "inception_v3"):
        arguments |= {"init_weights": True}
    return functools.partial(models.get_model, name, **arguments)


def _from_module(module_name: str, attribute: str) -> Callable[[], nn.Module]:
    with _current_folder_searched():
        module = _import(module_name, f"cannot import {module_name!r}")
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"{module_name} has no {attribute!r}{suggest(part, dir(factory))}")
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module):
        raise ValueError(f"{module_name}:{attribute} is a model; name a function that makes one")
    if not callable(factory):
        raise ValueError(f"{module_name}:{attribute} is a {type(factory).__name__}; name a function that makes a model")

    @functools.wraps(factory)
    def checked(*args: Any, **kwargs: Any) -> nn.Module:
        try:
            with _current_folder_searched():  # a factory may import more
                model = factory(*args, **kwargs)
        except (Exception, SystemExit) as error:  # it may raise anything
            raise _said_where(error, f"{module_name}:{attribute}") from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"{module_name}:{attribute} made a {type(model).__name__}; it must make a torch.nn.Module")
        return model

    return checked


def _said_where(error: BaseException, name: str) -> Exception:
    """Make an error that names the line at which a function of the user's raised; TypeError for wrong arguments."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, TypeError) and last.filename == __file__:  # it was not entered
        return TypeError(f"{name} cannot be called so: {error}")
    return ValueError(f"{name} raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno})")


@contextlib.contextmanager
def _current_folder_searched() -> Iterator[None]:
    """Let modules be imported from the current folder, as `python -m` does."""
    here = str(Path.cwd())
    if here in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _import(name: str, message: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it is imported
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if last.filename.startswith("<frozen") else f", {last.filename}, line {last.lineno}"
        raise ImportError(f"{message} ({type(error).__name__}: {error}{place})") from error
