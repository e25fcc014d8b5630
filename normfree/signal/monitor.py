"""The signal of a network while it trains, in anybody's loop."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from normfree.arguments import checked
from normfree.files.csv_tables import Table, reading_rows
from normfree.signal.monitor_figure import draw_signal
from normfree.signal.reader import Reader
from normfree.signal.record import STATISTICS, SignalRecord
from normfree.trace.inputs import tensors
from normfree.trace.recorder import recording
from normfree.trace.tape import Tape

COLUMNS = ("step", "depth", "name", "stage", *STATISTICS)
"""Columns of signal.csv, a row per measured step and residual join (or weight layer), depth from 0."""


class SignalMonitor:
    """Statistics of `characterize`, on live training batches, forward and backward.

    ::

        with SignalMonitor(model, every=100, path="signal.csv") as monitor:
            ...  # the training loop, as it is
        monitor.draw("signal.png")

    Every `every`-th forward pass in training mode, from the first on, is watched from outside; the others are not
    touched. Branches are measured as they are, gradients as the loss gives them; networks without residual joins are
    measured at their weight layers. Where several forward passes make a step, the loop says so by setting `step` before
    each; of those of a step the first is watched. What is copied or saved of the model meanwhile is not watched.

    Args:
        model: Network that is trained; the eager one, where it is compiled.
        every: Forward passes in training mode from one measurement to the next.
        path: A .csv file that grows by a row for each measured step and join; rows of `step` and later are written
            anew.
        log: Function of a mapping of names to numbers and of the step, such as a tracker's.
        step: Steps that were taken before, by a training that goes on.

    Raises:
        ValueError: For `every` below 1, and for a compiled model.
        TrainingError: Where it is entered and `path` is another file or cannot be written.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        path: str | Path | None = None,
        log: Callable[[Mapping[str, float], int], None] | None = None,
        step: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        if hasattr(model, "_orig_mod"):
            raise ValueError("the model is compiled: give the eager one that it was made from")
        self.model: nn.Module | None = model
        self.every = every
        self.log = log
        self.step = step
        self.loss_scale = 1.0  # what the loop multiplies its loss by, as mixed precision does
        self.rows: list[dict[str, Any]] = []
        self.table = None if path is None else Table(Path(path), COLUMNS)
        self._reader: Reader | None = None
        self._weight_layers = True  # until the first measurement has found joins
        self._measured = -1
        self._scale = 1.0
        self._recording: contextlib.AbstractContextManager[Any] | None = None
        self._hooks = contextlib.ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model takes a copy of its hooks along: they watch nothing."""
        return {"model": None}

    def __enter__(self) -> "SignalMonitor":
        assert self.model is not None
        if self.table is not None:
            rows = self.table.cut_back(self.step - 1)
            with reading_rows(self.table.path):
                self.rows = [_parsed(row) for row in rows]
        _hide_hooks_from_compilers()
        self._hooks.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        end = self.model.register_forward_hook(self._end, with_kwargs=True, always_call=True)
        self._hooks.callback(end.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._stop(complete=False)  # of a forward pass that was interrupted
        self.collect()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not self.model or not (module.training and torch.is_grad_enabled()):
            return
        step, self.step = self.step, self.step + 1
        due = step % self.every == 0 and step != self._measured
        if self._reader is not None and (due or self._reader.gradients):
            self.collect()
        if due:
            self._measured, self._scale = step, self.loss_scale
            tape = Tape()
            self._reader = reader = Reader(module, tape)
            self._recording = recording(
                tape,
                module,
                tensors((args, kwargs)),
                reduce_weight_layers=self._weight_layers,
                on_gradient=reader.keep_gradient,
            )
            self._recording.__enter__()

    def _end(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if module is self.model:
            self._stop(complete=out is not None)  # None: the forward raised

    def _stop(self, *, complete: bool) -> None:
        if self._recording is None:
            return
        self._recording.__exit__(None, None, None)
        self._recording = None
        assert self._reader is not None
        if complete:
            self._reader.read()
            self._weight_layers = not self._reader.joins
        else:
            self._reader = None

    def collect(self) -> None:
        """Take in the last measured step; called by itself at the first forward pass after its backward pass."""
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
        self.collect()
        return draw_signal(self.rows, Path(path))


@functools.cache
def _hide_hooks_from_compilers() -> None:
    """Wrap the hooks, once; as decorators they would import torch's compiler together with this package."""
    for name in ("_begin", "_end"):
        setattr(SignalMonitor, name, torch.compiler.disable(getattr(SignalMonitor, name)))


def _numbers(record: SignalRecord, loss_scale: float) -> dict[str, float]:
    found = {name: value for name in STATISTICS if (value := getattr(record, name)) is not None}
    return {name: value / loss_scale**2 if name.startswith("gradient") else value for name, value in found.items()}


def _parsed(row: Mapping[str, str]) -> dict[str, Any]:
    numbers = {name: float(row[name]) for name in STATISTICS if row[name]}
    return {"step": int(row["step"]), "depth": int(row["depth"]), "name": row["name"], "stage": row["stage"]} | numbers
