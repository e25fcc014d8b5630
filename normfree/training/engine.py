"""The engine: a recipe's training, on one process or many, and its continuation where it stopped."""

import contextlib
import dataclasses
import functools
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from normfree.arguments import checked
from normfree.errors import NotFiniteError, TrainingError
from normfree.signal.monitor import SignalMonitor
from normfree.training.data.batches import Batch, watching_workers
from normfree.training.data.datasets import Data, load
from normfree.training.evaluation import evaluate, too_many_unreadable
from normfree.training.interruption import Interruption
from normfree.training.metrics import Accuracy
from normfree.training.nonfinite import locate_nonfinite
from normfree.training.processes import accelerator_for, from_first, gather, on_any, seed_everything
from normfree.training.recipes import Recipe
from normfree.training.run import folder
from normfree.training.run.checkpoint import Position, read_position, restore
from normfree.training.run.screen import Screen
from normfree.training.run.writer import RunWriter
from normfree.training.setup import prepare
from normfree.training.step import Outcome, Step


@dataclass(frozen=True)
class Result:
    """Result of a training: its accuracy, and whether it ended or was interrupted.

    Attributes:
        out: Folder of the run.
        step: Optimizer steps done.
        finished: Whether the training reached its end.
        accuracy: Accuracy of the last evaluation, of the averaged parameters where there are any, on the recipe's
            `test_on`.
        best: Highest top-1 accuracy so far, in percent.
        stop_requested: Whether a signal asked the training to stop, even if it ended first.
        seconds: Seconds of training and testing, before an interruption and after it.
    """

    out: Path
    step: int
    finished: bool
    accuracy: Accuracy | None
    best: float
    stop_requested: bool = False
    seconds: float = 0.0


@checked
def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: Literal["never", "auto"] = "never",
    quiet: bool = False,
    data: Data | None = None,
) -> Result:
    """Train as `recipe` says, into the folder `out`, on all processes of `accelerate launch` or `torchrun`.

    Interrupted (SIGTERM, Ctrl-C), it writes a checkpoint and returns.

    Args:
        recipe: Everything that the result depends on.
        out: Folder of the run; on several machines one that all of them see.
        resume: "auto" goes on after the newest complete checkpoint in the folder, or begins.
        quiet: Print nothing.
        data: Data set that the recipe's `data` names, where it is loaded already.

    Returns:
        The accuracy, and whether the training reached its end.

    Raises:
        ValueError: For a recipe that cannot be, a folder that holds another run, and data that has changed.
        FileNotFoundError: For data that is not there.
        TrainingError: Where a loss is not finite, a file cannot be written, or too many images cannot be read.
    """
    if resume not in ("never", "auto"):
        raise ValueError(f"resume is {resume!r}; it must be 'never' or 'auto'")
    folder.check_free(recipe, Path(out), resume)
    with accelerator_for(recipe, Path(out)) as accelerator:
        training = Training(recipe, Path(out), accelerator, quiet, data or load(recipe.data))
        try:
            return training.run(resume == "auto")
        finally:
            training.close()


