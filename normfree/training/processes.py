"""Processes of a training: accelerate's state as a recipe asks for it, and as it was afterwards."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normfree.training.recipes import Recipe
from normfree.training.sharding import configure_fsdp


def _on_cpus() -> bool:
    """Tell whether to use CPUs: as `accelerate launch --cpu` asks, or for want of an accelerator."""
    from accelerate.utils import parse_flag_from_env

    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def seed_everything(seed: int) -> None:
    """Set the random states of torch, numpy and Python: a model of the user's may draw from any of them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def gather(value: Any) -> list[Any]:
    """Return the value of every process, on all of them."""
    from accelerate.utils import gather_object

    return gather_object([value])


def from_first(value: Any) -> Any:
    """Return the first process's value, on all of them."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def on_any(accelerator: Any, flag: bool) -> bool:
    """Tell whether the flag is set on any process."""
    total = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    return total.item() > 0


@contextlib.contextmanager
def shared_processes() -> Iterator[Any]:
    """Give accelerate's PartialState, for several trainings by the same processes; afterwards it is as it was."""
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
def accelerator_for(recipe: Recipe, out: Path) -> Iterator[Any]:
    """Give accelerate's Accelerator as the recipe asks for it; afterwards its state is as it was.

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
            configure_fsdp(accelerator.state.fsdp_plugin)
        if trackers:
            described = {name: str(value) for name, value in dataclasses.asdict(recipe).items()}
            accelerator.init_trackers("normfree", config=described)
        yield accelerator
    finally:
        if ours:
            accelerator.end_training()
            AcceleratorState._reset_state(reset_partial_state=True)
