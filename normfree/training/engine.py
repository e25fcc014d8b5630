"""The training of a recipe, from one process to many, and its continuation where it stopped."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.errors import TrainingError
from normfree.training.batches import Batch
from normfree.training.checkpoint import Checkpoints, Position, read_position, restore
from normfree.training.evaluation import Accuracy, evaluate, totals
from normfree.training.faults import locate
from normfree.training.interruption import Interruption
from normfree.training.log import COLUMNS, Screen, Table
from normfree.training.monitor import SignalMonitor
from normfree.training.recipe import UNBOUND, Recipe
from normfree.training.setup import Setup


@dataclass(frozen=True)
class Result:
    """Of a training: accuracies on the test set, and whether it ended or was interrupted."""

    out: Path
    step: int
    finished: bool
    accuracy: Accuracy | None  # of the last evaluation, of the averaged parameters where there are any
    best: float  # highest top-1 accuracy so far, in percent


def train(
    recipe: Recipe, out: str | Path, *, resume: Literal["never", "auto"] = "never", quiet: bool = False
) -> Result:
    """Train as `recipe` says, into the folder `out`, on all processes of `accelerate launch` or `torchrun`.

    `resume="auto"` goes on after the newest whole checkpoint in `out`, or begins. `quiet` prints nothing. Interrupted
    (SIGTERM, Ctrl-C), it writes a checkpoint and returns.

    Raises ValueError for a recipe that cannot be, a folder that holds another run and data that has changed;
    FileNotFoundError for data that is not there; TrainingError where a loss is not finite, where a checkpoint cannot
    be written, and where too many images cannot be read.
    """
    training = Training(recipe, Path(out), resume, quiet)
    try:
        return training.run()
    finally:
        training.close()


class Training:
    """One run: what `train` sets up, step by step."""

    def __init__(self, recipe: Recipe, out: Path, resume: str, quiet: bool) -> None:
        if resume not in ("never", "auto"):
            raise ValueError(f"resume is {resume!r}; it must be 'never' or 'auto'")
        self.recipe = recipe
        self.out = out
        self.quiet = quiet
        _check_folder(recipe, out, resume)
        self.setup = Setup(recipe, out)
        self.accelerator = self.setup.accelerator
        self.checkpoints = Checkpoints(out / "checkpoints", recipe.keep)
        self.metrics = Table(out / "metrics.csv", COLUMNS)
        self.position = Position(examples=self.setup.order.examples, processes=self.accelerator.num_processes)
        self.accuracy: Accuracy | None = None
        torch.manual_seed(recipe.seed + 1 + self.accelerator.process_index)  # of dropout and stochastic depth
        self.accelerator.wait_for_everyone()  # until every process has found the folder in order
        if self.accelerator.is_main_process:
            out.mkdir(parents=True, exist_ok=True)
            self.checkpoints.clean()
            (out / "config.json").write_text(recipe.to_json())
        self.accelerator.wait_for_everyone()
        self.resumed = self._resume() if resume == "auto" else ""

    # ---- going on

    def _resume(self) -> str:
        path, problems = self.checkpoints.newest()
        for problem in problems:
            self._warn(f"{problem}: the one before it is taken")
        if path is None:
            return ""
        position = read_position(path)
        if position.examples != self.setup.order.examples:
            raise ValueError(
                f"{self.recipe.data} has {self.setup.order.examples} training images, but had {position.examples} when "
                f"{path} was written: the run cannot go on as it began"
            )
        restore(path, self.accelerator, self.setup.ema)
        self.position = dataclasses.replace(position, processes=self.accelerator.num_processes)
        return f"going on after step {position.step} ({path})"

    def _warn(self, text: str) -> None:
        if self.accelerator.is_main_process and not self.quiet:
            Screen(0, 0, False).say(f"normfree: {text}")

    # ---- the run

    def run(self) -> Result:
        """Train to the end or until interrupted."""
        if self.accelerator.is_main_process:
            self.metrics.cut_back(self.position.step)
        quiet = self.quiet or not self.accelerator.is_main_process
        self.screen = Screen(self.setup.total_steps, self.position.step, quiet)
        with Interruption() as interruption, self.screen as screen, self._monitor() as self.monitor:
            if self.resumed:
                screen.say(self.resumed)
            self.setup.wrapped.train()
            finished = self._epochs(interruption)
            if not finished:
                self._save()
                screen.say(f"stopped after step {self.position.step}; the same command with --resume auto goes on")
        if finished and self.accuracy is None:  # nothing was left to do
            self.accuracy = self._test(self.setup.ema.module if self.setup.ema is not None else self.setup.model)
        if finished and self.accelerator.is_main_process:
            self._finish()
        self.accelerator.wait_for_everyone()
        return Result(self.out, self.position.step, finished, self.accuracy, self.position.best)

    def _epochs(self, interruption: Interruption) -> bool:
        """Whether the end was reached."""
        recipe = self.recipe
        while self.position.epoch < recipe.epochs:
            self.clock, self.seen = time.perf_counter(), 0
            for step, batches in self._steps():
                stop = self._step(step, batches, interruption.asked)
                last = step + 1 == self.setup.order.steps
                self._advance(step=self.position.step + 1, step_in_epoch=step + 1)
                if last:
                    break
                if stop:
                    return False
                if recipe.checkpoint_every and self.position.step % recipe.checkpoint_every == 0:
                    self._save()
            epoch = self.position.epoch
            if (epoch + 1) % recipe.evaluate_every == 0 or epoch + 1 == recipe.epochs:
                self._evaluate()
            self._advance(epoch=epoch + 1, step_in_epoch=0)
            self._save()
            if interruption.asked and self._anywhere(interruption.asked) and self.position.epoch < recipe.epochs:
                return False
        return True

    def _advance(self, **changes: Any) -> None:
        self.position = dataclasses.replace(self.position, **changes)

    def _steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """The rest of the epoch's optimizer steps, each with this process's parts."""
        self.setup.parts.epoch, self.setup.parts.first_step = self.position.epoch, self.position.step_in_epoch
        batches = iter(self.setup.train_batches)
        for step in range(self.setup.parts.first_step, self.setup.order.steps):
            yield step, [next(batches) for _ in range(self.recipe.accumulate)]

    def _step(self, step: int, batches: list[Batch], asked: bool) -> bool:
        """One optimizer step; whether a process was asked to stop."""
        recipe, accelerator = self.recipe, self.accelerator
        count = self.setup.order.count(step)
        self.setup.schedule.step_update(self.position.step)
        sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
        for position, batch in enumerate(batches):
            last = position + 1 == len(batches)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.setup.wrapped):
                images, targets, weights = self._to_device(batch)
                if self.monitor is not None:
                    self.monitor.step = self.position.step
                logits = self.setup.wrapped(images)
                loss = self._loss(logits, targets, weights, count)
                # Processes' gradients are averaged, and the loss is a sum over all of them.
                accelerator.backward(loss * accelerator.num_processes)
            with torch.no_grad():
                sums[0] += loss.double() * count
                if targets.ndim == 1:
                    sums[1:3] += totals(logits.detach(), targets, weights)[2:4]
        sums[3] = float(asked)
        self._note_unreadable(batches)
        sums = accelerator.reduce(sums, "sum")
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.setup.model.parameters() if p.grad is not None])
        mean_loss = sums[0].item() / count
        if not math.isfinite(mean_loss) or (recipe.precision != "fp16" and not math.isfinite(norm.item())):
            self._not_finite(batches, count, mean_loss)
        else:
            self._clip(norm)
            self.setup.optimizer.step()
            if self.setup.ema is not None:
                self.setup.ema.update(self.setup.model, step=self.position.step)
        self.setup.optimizer.zero_grad()
        self.seen += count
        self.screen.step(self.position.step + 1)
        if (self.position.step + 1) % recipe.log_every == 0 or step + 1 == self.setup.order.steps:
            now = time.perf_counter()
            rows = {"top1": 100 * sums[1].item() / count, "top5": 100 * sums[2].item() / count}
            self._log(
                "train", self.position.step + 1, loss=mean_loss, lr=self.setup.optimizer.param_groups[0]["lr"],
                gradient_norm=norm.item(), images_per_second=self.seen / (now - self.clock),
                **(rows if batches[0].targets.ndim == 1 else {}),
            )  # fmt: skip
            self.clock, self.seen = now, 0
        return sums[3].item() > 0

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        device = self.accelerator.device
        images = batch.images.to(device, self.setup.dtype, non_blocking=True)
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        targets = batch.targets.to(device, non_blocking=True)
        return images, targets, batch.weights.to(device, non_blocking=True)

    def _loss(self, logits: Tensor, targets: Tensor, weights: Tensor, count: int) -> Tensor:
        """This part's share of the mean over the whole step's examples."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = targets.to(logits.dtype) if targets.ndim > 1 else targets
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.recipe.label_smoothing)
        return (losses * weights.to(losses.dtype)).sum() / count

    def _clip(self, norm: Tensor) -> None:
        recipe = self.recipe
        if not recipe.clip_adaptive and not recipe.clip_norm:
            return
        self.accelerator.unscale_gradients()
        if recipe.clip_adaptive:
            from timm.utils import adaptive_clip_grad

            adaptive_clip_grad(self.setup.clipped, recipe.clip_adaptive)
        else:
            torch.nn.utils.clip_grads_with_norm_(list(self.setup.model.parameters()), recipe.clip_norm, norm)

    def _not_finite(self, batches: list[Batch], count: int, loss: float) -> None:
        what = f"the {'gradient' if math.isfinite(loss) else 'loss'} of step {self.position.step + 1} is not finite"
        if self.recipe.on_nonfinite == "skip":
            self.screen.say(f"{what}: the step is skipped")
            return

        def again() -> Tensor:
            parts = [self._to_device(batch) for batch in batches]
            return torch.stack([self._loss(self.setup.model(x), y, w, count) for x, y, w in parts]).sum()

        where = locate(self.setup.model, again)
        path, _ = self.checkpoints.newest()
        last = f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
        raise TrainingError(f"{what}; first of all, {where}; {last} (a lower learning rate, or on_nonfinite skip)")

    def _note_unreadable(self, batches: list[Batch]) -> None:
        found = [name for batch in batches for name in batch.unreadable]
        new = [name for name in dict.fromkeys(found) if name not in self.position.unreadable]
        for name in new:
            self.screen.say(f"cannot read {name}: another image takes its place")
        self._advance(unreadable=(*self.position.unreadable, *new))
        if len(self.position.unreadable) > self.recipe.max_unreadable:
            raise TrainingError(
                f"{len(self.position.unreadable)} images cannot be read, more than max_unreadable="
                f"{self.recipe.max_unreadable}: {', '.join(self.position.unreadable[:5])}, …"
            )

    def _anywhere(self, flag: bool) -> bool:
        total = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return total.item() > 0

    def _monitor(self) -> Any:
        if not self.recipe.signal_every or not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        monitor = SignalMonitor(
            self.setup.model, every=self.recipe.signal_every, path=self.out / "signal.csv",
            log=lambda values, step: self.accelerator.log(dict(values), step=step),
        )  # fmt: skip
        monitor.step = self.position.step
        return monitor

    # ---- what is written

    def _evaluate(self) -> None:
        for kind, model in (("eval", self.setup.model), ("eval_ema", self.setup.ema and self.setup.ema.module)):
            if model is None:
                continue
            self.accuracy = self._test(model)
            self._log(kind, self.position.step, loss=self.accuracy.loss, top1=self.accuracy.top1,
                      top5=self.accuracy.top5)  # fmt: skip
        assert self.accuracy is not None
        if self.accuracy.top1 > self.position.best:
            self._advance(best=self.accuracy.top1, best_step=self.position.step)

    def _test(self, model: nn.Module) -> Accuracy:
        return evaluate(model, self.setup.test_batches, self.accelerator, self.setup.dtype)

    def _log(self, kind: str, step: int, **values: float) -> None:
        row = {"step": step, "epoch": self.position.epoch, "kind": kind} | values
        if self.accelerator.is_main_process:
            self.metrics.add(row)
            self.screen.row(row)
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def _save(self) -> None:
        self.checkpoints.save(self.accelerator, self.position, self.setup.ema)

    def _finish(self) -> None:
        from safetensors.torch import save_model

        save_model(self.setup.model, str(self.out / "model.safetensors"))
        if self.setup.ema is not None:
            save_model(self.setup.ema.module, str(self.out / "model_ema.safetensors"))
        from normfree.training.curves import draw

        draw([self.out], self.out / "curves.png")
        if self.monitor is not None and self.monitor.rows:
            self.monitor.draw(self.out / "signal.png")

    def close(self) -> None:
        """Let go of files, workers and trackers."""
        self.metrics.close()
        self.accelerator.end_training()


def _check_folder(recipe: Recipe, out: Path, resume: str) -> None:
    path = out / "config.json"
    if not path.exists():
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is no folder")
        return
    if resume == "never":
        raise ValueError(f"{out} holds a run already: choose another folder, or --resume auto to go on with it")
    before = Recipe.from_json(path)
    changed = [
        f"{f.name} is {getattr(recipe, f.name)!r}, was {getattr(before, f.name)!r}"
        for f in dataclasses.fields(Recipe)
        if f.name not in UNBOUND and getattr(recipe, f.name) != getattr(before, f.name)
    ]
    if changed:
        raise ValueError(f"{out} holds the run of another recipe ({'; '.join(changed)}): it cannot go on with this one")
