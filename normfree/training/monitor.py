"""The signal of a network while it trains, in anybody's loop."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from normfree.signal.inputs import tensors
from normfree.signal.records import Reader
from normfree.signal.report import STATISTICS, SignalRecord
from normfree.signal.tape import Tape
from normfree.training.log import Table

COLUMNS = ("step", "depth", "name", "stage", *STATISTICS)
"""Of signal.csv: a row per measured step and residual join (or weight layer), depth from 0."""


class SignalMonitor:
    """What `characterize` tells of a network at rest, told of live training batches, forward and backward.

        with SignalMonitor(model, every=100, path="signal.csv") as monitor:
            ...  # the training loop, as it is
        monitor.draw("signal.png")

    Every `every`-th forward pass in training mode, from the first on, is watched from outside; the others are not
    touched. Branches are measured as they are, gradients as the loss gives them.

    path   a .csv file that grows by a row for each measured step and join
    log    a function of a mapping of names to numbers and of the step, such as a tracker's

    Raises ValueError for `every` below 1, and for a compiled model (give the eager one that it was made from).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        path: str | Path | None = None,
        log: Callable[[Mapping[str, float], int], None] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        if hasattr(model, "_orig_mod"):
            raise ValueError("the model is compiled: give the eager one that it was made from")
        self.model = model
        self.every = every
        self.log = log
        self.step = 0  # forward passes in training mode so far; a loop may set it before each of its steps
        self.loss_scale = 1.0  # what the loop multiplies its loss by, as mixed precision does
        self.rows: list[dict[str, Any]] = []
        self.table = None if path is None else Table(Path(path), COLUMNS)
        self._reader: Reader | None = None
        self._measured = -1
        self._scale = 1.0

    def __enter__(self) -> "SignalMonitor":
        if self.table is not None:
            self.rows = [_parsed(row) for row in self.table.cut_back(self.step - 1)]
        own = self.model.__dict__.get("forward")  # that of a wrapper such as accelerate's
        inner = self.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not (self.model.training and torch.is_grad_enabled()):
                return inner(*args, **kwargs)
            self.collect()
            step, self.step = self.step, self.step + 1
            if step % self.every or step == self._measured:
                return inner(*args, **kwargs)
            self._measured, self._scale = step, self.loss_scale
            tape = Tape()
            reader = Reader(self.model, tape)
            out = tape.record(
                self.model, lambda: inner(*args, **kwargs), tensors((args, kwargs)), on_gradient=reader.keep_gradient
            )
            reader.read()
            self._reader = reader
            return out

        self._own = own
        self.model.forward = forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own is None:
            del self.model.forward
        else:
            self.model.forward = self._own
        self.collect()
        if self.table is not None:
            self.table.close()

    def collect(self) -> None:
        """Take in the last measured step, whose backward pass is over; called by itself before the next forward."""
        if self._reader is None:
            return
        records = self._reader.records()
        step, self._reader = self._measured, None
        numbers = [_numbers(record, self._scale) for record in records]
        rows = [
            {"step": step, "depth": depth, "name": record.name, "stage": record.stage} | found
            for depth, (record, found) in enumerate(zip(records, numbers, strict=True))
        ]
        self.rows += rows
        if self.table is not None:
            self.table.add(*rows)
        if self.log is not None:
            named = {
                f"signal/{record.name}/{name}": value
                for record, found in zip(records, numbers, strict=True)
                for name, value in found.items()
            }
            self.log(named, step)

    def draw(self, path: str | Path) -> Path:
        """Variance and squared mean, of signal and gradient, over depth and step, as .png, .svg or .html."""
        from normfree.training.curves import draw_signal

        self.collect()
        return draw_signal(self.rows, Path(path))


def _numbers(record: SignalRecord, loss_scale: float) -> dict[str, float]:
    found = {name: value for name in STATISTICS if (value := getattr(record, name)) is not None}
    return {name: value / loss_scale**2 if name.startswith("gradient") else value for name, value in found.items()}


def _parsed(row: Mapping[str, str]) -> dict[str, Any]:
    numbers = {name: float(row[name]) for name in STATISTICS if row[name]}
    return {"step": int(row["step"]), "depth": int(row["depth"]), "name": row["name"], "stage": row["stage"]} | numbers
