"""The signal of a network while it trains, in anybody's loop."""

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from normfree.arguments import checked
from normfree.errors import SignalError
from normfree.files.csv_tables import Table, reading_rows
from normfree.signal.monitor_figure import draw_signal
from normfree.signal.monitor_rows import COLUMNS, TRAINING_STATISTICS, parsed_row, signal_rows, to_frame
from normfree.signal.reader import Reader
from normfree.signal.record import STATISTICS
from normfree.signal.remedies import Verdict
from normfree.signal.training_verdicts import find_training_verdicts, first_training_problem
from normfree.signal.updates import UpdateReader
from normfree.trace.inputs import tensors
from normfree.trace.recorder import recording
from normfree.trace.tape import Tape

_ALL = (*STATISTICS, *TRAINING_STATISTICS)
_OF_UPDATES = {"update_ratio", "gradient_rms"}
_OF_ZEROS = {"zeros", "dead"}


class SignalMonitor:
    """Statistics of `characterize`, and of training, on live training batches, forward and backward.

    ::

        with SignalMonitor(model, every=100, path="signal.csv") as monitor:
            ...  # the training loop, as it is
        monitor.draw("signal.png")

    Every `every`-th forward pass in training mode, from the first on, is watched from outside; the others are not
    touched. Branches are measured as they are, gradients as the loss gives them; networks without residual joins are
    measured at their weight layers. Where several forward passes make a step, the loop says so by setting `step` before
    each; of those of a step the first is watched. What is copied or saved of the model meanwhile is not watched.

    Beside the statistics of `SignalRecord` there are, when asked for by name:

    - `branch_to_stream`: root mean square of a join's branch, as it is added, over that of its shortcut;
    - `zeros` and `dead`: of a rectifier's output, the fraction of zeros, and of channels that are zero everywhere;
    - `update_ratio`: of a parameter, the root mean square of the optimizer's step over its own before it;
    - `gradient_rms`: root mean square of a parameter's gradient, as the optimizer takes it.

    What is not asked for costs nothing.

    Args:
        model: Network that is trained; the eager one, where it is compiled.
        every: Forward passes in training mode from one measurement to the next.
        statistics: Names of what is measured, or "all"; unless given, the statistics of `SignalRecord`.
        optimizer: Optimizer, or several, whose steps are measured: `update_ratio` and `gradient_rms` need it.
        names: Pattern, or several, of the names of modules and parameters that are kept, such as "layer3.*".
        path: A .csv file that grows by a row for each measured step and place; rows of `step` and later are written
            anew.
        step: Steps that were taken before, by a training that goes on.

    Attributes:
        rows: One dictionary for each measured step and place, with the columns of the .csv file that are known there.

    Raises:
        ValueError: For `every` below 1, statistics that are not known or need an optimizer, an optimizer of another
            model, and a compiled model.
        TrainingError: Where it is entered and `path` is another file or cannot be written.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        statistics: Sequence[str] = tuple(STATISTICS),
        optimizer: Any = None,
        names: str | Sequence[str] = "*",
        path: str | Path | None = None,
        step: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        if hasattr(model, "_orig_mod"):
            raise ValueError("the model is compiled: give the eager one that it was made from")
        self.model: nn.Module | None = model
        self.every = every
        self.statistics = _statistics(statistics, optimizer)
        self.step = step
        self.loss_scale = 1.0  # what the loop multiplies its loss by, as mixed precision does
        self.rows: list[dict[str, Any]] = []
        self.table = None if path is None else Table(Path(path), COLUMNS)
        self._patterns = [names] if isinstance(names, str) else list(names)
        if not self._patterns:
            raise ValueError('names is empty: give a pattern, such as "layer3.*"')
        optimizers = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        self._updates = (
            UpdateReader(model, optimizers, self.statistics, self._is_kept)
            if self.statistics & _OF_UPDATES and optimizer is not None
            else None
        )
        self._callbacks: list[Callable[[Mapping[str, float], int], Any]] = []
        self._reader: Reader | None = None
        self._weight_layers = True  # until the first measurement has found joins
        self._measured = -1
        self._pending = False  # a step was measured, and is not in the rows yet
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
                self.rows = [parsed_row(row) for row in rows]
        _hide_hooks_from_compilers()
        self._hooks.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        end = self.model.register_forward_hook(self._end, with_kwargs=True, always_call=True)
        self._hooks.callback(end.remove)
        if self._updates is not None:
            self._updates.attach(self._hooks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        self._stop(complete=False)  # of a forward pass that was interrupted
        self.collect()

    def on_record(self, callback: Callable[[Mapping[str, float], int], Any]) -> None:
        """Call a function after each measured step, such as a logger's: with numbers by their names, and the step.

        Names are "signal/layer3.4/variance": place and statistic.
        """
        if not callable(callback):
            raise TypeError(f"callback is a {type(callback).__name__}; it must be a function of numbers and step")
        self._callbacks.append(callback)

    # ---- while it trains

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is not self.model or not (module.training and torch.is_grad_enabled()):
            return
        step, self.step = self.step, self.step + 1
        due = step % self.every == 0 and step != self._measured
        if self._pending and (due or self._is_complete()):
            self.collect()
        if not due:
            return
        self._measured, self._scale, self._pending = step, self.loss_scale, True
        if self._updates is not None:
            self._updates.begin()
        if self.statistics <= _OF_UPDATES:
            return
        tape = Tape()
        self._reader = reader = Reader(module, tape)
        self._recording = recording(
            tape,
            module,
            tensors((args, kwargs)),
            reduce_weight_layers=self._weight_layers and self._wants_signal(),
            count_zeros=bool(self.statistics & _OF_ZEROS),
            on_gradient=reader.keep_gradient if self._wants_gradients() else None,
        )
        self._recording.__enter__()

    def _wants_signal(self) -> bool:
        return bool(self.statistics & {*STATISTICS, "branch_to_stream"})

    def _wants_gradients(self) -> bool:
        return any(name.startswith("gradient") and name in STATISTICS for name in self.statistics)

    def _is_complete(self) -> bool:
        """Tell whether the measured step has been taken, or its gradients have come where no optimizer is watched."""
        if self._updates is not None:
            return self._updates.is_read
        return self._reader is None or not self._wants_gradients() or bool(self._reader.gradients)

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
            self._reader, self._pending = None, False

    def collect(self) -> None:
        """Take in the last measured step; called by itself at the first forward pass after it."""
        if not self._pending:
            return
        reader, self._reader, self._pending = self._reader, None, False
        rows = [] if reader is None else signal_rows(reader, self.statistics, self._scale)
        rows += [] if self._updates is None else self._updates.rows()
        rows = [{"step": self._measured} | row for row in rows if self._is_kept(row["name"])]
        self.rows += rows
        if self.table is not None:
            self.table.add(*rows)
        if self._callbacks:
            numbers = {f"signal/{row['name']}/{name}": row[name] for row in rows for name in _ALL if name in row}
            for callback in self._callbacks:
                callback(numbers, self._measured)

    def _is_kept(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns)

    # ---- what was found

    @property
    def verdicts(self) -> list[Verdict]:
        """Sentences on the training so far: what goes wrong, where and from which step on; none where nothing does.

        Each is a string with its `remedy` and the `page` that explains it.
        """
        self.collect()
        return find_training_verdicts(self.rows)

    @checked
    def check(
        self,
        *,
        max_variance: float | None = None,
        max_dead: float | None = None,
        max_update_ratio: float | None = None,
        max_update_spread: float | None = None,
    ) -> None:
        """Raise SignalError at the first place outside the limits, or not finite, of the last measured step.

        Args:
            max_variance: Largest average channel variance at a join (or weight layer, in networks without).
            max_dead: Largest fraction of a rectifier's channels that are zero everywhere.
            max_update_ratio: Largest `update_ratio` of a weight (a parameter with two axes or more).
            max_update_spread: Largest quotient of two weights' `update_ratio`.

        Raises:
            SignalError: With the place and the step; also where nothing was measured that a limit is for.
        """
        self.collect()
        limits = {
            "variance": max_variance, "dead": max_dead, "update_ratio": max_update_ratio,
            "update_spread": max_update_spread,
        }  # fmt: skip
        problem = first_training_problem(
            self.rows, {name: limit for name, limit in limits.items() if limit is not None}
        )
        if problem is not None:
            raise SignalError(problem)

    def to_frame(self) -> Any:
        """Return the rows as a data frame, of pandas or of polars: of the one that is imported, else is installed.

        Raises ImportError where neither is installed.
        """
        self.collect()
        return to_frame(self.rows)

    def draw(self, path: str | Path) -> Path:
        """Each statistic over depth and step, as .png, .svg or .html."""
        self.collect()
        return draw_signal(self.rows, Path(path))


@functools.cache
def _hide_hooks_from_compilers() -> None:
    """Wrap the hooks, once; as decorators they would import torch's compiler together with this package."""
    for name in ("_begin", "_end"):
        setattr(SignalMonitor, name, torch.compiler.disable(getattr(SignalMonitor, name)))


def _statistics(wanted: Sequence[str], optimizer: Any) -> set[str]:
    names = set(_ALL) if wanted == "all" else {wanted} if isinstance(wanted, str) else set(wanted)
    unknown = sorted(names - set(_ALL))
    if unknown or not names:
        raise ValueError(f"statistics is {wanted!r}; choose from {', '.join(_ALL)}, or all")
    if names & _OF_UPDATES and optimizer is None:
        if wanted != "all":
            raise ValueError(f"{' and '.join(sorted(names & _OF_UPDATES))} need the optimizer: give it as optimizer=")
        names -= _OF_UPDATES
    return names
