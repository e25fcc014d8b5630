"""The network that a recipe names, for the data that it names."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normfree.errors import TrainingError
from normfree.files.tensors import load_state, read_tensors
from normfree.sources import model_factory
from normfree.trace.inputs import first_layer, input_shape
from normfree.trace.preparation import restoring_modes
from normfree.training.data.datasets import Description
from normfree.training.recipes import Recipe, parse_arguments

# How each source calls what a recipe says; None: the source has no such argument.
_NAMES: dict[str, dict[str, str | None]] = {
    "": {},
    "timm": {"in_channels": "in_chans", "stochastic_depth_rate": "drop_path_rate"},
    "torchvision": {"in_channels": None, "stochastic_depth_rate": None, "drop_rate": None},
}
_RATES = ("stochastic_depth_rate", "drop_rate")


def build(recipe: Recipe, data: Description) -> nn.Module:
    """A new network with a classifier for the data's classes.

    A function of the user's (package.module:factory) gets what its signature names. Raises ValueError for a model or an
    argument that is not known.
    """
    source = recipe.model.partition(":")[0] if ":" in recipe.model else ""
    wanted = {
        "num_classes": data.classes,
        "in_channels": data.channels,
        "stochastic_depth_rate": recipe.stochastic_depth_rate,
        "drop_rate": recipe.drop_rate,
    }
    arguments: dict[str, Any] = {}
    factory = model_factory(recipe.model)
    names = _NAMES[source] if source in _NAMES else dict.fromkeys(wanted.keys() - inspect.signature(factory).parameters)
    for name, value in wanted.items():
        theirs = names.get(name, name)
        if theirs is not None and value is not None:
            arguments[theirs] = value
        elif name in _RATES and value:
            raise ValueError(f"{name} is {value}, but {recipe.model} has no such argument")
    more = parse_arguments(recipe.model_args)
    if "num_classes" in more:
        raise ValueError("model_args has num_classes, which the data decides")
    arguments |= more
    # What does not know a rate has a rate of 0.
    zero = {theirs for name in _RATES if arguments.get(theirs := names.get(name) or name) == 0}
    try:
        try:
            return factory(**arguments)
        except TypeError:
            if not zero:
                raise
            return factory(**{name: value for name, value in arguments.items() if name not in zero})
    except TypeError as error:
        given = f" (model_args, all of them the recipe's unless given anew: {' '.join(recipe.model_args)})"
        raise ValueError(f"{recipe.model} cannot be built: {error}{given if recipe.model_args else ''}") from error


def load_weights(model: nn.Module, path: str | Path) -> None:
    """The parameters and buffers of a .safetensors file.

    Raises FileNotFoundError where there is none, TrainingError for one that is damaged or does not fit.
    """
    try:
        tensors, _ = read_tensors(path)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    try:
        load_state(model, tensors)
    except ValueError as error:
        raise TrainingError(f"{path} does not fit {type(model).__name__}: {error}") from error


def check_runs(model: nn.Module, name: str, images: Tensor, test_size: int, classes: int) -> None:
    """Run the model on images for training, and on their likes for testing, and leave it as it was.

    Raises TrainingError where it fails or gives no logits of so many classes.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with restoring_modes(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        for mode, size in (("training", images.shape[-1]), ("testing", test_size)):
            model.train(mode == "training")
            try:
                logits = model(images.new_zeros(*images.shape[:2], size, size))
            except Exception as error:  # a user's model may raise anything
                raise TrainingError(f"{name} does not run on {mode} images of {size} pixels: {error}") from error
            if not isinstance(logits, Tensor) or logits.shape != (len(images), classes):
                given = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
                wanted = f"logits ({len(images)} images, {classes} classes)"
                raise TrainingError(f"{name} gives {given} in {mode}, not {wanted}")
    for buffer, value in before:
        buffer.copy_(value)


def image_sizes(recipe: Recipe, model: nn.Module) -> tuple[int, int]:
    """Image sizes for training and testing, in pixels: the recipe's, or the model's own."""
    declared: Any = getattr(model, "default_cfg", None) or {}
    train = recipe.image_size or int(input_shape(model)[-1])
    test = declared.get("test_input_size") if recipe.image_size is None else None
    return train, recipe.test_size or (int(test[-1]) if test else train)


def model_channels(model: nn.Module, data: Description) -> int:
    """Channels of the images that the model takes: those of its first convolution, else the data's."""
    first = first_layer(model, nn.Conv2d)
    return first.in_channels if isinstance(first, nn.Conv2d) else data.channels


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Find what the model itself calls its classifier (some have two), else its last linear layer."""
    named = getattr(model, "get_classifier", None)
    found = named() if callable(named) else [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    return [found] if isinstance(found, nn.Module) else list(found)


def weight_decay(recipe: Recipe, model: nn.Module) -> float:
    """The recipe's, or that of the model's variant, or 5e-5."""
    if recipe.weight_decay is not None:
        return recipe.weight_decay
    return float(getattr(getattr(model, "config", None), "weight_decay", 5e-5))
