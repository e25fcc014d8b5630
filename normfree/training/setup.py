"""The setup of a training: data, network and optimizer of a recipe, prepared for this process."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normfree.conversion import Plan, convert
from normfree.optim import param_groups
from normfree.training.build import (
    build,
    check_runs,
    classifiers,
    image_sizes,
    model_channels,
    weight_decay,
)
from normfree.training.data.batches import Examples, Loader, Order, Parts, collate, loader
from normfree.training.data.datasets import Data, Subset, hold_out
from normfree.training.data.mixing import Mixing
from normfree.training.data.transforms import Normalization, training_transform
from normfree.training.evaluation import testing_loader
from normfree.training.initial_weights import load_initial
from normfree.training.processes import seed_everything
from normfree.training.recipes import Recipe, parse_arguments

_CALIBRATION = 64  # images that a conversion sets the signal on


@dataclass(frozen=True)
class PreparedData:
    """Images of a training, in the order and the parts in which this process takes them."""

    data: Data
    order: Order
    parts: Parts
    examples: Examples
    train_batches: Loader
    test_batches: Loader
    normalized: Normalization

    def close(self) -> None:
        """End the processes that load images."""
        self.train_batches.close()
        self.test_batches.close()


@dataclass(frozen=True)
class PreparedNetwork:
    """Network of a training."""

    model: nn.Module
    wrapped: nn.Module  # the same, as processes share it
    averaged: nn.Module | None  # of averaged parameters, where they are averaged
    ema: Any  # timm's, which averages them
    clipped: list[nn.Parameter]  # by adaptive clipping
    plan: Plan | None  # of the conversion, where the model was converted


@dataclass(frozen=True)
class PreparedOptimizer:
    """Optimizer of a training and the schedule of its learning rate."""

    optimizer: Any
    schedule: Any
    total_steps: int


@dataclass(frozen=True)
class Setup:
    """Recipe with everything that its training needs before the first step."""

    recipe: Recipe
    accelerator: Any
    data: PreparedData
    network: PreparedNetwork
    optimizer: PreparedOptimizer


def prepare(recipe: Recipe, accelerator: Any, data: Data) -> Setup:
    """Build and prepare data, network and optimizer.

    Raises ValueError for a recipe that cannot be, TrainingError for a network that does not run on the images.
    """
    data = hold_out(data) if recipe.test_on == "validation" else data
    count = recipe.train_images
    data = data if count is None else dataclasses.replace(data, train=Subset.spaced(data.train, count))
    seed_everything(recipe.seed)
    model = _build_model(recipe, accelerator, data)
    prepared = _prepare_data(recipe, accelerator, data, model)
    plan = None
    if recipe.convert:
        model, plan = _convert(recipe, model, prepared)
    network, optimizer = _prepare_network(recipe, accelerator, model, plan, prepared.order.steps)
    return Setup(recipe, accelerator, prepared, network, optimizer)


def _dtype(recipe: Recipe) -> torch.dtype:
    return torch.float64 if recipe.precision == "double" else torch.float32


def _build_model(recipe: Recipe, accelerator: Any, data: Data) -> nn.Module:
    model = build(recipe, data).to(_dtype(recipe))
    if recipe.initial:
        load_initial(model, recipe.initial)
    if recipe.channels_last and not accelerator.is_fsdp2:  # FSDP takes contiguous parameters only
        model.to(memory_format=torch.channels_last)
    return model


def _prepare_data(recipe: Recipe, accelerator: Any, data: Data, model: nn.Module) -> PreparedData:
    order = Order(
        len(data.train), recipe.batch, accelerator.num_processes * recipe.accumulate, recipe.seed,
        even=bool(recipe.mixup or recipe.cutmix), dealt=recipe.cut == "dealt",
        labels=None if recipe.cut == "shuffled" else data.train.labels,
    )  # fmt: skip
    train_size, test_size = image_sizes(recipe, model)
    channels = model_channels(model, data)
    images = torch.zeros(2, channels, train_size, train_size, dtype=_dtype(recipe))
    check_runs(model, recipe.model, images, test_size, data.classes)
    parts = Parts(order, accelerator.process_index, accelerator.num_processes)
    mixing = Mixing(recipe.mixup, recipe.cutmix, data.classes, recipe.seed) if order.even else collate
    transform = training_transform(recipe, data, train_size, channels)
    examples = Examples(data.train, transform, recipe.seed, training=True)
    pin = accelerator.device.type == "cuda"
    return PreparedData(
        data=data,
        order=order,
        parts=parts,
        examples=examples,
        train_batches=loader(examples, parts, workers=recipe.workers, pin=pin, collate=mixing),
        test_batches=testing_loader(recipe, data, test_size, channels, accelerator),
        normalized=Normalization(data, channels, _dtype(recipe)),
    )


def _convert(recipe: Recipe, model: nn.Module, prepared: PreparedData) -> tuple[nn.Module, Plan]:
    """Convert the model on training images; equal on all processes. Returns the plan that was followed too."""
    keys = prepared.order.step(0, 0)[:_CALIBRATION]
    images = prepared.normalized(collate(prepared.examples.__getitems__(keys)).images, torch.device("cpu"))
    try:
        conversion = convert(model, images, **parse_arguments(recipe.convert_args))
    except TypeError as error:
        raise ValueError(f"{recipe.model} cannot be converted: {error}") from error
    return conversion.model, conversion.plan


def _prepare_network(
    recipe: Recipe, accelerator: Any, model: nn.Module, plan: Plan | None, steps: int
) -> tuple[PreparedNetwork, PreparedOptimizer]:
    from accelerate.utils import fsdp2_prepare_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    groups = param_groups(model, weight_decay(recipe, model))
    optimizer = create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.peak_lr, momentum=recipe.momentum)
    total = recipe.epochs * steps
    warmup = min(round(recipe.warmup_epochs * steps), total - 1)
    schedule = CosineLRScheduler(
        optimizer, t_initial=max(total - warmup, 1), warmup_t=warmup, warmup_prefix=True,
        warmup_lr_init=recipe.peak_lr / max(warmup, 1), t_in_epochs=False,
    )  # fmt: skip
    sharded = accelerator.is_fsdp2
    ema = ModelEmaV3(model, decay=recipe.ema, foreach=not sharded) if recipe.ema else None
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if ema is not None:
        if sharded:
            fsdp2_prepare_model(accelerator, ema.module)
        else:
            ema.to(accelerator.device)
    excluded = {id(p) for head in classifiers(model) for p in head.parameters()}
    network = PreparedNetwork(
        model=model,
        wrapped=wrapped,
        averaged=None if ema is None else ema.module,
        ema=ema,
        clipped=[p for p in model.parameters() if id(p) not in excluded],
        plan=plan,
    )
    return network, PreparedOptimizer(optimizer, schedule, total)
