"""The writer of a run: rows of metrics.csv, checkpoints, and at the end weights and figures."""

import dataclasses
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from normfree.errors import ChartError, NotFiniteError
from normfree.files.csv_tables import Table
from normfree.files.tensors import write_tensors
from normfree.signal.monitor import SignalMonitor
from normfree.training.recipes import Recipe
from normfree.training.run.checkpoint import Checkpoints, Position
from normfree.training.run.curves import draw_curves
from normfree.training.run.screen import Screen
from normfree.training.setup import PreparedNetwork
from normfree.training.sharding import all_finite

COLUMNS = ("step", "epoch", "kind", "loss", "top1", "top5", "lr", "gradient_norm", "images_per_second")
"""Columns of metrics.csv; kind is train, eval or eval_ema."""


class RunWriter:
    """Writer into a run's folder; only the first process writes, all of them call."""

    def __init__(self, recipe: Recipe, out: Path, accelerator: Any, network: PreparedNetwork, screen: Screen) -> None:
        self.out = out
        self.accelerator = accelerator
        self.network = network
        self.screen = screen
        self.checkpoints = Checkpoints(out / "checkpoints", recipe)
        self.metrics = Table(out / "metrics.csv", COLUMNS)
        self.start = time.perf_counter()  # less the seconds before an interruption
        self.saved: Position | None = None

    @property
    def seconds(self) -> float:
        """Seconds of the training so far, before an interruption and after it."""
        return time.perf_counter() - self.start

    def begin(self, position: Position) -> None:
        """Cut metrics.csv back to the position; rows of a test at it stay only if it ended an epoch."""
        if self.accelerator.is_main_process:
            evaluated = position.step_in_epoch == 0
            self.metrics.cut_back(position.step, keep=lambda row: evaluated or row["kind"] == "train")

    def resumed(self, position: Position) -> None:
        """Go on from a checkpoint that is on the disk."""
        self.saved = position
        self.start -= position.seconds

    def log(self, kind: str, position: Position, step: int, **values: float | None) -> None:
        """Add a row to metrics.csv, to the screen and to the trackers."""
        known = {name: value for name, value in values.items() if value is not None}
        row = {"step": step, "epoch": position.epoch, "kind": kind} | known
        if self.accelerator.is_main_process:
            self.metrics.add(row)
            self.screen.show_row(row)
        self.accelerator.log({f"{kind}/{name}": value for name, value in known.items()}, step=step)

    def save(self, position: Position) -> Position:
        """Write a checkpoint, unless there is one of this position already; return the position with its seconds.

        Raises NotFiniteError for a parameter that is not finite, TrainingError where it cannot be written.
        """
        if position == self.saved:
            return position
        for name, parameter in self.network.model.named_parameters():
            if not all_finite(parameter):
                raise NotFiniteError(
                    f"the parameter {name} is not finite after step {position.step}; {self.checkpoints.last_good()}"
                )
        self.saved = dataclasses.replace(position, seconds=self.seconds, threads=torch.get_num_threads())
        self.checkpoints.save(self.accelerator, self.saved, self.network.averaged)
        return self.saved

    def finish(self, monitor: SignalMonitor | None) -> None:
        """Write weights and figures."""
        for name, model in (("model", self.network.model), ("model_ema", self.network.averaged)):
            if model is not None:
                weights = self.accelerator.get_state_dict(model)  # by all processes
                if self.accelerator.is_main_process:
                    write_tensors(self.out / f"{name}.safetensors", weights)
        if not self.accelerator.is_main_process:
            return
        try:
            draw_curves([self.out], self.out / "curves.png")
            if monitor is not None and monitor.rows:
                monitor.draw(self.out / "signal.png")
        except ChartError as error:
            warnings.warn(str(error), stacklevel=2)
