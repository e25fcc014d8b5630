"""Batches: examples and all that is random about them are functions of (seed, epoch, index) alone.

Nothing here depends on how many processes, accumulated parts or loading workers share the work.
"""

import contextlib
import multiprocessing
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from normfree.errors import TrainingError
from normfree.training.data.datasets import Images
from normfree.training.data.instances import UNREADABLE

_IN_A_ROW = 100


class Key(NamedTuple):
    """An example as the sampler asks for it; weight 0 only fills up a part."""

    epoch: int
    example: int  # index in the data set
    weight: float


class Example(NamedTuple):
    """A transformed image (C, H, W), and which image could not be read, if one could not ("" if all went well)."""

    image: Tensor
    label: int
    weight: float
    unreadable: str
    key: Key


class Batch(NamedTuple):
    """One process's part of an optimizer step, or one of its accumulated parts."""

    images: Tensor  # (N, C, H, W), pixels from 0 to 255
    targets: Tensor  # (N,) labels, or (N, classes) their mixtures
    weights: Tensor  # (N,): 1, or 0 for examples that only fill up
    unreadable: tuple[str, ...]


@contextlib.contextmanager
def reseedable() -> Iterator[Callable[..., None]]:
    """Give `seed(*numbers)`, after which Python, numpy and torch (on the CPU) draw from those numbers.

    Outside nothing has changed.
    """

    def seed(*numbers: int) -> None:
        value = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        random.seed(value)
        np.random.seed(value)
        torch.default_generator.manual_seed(value)

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield seed
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class Examples(Dataset[Example]):
    """Images made ready for a network, by `Key`.

    One that cannot be read is named; in training the next that can be read takes its place, in testing it weighs 0.
    """

    def __init__(self, images: Images, transform: Callable[[Any], Tensor], seed: int, *, training: bool) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self.training = training

    def __getitem__(self, key: Key) -> Example:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Example]:
        """Make a batch at once, as torch's loader asks for it."""
        with reseedable() as seed:
            return [self._make(key, seed) for key in keys]

    def _make(self, key: Key, seed: Callable[..., None]) -> Example:
        seed(self.seed, key.epoch, key.example)
        image, label, unreadable = self._read(key.example)
        weight = key.weight if self.training or not unreadable else 0.0
        return Example(self.transform(image), label, weight, unreadable, key)

    def _read(self, first: int) -> tuple[Any, int, str]:
        unreadable = ""
        for step in range(min(_IN_A_ROW, len(self.images))):
            index = (first + step) % len(self.images)
            try:
                return *self.images[index], unreadable
            except UNREADABLE as error:
                unreadable = unreadable or f"{self.images.name(index)} ({type(error).__name__})"
        raise TrainingError(f"none of {step + 1} images in a row can be read, the first is {unreadable}")