class Training:
    """Loop of one run, on one of its processes."""

    def __init__(self, recipe: Recipe, out: Path, accelerator: Any, quiet: bool, data: Data) -> None:
        self.recipe = recipe
        self.out = out
        self.accelerator = accelerator
        self.setup = prepare(recipe, accelerator, data)
        self.take_step = Step(self.setup)
        self.screen = Screen(self.setup.optimizer.total_steps, quiet or not accelerator.is_main_process)
        self.writer = RunWriter(recipe, out, accelerator, self.setup.network, self.screen)
        self.position = Position(parts=self._parts)
        self.accuracy: Accuracy | None = None
        seed_everything(recipe.seed + 1 + accelerator.process_index)  # of dropout and stochastic depth
        folder.check_data(recipe.data, self.setup.data.data, out)
        folder.check_plan(self.setup.network.plan, out)
        accelerator.wait_for_everyone()  # until every process has found the folder in order
        if accelerator.is_main_process:
            self.writer.checkpoints.clean()
            folder.write_run(out, recipe, self.setup.data.data, self.setup.network.plan)
        accelerator.wait_for_everyone()

    # ---- the run

    def run(self, resume: bool) -> Result:
        """Train to the end or until interrupted."""
        with Interruption() as interruption:
            if resume:
                self._resume()
            self.writer.begin(self.position)
            watched = watching_workers(lambda: f", and go on with --resume auto; {self.writer.checkpoints.last_good()}")
            with self.screen as screen, self._monitor() as self.monitor, watched:
                screen.show_step(self.position.step)
                self.setup.network.wrapped.train()
                finished = self._epochs(interruption)
                if not finished:
                    self._save()
                    screen.print(
                        f"stopped after step {self.position.step}; the same command with --resume auto goes on"
                    )
            if finished and self.accuracy is None:  # nothing was left to do
                self.accuracy = self._test(self.setup.network.averaged or self.setup.network.model)
            if finished:
                self.writer.finish(self.monitor)
            self.accelerator.wait_for_everyone()
        return Result(
            self.out, self.position.step, finished, self.accuracy, self.position.best, interruption.requested,
            self.writer.seconds,
        )  # fmt: skip

    def close(self) -> None:
        """End the processes that load images."""
        self.setup.data.close()

    @property
    def _parts(self) -> int:
        """Parts of a step's batch."""
        return int(self.accelerator.num_processes) * self.recipe.accumulate

    def _resume(self) -> None:
        """Go on, on every process, from the checkpoint that the first one chooses."""
        newest = self.writer.checkpoints.newest() if self.accelerator.is_main_process else None
        path, problems = from_first(newest)
        if path is None:
            if problems:
                raise TrainingError(f"{problems[0]}, and no other is whole: begin again in another folder")
            return
        for problem in problems:
            self.screen.print(f"{problem}: the one before it is taken")
        folder.check_recipe(self.recipe, path)
        position = read_position(path)
        if self.recipe.cut != "shuffled" and position.step_in_epoch and position.parts != self._parts:
            raise ValueError(
                f"{path} was written amid an epoch of batches in {position.parts} parts, not {self._parts}: with cut "
                f"{self.recipe.cut} it cannot go on"
            )
        restore(path, self.accelerator, self.setup.network.averaged)
        threads = torch.get_num_threads()
        if position.threads not in (0, threads) and self.accelerator.device.type == "cpu":
            warnings.warn(
                f"going on with {threads} threads, not {position.threads} as before: on CPUs sums are then rounded "
                f"otherwise (OMP_NUM_THREADS={position.threads} goes on bit for bit)",
                stacklevel=2,
            )
        self.position = dataclasses.replace(position, parts=self._parts)
        self.writer.resumed(self.position)
        self.screen.print(f"going on after step {position.step} ({path})")

    def _epochs(self, interruption: Interruption) -> bool:
        """Train epoch after epoch; tell whether the end was reached."""
        recipe = self.recipe
        while self.position.epoch < recipe.epochs:
            self.clock, self.seen, stop = time.perf_counter(), 0, False
            for step, batches in self._steps():
                stop = self._step(step, batches, interruption)
                self._advance(step=self.position.step + 1, step_in_epoch=step + 1)
                if step + 1 == self.setup.data.order.steps:
                    break
                if stop:
                    return False
                if recipe.checkpoint_every and self.position.step % recipe.checkpoint_every == 0:
                    self._save()
            epoch = self.position.epoch
            if (epoch + 1) % recipe.evaluate_every == 0 or epoch + 1 == recipe.epochs:
                self._save()  # an evaluation may take longer than whoever stops a run waits
                if stop:
                    return False
                self._evaluate()
            self._advance(epoch=epoch + 1, step_in_epoch=0)
            self._save()
            if on_any(self.accelerator, interruption.requested) and self.position.epoch < recipe.epochs:
                return False
        return True

    def _advance(self, **changes: Any) -> None:
        self.position = dataclasses.replace(self.position, **changes)

    def _save(self) -> None:
        self.position = self.writer.save(self.position)

    def _steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """Load the rest of the epoch's optimizer steps, each with this process's parts."""
        parts = self.setup.data.parts
        parts.epoch, parts.first_step = self.position.epoch, self.position.step_in_epoch
        if not len(parts):
            return
        batches = iter(self.setup.data.train_batches)
        for step in range(parts.first_step, self.setup.data.order.steps):
            yield step, [next(batches) for _ in range(self.recipe.accumulate)]

    def _step(self, step: int, batches: list[Batch], interruption: Interruption) -> bool:
        """Take one step; tell whether a process was asked to stop."""
        order = self.setup.data.order
        count = order.count(step)
        unreadable = self._new_unreadable(batches)
        outcome = self.take_step(
            self.position.step, batches, count, stop_requested=interruption.requested, unreadable=len(unreadable),
            monitor=self.monitor,
        )  # fmt: skip
        if outcome.unreadable:
            self._note_unreadable(unreadable)
        if not outcome.finite:
            self._not_finite(batches, count, outcome)
        self.seen += count
        done = self.position.step + 1
        self.screen.show_step(done)
        if done % self.recipe.log_every == 0 or step + 1 == order.steps:
            now = time.perf_counter()
            self.writer.log(
                "train", self.position, done, loss=outcome.loss, top1=outcome.top1, top5=outcome.top5,
                lr=self.setup.optimizer.optimizer.param_groups[0]["lr"], gradient_norm=outcome.gradient_norm,
                images_per_second=self.seen / (now - self.clock),
            )  # fmt: skip
            self.clock, self.seen = now, 0
        return outcome.stop_requested

    # ---- faults

    def _not_finite(self, batches: list[Batch], count: int, outcome: Outcome) -> None:
        part = "gradient" if outcome.loss - outcome.loss == 0 else "loss"
        what = f"the {part} of step {self.position.step + 1} is not finite"
        if self.recipe.on_nonfinite == "skip":
            self.screen.print(f"{what}: the step is skipped")
            return
        model, part_loss = self.setup.network.model, self.take_step.part_loss
        found = [locate_nonfinite(model, functools.partial(part_loss, batch, count)) for batch in batches]
        origin = min((origin for origins in gather(found) for origin in origins), key=lambda origin: origin.uncertainty)
        raise NotFiniteError(
            f"{what}; first of all, {origin.words}; {self.writer.checkpoints.last_good()} (begin again with a lower "
            "learning rate, or go on with on_nonfinite skip)"
        )

    def _new_unreadable(self, batches: list[Batch]) -> list[str]:
        found = dict.fromkeys(name for batch in batches for name in batch.unreadable)
        return [name for name in found if name not in self.position.unreadable]

    def _note_unreadable(self, names: list[str]) -> None:
        """Note, on all processes, what any of them could not read."""
        new = list(dict.fromkeys(name for some in gather(names) for name in some))
        for name in new:
            self.screen.print(f"cannot read {name}")
        self._advance(unreadable=(*self.position.unreadable, *new))
        known = self.position.unreadable
        if len(known) > self.recipe.max_unreadable:
            raise TrainingError(
                f"{too_many_unreadable(known, self.recipe.max_unreadable)}; {self.writer.checkpoints.last_good()}"
            )

    # ---- measurements

    def _monitor(self) -> Any:
        if not self.recipe.signal_every or not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        monitor = SignalMonitor(
            self.setup.network.model, every=self.recipe.signal_every, statistics="all",
            optimizer=self.setup.optimizer.optimizer, path=self.out / "signal.csv", step=self.position.step,
        )  # fmt: skip
        monitor.on_record(lambda numbers, step: self.accelerator.log(dict(numbers), step=step))
        return monitor

    def _evaluate(self) -> None:
        network = self.setup.network
        for kind, model in (("eval", network.model), ("eval_ema", network.averaged)):
            if model is not None:
                self.accuracy = found = self._test(model)
                self.writer.log(
                    kind, self.position, self.position.step, loss=found.loss, top1=found.top1, top5=found.top5
                )
        assert self.accuracy is not None
        if self.accuracy.top1 > self.position.best:
            self._advance(best=self.accuracy.top1, best_step=self.position.step)

    def _test(self, model: nn.Module) -> Accuracy:
        data = self.setup.data
        accuracy, unreadable = evaluate(
            model, data.test_batches, self.accelerator, data.normalized, classes=data.data.classes
        )
        self._note_unreadable([name for name in unreadable if name not in self.position.unreadable])
        return accuracy
