"""Everything that a recipe's training needs before its first step."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from normfree.conversion import Plan, convert
from normfree.training.build import (
    build,
    check_runs,
    classifiers,
    load_weights,
    model_channels,
    no_weight_decay,
    sizes,
    values,
    weight_decay,
)
from normfree.training.data.batches import Examples, Order, Parts, collate, loader
from normfree.training.data.datasets import Data, Fewer
from normfree.training.data.mixing import Mixing
from normfree.training.data.transforms import Normalization, testing_transform, training_transform
from normfree.training.recipes import Recipe
from normfree.training.sharding import configure

_CALIBRATION = 64  # images that a conversion sets the signal on


class Setup:
    """Data, network, optimizer and schedule of a recipe, prepared for this process."""

    def __init__(self, recipe: Recipe, accelerator: Any, data: Data) -> None:
        self.recipe = recipe
        self.dtype = torch.float64 if recipe.precision == "double" else torch.float32
        self.accelerator = accelerator
        fewer = recipe.train_images
        self.data = data if fewer is None else dataclasses.replace(data, train=Fewer(data.train, fewer))
        torch.manual_seed(recipe.seed)
        self.model = build(recipe, self.data).to(self.dtype)
        if recipe.initial:
            load_weights(self.model, recipe.initial)
        if recipe.channels_last and not accelerator.is_fsdp2:  # FSDP takes contiguous parameters only
            self.model.to(memory_format=torch.channels_last)
        self.order = Order(
            len(self.data.train), recipe.batch, self.accelerator.num_processes * recipe.accumulate, recipe.seed,
            even=bool(recipe.mixup or recipe.cutmix), dealt=recipe.cut == "dealt",
            labels=None if recipe.cut == "shuffled" else self.data.train.labels,
        )  # fmt: skip
        self._load_data()
        self.plan = self._convert() if recipe.convert else None
        self._prepare()

    def _load_data(self) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        train_size, test_size = sizes(recipe, self.model)
        channels = model_channels(self.model, self.data)
        images = torch.zeros(2, channels, train_size, train_size, dtype=self.dtype)
        check_runs(self.model, recipe.model, images, test_size, self.data.classes)
        self.normalized = Normalization(self.data, channels, self.dtype)
        self.parts = Parts(self.order, accelerator.process_index, accelerator.num_processes)
        test_order = testing_order(recipe, self.data, accelerator.num_processes)
        mixing = Mixing(recipe.mixup, recipe.cutmix, self.data.classes, recipe.seed) if self.order.even else collate
        settings: dict[str, Any] = {"workers": recipe.workers, "pin": accelerator.device.type == "cuda"}
        transform = training_transform(recipe, self.data, train_size, channels)
        self.examples = Examples(self.data.train, transform, recipe.seed, training=True)
        self.train_batches = loader(self.examples, self.parts, collate=mixing, **settings)
        transform = testing_transform(self.data, test_size, channels)
        self.test_batches = loader(
            Examples(self.data.test, transform, recipe.seed, training=False),
            Parts(test_order, accelerator.process_index, accelerator.num_processes),
            **settings,
        )

    def _convert(self) -> Plan:
        """Replace the normalizers of the model; the plan that was followed. Equal on all processes."""
        keys = self.order.step(0, 0)[:_CALIBRATION]
        images = self.normalized(collate(self.examples.__getitems__(keys)).images, torch.device("cpu"))
        try:
            conversion = convert(self.model, images, **values(self.recipe.convert_args))
        except TypeError as error:
            raise ValueError(f"{self.recipe.model} cannot be converted: {error}") from error
        self.model = conversion.model
        return conversion.plan

    def _prepare(self) -> None:
        from accelerate.utils import fsdp2_prepare_model
        from timm.optim import create_optimizer_v2, param_groups_weight_decay
        from timm.scheduler import CosineLRScheduler
        from timm.utils import ModelEmaV3

        recipe = self.recipe
        groups = param_groups_weight_decay(
            self.model, weight_decay(recipe, self.model), no_weight_decay_list=no_weight_decay(self.model)
        )
        optimizer = create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.peak_lr, momentum=recipe.momentum)
        total = recipe.epochs * self.order.steps
        warmup = min(round(recipe.warmup_epochs * self.order.steps), total - 1)
        self.schedule = CosineLRScheduler(
            optimizer, t_initial=max(total - warmup, 1), warmup_t=warmup, warmup_prefix=True,
            warmup_lr_init=recipe.peak_lr / max(warmup, 1), t_in_epochs=False,
        )  # fmt: skip
        self.total_steps = total
        sharded = self.accelerator.is_fsdp2
        self.ema = ModelEmaV3(self.model, decay=recipe.ema, foreach=not sharded) if recipe.ema else None
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if self.ema is not None:
            if sharded:
                fsdp2_prepare_model(self.accelerator, self.ema.module)
            else:
                self.ema.to(self.accelerator.device)
        excluded = {id(p) for head in classifiers(self.model) for p in head.parameters()}
        self.clipped = [p for p in self.model.parameters() if id(p) not in excluded]

    def close(self) -> None:
        """End the processes that load images."""
        self.train_batches.close()
        self.test_batches.close()

    @property
    def averaged(self) -> torch.nn.Module | None:
        """The network of averaged parameters, where they are averaged."""
        return None if self.ema is None else self.ema.module


def testing_order(recipe: Recipe, data: Data, processes: int) -> Order:
    """The test set in order, in batches no larger than those of training, and of 256 images a process at most."""
    batch = min(max(recipe.batch // recipe.accumulate, processes), 256 * processes)
    return Order(len(data.test), batch, processes, recipe.seed, shuffle=False)


def _on_cpus() -> bool:
    """As `accelerate launch --cpu` asks, or for want of an accelerator: processes would not find each other else."""
    from accelerate.utils import parse_flag_from_env

    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


@contextlib.contextmanager
def together() -> Iterator[Any]:
    """accelerate's PartialState, for several trainings by the same processes; afterwards it is as it was."""
    from accelerate.state import AcceleratorState, PartialState

    ours = not PartialState._shared_state
    state = PartialState(cpu=_on_cpus())
    try:
        yield state
    finally:
        if ours:
            state.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def accelerated(recipe: Recipe, out: Path) -> Iterator[Any]:
    """accelerate's Accelerator as the recipe asks for it; afterwards its state is as it was.

    Raises ImportError for a tracker that is not installed, ValueError for kinds of sharding that are not supported.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import DistributedType

    trackers = [name for name in recipe.log if name != "csv"]  # metrics.csv is always written
    missing = set(trackers) - {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    if missing:
        raise ImportError(f"log needs {', '.join(sorted(missing))}: pip install {' '.join(sorted(missing))}")
    if recipe.precision == "fp16" and _on_cpus():
        raise ValueError("precision is fp16, in which CPUs do not train; bf16 they do")
    ours = not PartialState._shared_state
    accelerator = Accelerator(
        mixed_precision=recipe.precision if recipe.precision in ("bf16", "fp16") else "no",
        log_with=trackers or None,
        project_dir=str(out),
        cpu=_on_cpus(),
    )
    try:
        kind = accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
            kind == DistributedType.FSDP and not accelerator.is_fsdp2
        ):
            raise ValueError(
                f"accelerate is told to shard parameters by {kind.value}; of what it offers only FSDP 2 is supported "
                "(--use_fsdp --fsdp_version 2)"
            )
        if accelerator.is_fsdp2:
            configure(accelerator.state.fsdp_plugin)
        if trackers:
            described = {name: str(value) for name, value in dataclasses.asdict(recipe).items()}
            accelerator.init_trackers("normfree", config=described)
        yield accelerator
    finally:
        if ours:
            accelerator.end_training()
            AcceleratorState._reset_state(reset_partial_state=True)
