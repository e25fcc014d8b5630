"""Checkpoints that are complete or not there, and that run nothing when they are read."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from normfree.errors import TrainingError
from normfree.files.documents import document_text, from_values, read_document
from normfree.files.tensors import read_tensors, write_tensors
from normfree.files.whole import reason, sync, write_whole
from normfree.training.recipes import Recipe
from normfree.training.run.folder import RECIPE
from normfree.training.sharding import load_full_state

FORMAT = 1
"""Number of position.json's format."""

_MANIFEST, _POSITION, _AVERAGED = "manifest.json", "position.json", "model_ema.safetensors"


@dataclass(frozen=True)
class Position:
    """Position in a training at which a checkpoint is written."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # that the next step belongs to
    step_in_epoch: int = 0
    parts: int = 1  # that a step's batch is cut into, over all processes
    seconds: float = 0.0  # of training so far
    best: float = -1.0  # highest accuracy of an evaluation so far, in percent
    best_step: int = -1
    unreadable: tuple[str, ...] = ()
    threads: int = 0  # of the first process's torch, on which the last bits depend; 0: not known


class Checkpoints:
    """The checkpoints of a recipe's run: the newest that it keeps, and the best."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self.recipe = recipe

    def save(self, accelerator: Any, position: Position, averaged: torch.nn.Module | None) -> Path:
        """Write one, of every process's state and the averaged network.

        It has another name until all of it is on the disk. Raises TrainingError where it cannot be written; those that
        were there stay.
        """
        final = self.folder / f"step_{position.step:08d}"
        temporary = self.folder / f".writing_{position.step:08d}"
        try:
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(temporary))
            weights = None if averaged is None else accelerator.get_state_dict(averaged)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                if weights is not None:
                    write_tensors(temporary / _AVERAGED, weights)
                write_whole(temporary / RECIPE, self.recipe.to_json())
                write_whole(temporary / _POSITION, document_text(asdict(position), format=FORMAT))
                _seal(temporary)
                replaced = self.folder / f".writing_{position.step:08d}_before"
                if final.exists():
                    final.rename(replaced)
                temporary.rename(final)
                shutil.rmtree(replaced, ignore_errors=True)
                sync(self.folder)
                self._forget(position)
            accelerator.wait_for_everyone()
        except Exception as error:  # torch and safetensors have errors of their own for a full disk
            words = reason(error, self.folder)
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary, ignore_errors=True)
            raise TrainingError(f"cannot write a checkpoint to {self.folder}: {words}; {self.last_good()}") from error
        return final

    def _forget(self, position: Position) -> None:
        found = sorted(path for path in self.folder.glob("step_*") if path.name <= f"step_{position.step:08d}")
        for path in found[: -self.recipe.keep]:
            if path.name != f"step_{position.best_step:08d}":
                shutil.rmtree(path, ignore_errors=True)

    def last_good(self) -> str:
        """Name the newest complete checkpoint, in words."""
        path, _ = self.newest()
        return f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"

    def newest(self) -> tuple[Path | None, list[str]]:
        """Find the newest complete checkpoint, and what is wrong with those that are newer."""
        problems: list[str] = []
        for path in sorted(self.folder.glob("step_*"), reverse=True):
            problem = find_damage(path)
            if problem is None:
                return path, problems
            problems.append(f"{path} is damaged: {problem}")
        return None, problems

    def clean(self) -> None:
        """Remove what an interrupted writing left; what it had moved out of the way returns, if its place is empty."""
        for path in self.folder.glob(".writing_*_before"):
            place = self.folder / path.name.replace(".writing_", "step_").removesuffix("_before")
            if not place.exists():
                path.rename(place)
        for path in self.folder.glob(".writing_*"):
            shutil.rmtree(path, ignore_errors=True)


def read_position(path: Path) -> Position:
    """Read at which position the checkpoint was written. Raises TrainingError for a file that is none of ours."""
    try:
        values = read_document(path / _POSITION, "checkpoint's position", format=FORMAT)
        return from_values(Position, values, needed=[f.name for f in fields(Position) if f.name != "threads"])
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} is no checkpoint of normfree: {error}") from error


def restore(path: Path, accelerator: Any, averaged: torch.nn.Module | None) -> None:
    """Restore model, optimizer, scaler and random numbers, and the averaged network.

    Tensors are read as safetensors or by torch's weights-only loader, the rest as JSON. Raises TrainingError where a
    file does not fit.
    """
    from accelerate.utils import load
    from accelerate.utils.constants import FSDP_MODEL_NAME, RNG_STATE_NAME

    sharded = (path / f"{FSDP_MODEL_NAME}.bin").exists()
    if sharded != accelerator.is_fsdp2:
        which = "sharded" if sharded else "whole"
        raise TrainingError(
            f"{path} was written with {which} parameters (FSDP or not): go on with it as it was launched"
        )
    states = path / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl"
    try:
        if states.exists():  # which accelerate itself passes over, without a word, if it cannot read it
            load(states)
        accelerator.load_state(str(path))
        if averaged is not None:
            load_full_state(averaged, read_tensors(path / _AVERAGED)[0])
    except Exception as error:
        raise TrainingError(f"{path} does not fit this training: {error}") from error


def find_damage(path: Path) -> str | None:
    """Say what is wrong with the files of a checkpoint, or None."""
    try:
        files: dict[str, Any] = read_document(path / _MANIFEST, "list of a checkpoint's files")["files"]
        if missing := {RECIPE, _POSITION} - files.keys():
            return f"{_MANIFEST} does not list {min(missing)}"
        for name, expected in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
            if _digest(file) != expected["blake2b"]:
                return f"{name} is not what was written"
    except (AttributeError, OSError, ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} cannot be read ({error})"
    return None


def _seal(folder: Path) -> None:
    """Bring every file to the disk, and write down what they are."""
    files = {}
    for file in _files(folder):
        files[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "blake2b": _digest(file)}
        sync(file)
    write_whole(folder / _MANIFEST, document_text({"files": files}))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()
