"""The training of a recipe, from one process to many, and its continuation where it stopped."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from normfree.errors import NotFiniteError, TrainingError
from normfree.files import replacing
from normfree.signal.monitor import SignalMonitor
from normfree.training.data.batches import Batch
from normfree.training.data.datasets import Data, load
from normfree.training.evaluation import Accuracy, evaluate, too_many
from normfree.training.interruption import Interruption
from normfree.training.nonfinite import locate
from normfree.training.recipes import Recipe
from normfree.training.run import folder
from normfree.training.run.checkpoint import Checkpoints, Position, read_position, restore
from normfree.training.run.screen import COLUMNS, Screen, Table
from normfree.training.setup import Setup, accelerated
from normfree.training.sharding import finite
from normfree.training.step import Outcome, Step


@dataclass(frozen=True)
class Result:
    """Of a training: accuracies on the test set, and whether it ended or was interrupted."""

    out: Path
    step: int
    finished: bool
    accuracy: Accuracy | None  # of the last evaluation, of the averaged parameters where there are any
    best: float  # highest top-1 accuracy so far, in percent
    asked: bool = False  # to stop, by a signal, even if it ended first
    seconds: float = 0.0  # of training and testing, before an interruption and after it


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: Literal["never", "auto"] = "never",
    quiet: bool = False,
    data: Data | None = None,
) -> Result:
    """Train as `recipe` says, into the folder `out`, on all processes of `accelerate launch` or `torchrun`.

    On several machines `out` is a folder that all of them see. `resume="auto"` goes on after the newest whole
    checkpoint in it, or begins. `quiet` prints nothing. `data` is what the recipe's `data` names, where it is loaded
    already. Interrupted (SIGTERM, Ctrl-C), it writes a checkpoint and returns.

    Raises ValueError for a recipe that cannot be, a folder that holds another run and data that has changed;
    FileNotFoundError for data that is not there; TrainingError where a loss is not finite, where a file cannot be
    written, and where too many images cannot be read.
    """
    if resume not in ("never", "auto"):
        raise ValueError(f"resume is {resume!r}; it must be 'never' or 'auto'")
    folder.check_free(recipe, Path(out), resume)
    with accelerated(recipe, Path(out)) as accelerator:
        training = Training(recipe, Path(out), accelerator, quiet, data or load(recipe.data))
        try:
            return training.run(resume == "auto")
        finally:
            training.close()


class Training:
    """One run, on one of its processes."""

    def __init__(self, recipe: Recipe, out: Path, accelerator: Any, quiet: bool, data: Data) -> None:
        self.recipe = recipe
        self.out = out
        self.accelerator = accelerator
        self.setup = Setup(recipe, accelerator, data)
        self.take_step = Step(self.setup)
        self.checkpoints = Checkpoints(out / "checkpoints", recipe)
        self.metrics = Table(out / "metrics.csv", COLUMNS)
        self.start = time.perf_counter()  # less what was spent before an interruption
        self.position = Position(parts=self._cut)
        self.saved: Position | None = None
        self.accuracy: Accuracy | None = None
        self.screen = Screen(self.setup.total_steps, quiet or not accelerator.is_main_process)
        torch.manual_seed(recipe.seed + 1 + accelerator.process_index)  # of dropout and stochastic depth
        folder.check_data(recipe.data, self.setup.data, out)
        accelerator.wait_for_everyone()  # until every process has found the folder in order
        if accelerator.is_main_process:
            self.checkpoints.clean()
            folder.write(out, recipe, self.setup.data, self.setup.plan)
        accelerator.wait_for_everyone()

    # ---- the run

    def run(self, resume: bool) -> Result:
        """Train to the end or until interrupted."""
        with Interruption() as interruption:
            if resume:
                self._resume()
            if self.accelerator.is_main_process:
                evaluated = self.position.step_in_epoch == 0
                self.metrics.cut_back(self.position.step, including=lambda row: evaluated or row["kind"] == "train")
            with self.screen as screen, self._monitor() as self.monitor:
                screen.step(self.position.step)
                self.setup.wrapped.train()
                finished = self._epochs(interruption)
                if not finished:
                    self._save()
                    screen.say(f"stopped after step {self.position.step}; the same command with --resume auto goes on")
            if finished and self.accuracy is None:  # nothing was left to do
                self.accuracy = self._test(self.setup.averaged or self.setup.model)
            if finished:
                self._finish()
            self.accelerator.wait_for_everyone()
        return Result(
            self.out, self.position.step, finished, self.accuracy, self.position.best, interruption.asked,
            time.perf_counter() - self.start,
        )  # fmt: skip

    def close(self) -> None:
        """End the processes that load images, and what is written by rows."""
        self.setup.close()
        self.metrics.close()

    @property
    def _cut(self) -> int:
        """Parts of a step's batch."""
        return int(self.accelerator.num_processes) * self.recipe.accumulate

    def _resume(self) -> None:
        """Every process goes on from the checkpoint that the first one chooses."""
        chosen = self._from_first(self.checkpoints.newest() if self.accelerator.is_main_process else None)
        path, problems = chosen
        if path is None:
            if problems:
                raise TrainingError(f"{problems[0]}, and no other is whole: begin again in another folder")
            return
        for problem in problems:
            self.screen.say(f"{problem}: the one before it is taken")
        folder.check_recipe(self.recipe, path)
        position = read_position(path)
        if self.recipe.cut != "shuffled" and position.step_in_epoch and position.parts != self._cut:
            raise ValueError(
                f"{path} was written amid an epoch of batches in {position.parts} parts, not {self._cut}: with cut "
                f"{self.recipe.cut} it cannot go on"
            )
        restore(path, self.accelerator, self.setup.averaged)
        self.position = self.saved = dataclasses.replace(position, parts=self._cut)
        self.start -= position.seconds
        self.screen.say(f"going on after step {position.step} ({path})")

    def _epochs(self, interruption: Interruption) -> bool:
        """Whether the end was reached."""
        recipe = self.recipe
        while self.position.epoch < recipe.epochs:
            self.clock, self.seen, stop = time.perf_counter(), 0, False
            for step, batches in self._steps():
                stop = self._step(step, batches, interruption)
                self._advance(step=self.position.step + 1, step_in_epoch=step + 1)
                if step + 1 == self.setup.order.steps:
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
            if self._anywhere(interruption.asked) and self.position.epoch < recipe.epochs:
                return False
        return True

    def _advance(self, **changes: Any) -> None:
        self.position = dataclasses.replace(self.position, **changes)

    def _steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """The rest of the epoch's optimizer steps, each with this process's parts."""
        self.setup.parts.epoch, self.setup.parts.first_step = self.position.epoch, self.position.step_in_epoch
        if not len(self.setup.parts):
            return
        batches = iter(self.setup.train_batches)
        for step in range(self.setup.parts.first_step, self.setup.order.steps):
            yield step, [next(batches) for _ in range(self.recipe.accumulate)]

    def _step(self, step: int, batches: list[Batch], interruption: Interruption) -> bool:
        """Whether a process was asked to stop."""
        count = self.setup.order.count(step)
        unreadable = self._new_unreadable(batches)
        outcome = self.take_step(
            self.position.step, batches, count, asked=interruption.asked, unreadable=len(unreadable),
            monitor=self.monitor,
        )  # fmt: skip
        if outcome.unreadable:
            self._note_unreadable(unreadable)
        if not outcome.finite:
            self._not_finite(batches, count, outcome)
        self.seen += count
        done = self.position.step + 1
        self.screen.step(done)
        if done % self.recipe.log_every == 0 or step + 1 == self.setup.order.steps:
            now = time.perf_counter()
            self._log(
                "train", done, loss=outcome.loss, top1=outcome.top1, top5=outcome.top5,
                lr=self.setup.optimizer.param_groups[0]["lr"], gradient_norm=outcome.gradient_norm,
                images_per_second=self.seen / (now - self.clock),
            )  # fmt: skip
            self.clock, self.seen = now, 0
        return outcome.asked

    # ---- what goes wrong

    def _not_finite(self, batches: list[Batch], count: int, outcome: Outcome) -> None:
        part = "gradient" if outcome.loss - outcome.loss == 0 else "loss"
        what = f"the {part} of step {self.position.step + 1} is not finite"
        if self.recipe.on_nonfinite == "skip":
            self.screen.say(f"{what}: the step is skipped")
            return
        part_loss = self.take_step.part_loss
        found = [locate(self.setup.model, functools.partial(part_loss, batch, count)) for batch in batches]
        where = min((place for places in self._gather(found) for place in places), key=lambda place: place.vague)
        raise NotFiniteError(
            f"{what}; first of all, {where.words}; {self.checkpoints.last_good()} (begin again with a lower learning "
            "rate, or go on with on_nonfinite skip)"
        )

    def _new_unreadable(self, batches: list[Batch]) -> list[str]:
        found = dict.fromkeys(name for batch in batches for name in batch.unreadable)
        return [name for name in found if name not in self.position.unreadable]

    def _note_unreadable(self, names: list[str]) -> None:
        """On all processes: what any of them could not read."""
        new = list(dict.fromkeys(name for some in self._gather(names) for name in some))
        for name in new:
            self.screen.say(f"cannot read {name}")
        self._advance(unreadable=(*self.position.unreadable, *new))
        known = self.position.unreadable
        if len(known) > self.recipe.max_unreadable:
            raise TrainingError(f"{too_many(known, self.recipe.max_unreadable)}; {self.checkpoints.last_good()}")

    # ---- what processes tell each other

    def _gather(self, value: Any) -> list[Any]:
        from accelerate.utils import gather_object

        return gather_object([value])

    def _from_first(self, value: Any) -> Any:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def _anywhere(self, flag: bool) -> bool:
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return total.item() > 0

    # ---- what is measured and written

    def _monitor(self) -> Any:
        if not self.recipe.signal_every or not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        return SignalMonitor(
            self.setup.model, every=self.recipe.signal_every, path=self.out / "signal.csv",
            log=lambda values, step: self.accelerator.log(dict(values), step=step), step=self.position.step,
        )  # fmt: skip

    def _evaluate(self) -> None:
        for kind, model in (("eval", self.setup.model), ("eval_ema", self.setup.averaged)):
            if model is not None:
                self.accuracy = self._test(model)
                self._log(kind, self.position.step, loss=self.accuracy.loss, top1=self.accuracy.top1,
                          top5=self.accuracy.top5)  # fmt: skip
        assert self.accuracy is not None
        if self.accuracy.top1 > self.position.best:
            self._advance(best=self.accuracy.top1, best_step=self.position.step)

    def _test(self, model: nn.Module) -> Accuracy:
        accuracy, unreadable = evaluate(model, self.setup.test_batches, self.accelerator, self.setup.normalized)
        self._note_unreadable([name for name in unreadable if name not in self.position.unreadable])
        return accuracy

    def _log(self, kind: str, step: int, **values: float | None) -> None:
        values = {name: value for name, value in values.items() if value is not None}
        row = {"step": step, "epoch": self.position.epoch, "kind": kind} | values
        if self.accelerator.is_main_process:
            self.metrics.add(row)
            self.screen.row(row)
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def _save(self) -> None:
        if self.position == self.saved:
            return
        for name, parameter in self.setup.model.named_parameters():
            if not finite(parameter):
                raise NotFiniteError(
                    f"the parameter {name} is not finite after step {self.position.step}; "
                    f"{self.checkpoints.last_good()}"
                )
        self._advance(seconds=time.perf_counter() - self.start)
        self.checkpoints.save(self.accelerator, self.position, self.setup.averaged)
        self.saved = self.position

    def _finish(self) -> None:
        from normfree.training.run.curves import draw

        for name, model in (("model", self.setup.model), ("model_ema", self.setup.averaged)):
            if model is not None:
                weights = self.accelerator.get_state_dict(model)  # by all processes
                if self.accelerator.is_main_process:
                    with replacing(self.out / f"{name}.safetensors") as path:
                        self.accelerator.save(weights, path, safe_serialization=True)
        if not self.accelerator.is_main_process:
            return
        with replacing(self.out / "curves.png") as path:
            draw([self.out], path)
        if self.monitor is not None and self.monitor.rows:
            with replacing(self.out / "signal.png") as path:
                self.monitor.draw(path)