@dataclass(frozen=True)
class Order:
    """Order of an epoch's examples, cut into optimizer steps, and each of those into equal parts."""

    examples: int
    batch: int  # examples of an optimizer step
    parts: int  # processes · accumulated parts
    seed: int
    shuffle: bool = True
    even: bool = False  # parts of even size, so that mixed pairs stay together
    labels: Sequence[int] | None = None  # if given, batches are made of parts of one class each
    dealt: bool = False  # those batches, dealt out: every part has an example of every other part's class
    _kept: tuple[int, np.ndarray] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.labels is not None and self.batch % self.parts:
            raise ValueError(f"batch is {self.batch}; parts of one class need it to be a multiple of {self.parts}")

    @property
    def steps(self) -> int:
        """Number of optimizer steps per epoch; the last may be a smaller one."""
        return -(-self.examples // self.batch)

    def step(self, epoch: int, step: int) -> list[Key]:
        """List the examples of one step: equal parts, filled up with examples of weight 0."""
        chosen = self._order(epoch)[step * self.batch : (step + 1) * self.batch]
        if self.dealt and len(chosen) == self.batch:
            chosen = chosen.reshape(self.parts, -1).T.ravel()
        size = -(-len(chosen) // self.parts)
        size += size % 2 if self.even else 0
        filled = np.resize(chosen, size * self.parts)
        return [Key(epoch, int(index), float(position < len(chosen))) for position, index in enumerate(filled)]

    def _order(self, epoch: int) -> np.ndarray:
        """Shuffle the epoch's examples; kept, since every step asks for them."""
        if self._kept is None or self._kept[0] != epoch:
            order = np.arange(self.examples)
            if self.shuffle:
                np.random.default_rng((self.seed, epoch)).shuffle(order)
            if self.labels is not None:
                order = _grouped(order, self.labels, self.batch // self.parts)
            object.__setattr__(self, "_kept", (epoch, order))
        assert self._kept is not None
        return self._kept[1]

    def count(self, step: int) -> int:
        """Count the examples of a step that do not fill up."""
        return min(self.batch, self.examples - step * self.batch)


def _grouped(order: np.ndarray, labels: Sequence[int], size: int) -> np.ndarray:
    """Make groups of `size` of one class each, in the order in which they become full; what is left over at the end."""
    waiting: dict[int, list[int]] = {}
    groups: list[int] = []
    for index in order.tolist():
        group = waiting.setdefault(labels[index], [])
        group.append(index)
        if len(group) == size:
            groups += group
            group.clear()
    return np.array(groups + [index for group in waiting.values() for index in group])


class Parts:
    """A batch sampler: the parts of one process, in order, from `first_step` of `epoch` on; each step has `parts`."""

    def __init__(self, order: Order, process: int, processes: int) -> None:
        self.order = order
        self.process = process
        self.per_step = order.parts // processes
        self.epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return (self.order.steps - self.first_step) * self.per_step

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.first_step, self.order.steps):
            keys = self.order.step(self.epoch, step)
            size = len(keys) // self.order.parts
            for part in range(self.process * self.per_step, (self.process + 1) * self.per_step):
                yield keys[part * size : (part + 1) * size]


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples."""
    return Batch(
        torch.stack([e.image for e in examples]),
        torch.tensor([e.label for e in examples]),
        torch.tensor([e.weight for e in examples]),
        tuple(e.unreadable for e in examples if e.unreadable),
    )


class Loader(DataLoader[Example]):
    """A DataLoader that says what a worker could not do as the worker said it.

    It is closed when it is done with: its workers ignore signals, and Python would wait for them forever at its end.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except TrainingError as error:
            last = str(error).splitlines()[-1]  # of a worker's traceback
            raise TrainingError(last.removeprefix(f"{TrainingError.__module__}.{TrainingError.__name__}: ")) from None

    def close(self) -> None:
        """End its workers."""
        working: Any = self._iterator
        if working is not None:
            working._shutdown_workers()
            self._iterator = None


@contextlib.contextmanager
def watching_workers(advice: Callable[[], str]) -> Iterator[None]:
    """Say what a dead worker means, with advice: TrainingError. Torch tells of it amid whatever is done just then."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise TrainingError(
            f"a process that loads images has died, as where memory is wanting: take fewer workers{advice()}"
        ) from error


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals: one to all processes must not take the loading away from the last steps."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader(
    examples: Examples,
    parts: Parts,
    *,
    workers: int,
    pin: bool,
    collate: Callable[[Sequence[Example]], Batch] = collate,
) -> Loader:
    """Load the parts. Workers live as long as the loader, which draws nothing from torch's global random state."""
    return Loader(
        examples, batch_sampler=parts, num_workers=workers, collate_fn=collate, pin_memory=pin,
        persistent_workers=workers > 0, worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator().manual_seed(0), multiprocessing_context=_start_method() if workers else None,
    )  # fmt: skip


def _start_method() -> str | None:
    """Start workers from a process of its own where a fork may wait for ever, else as Python does.

    It may where other threads, as those of gloo, enter and leave Python: python/cpython#112275, mended in 3.11.10.
    """
    if sys.version_info >= (3, 11, 10) or not (dist.is_available() and dist.is_initialized()):
        return None
    multiprocessing.set_forkserver_preload(["normfree.training"])
    return "forkserver"
