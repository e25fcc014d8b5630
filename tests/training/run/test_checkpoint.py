"""Checkpoints that are whole or not there."""

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from normfree.errors import TrainingError
from normfree.training import RECIPES, train
from normfree.training.run import checkpoint
from normfree.training.run.checkpoint import Checkpoints, Position, _seal, find_damage, read_position

RECIPE = dataclasses.replace(
    RECIPES["digits"], model_args=("width=0.25",), epochs=1, batch=200, lr=0.1, log_every=4, checkpoint_every=2, keep=3
)


class Process:
    """What a checkpoint needs of accelerate."""

    is_main_process = True

    def __init__(self, error=None):
        self.error = error

    def wait_for_everyone(self):
        pass

    def save_state(self, folder):
        (Path(folder) / "model.safetensors").write_bytes(b"0" * 100)
        if self.error:
            raise self.error


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", dataclasses.replace(RECIPE, keep=2))


def test_the_newest_and_the_best_are_kept(checkpoints):
    for step in range(1, 7):
        checkpoints.save(Process(), Position(step=step, best_step=2), None)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step_00000002", "step_00000005", "step_00000006"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("failed writing file")])
def test_a_full_disk_leaves_the_last_good_one(checkpoints, error):
    checkpoints.save(Process(), Position(step=1), None)
    with pytest.raises(TrainingError, match=r"cannot write a checkpoint.*the last good checkpoint is .*step_00000001"):
        checkpoints.save(Process(error), Position(step=2), None)
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step_00000001"]
    assert find_damage(checkpoints.folder / "step_00000001") is None


def test_a_file_where_the_folder_should_be_is_an_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        Checkpoints(tmp_path / "checkpoints", RECIPE).save(Process(), Position(), None)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 60), "has 60 bytes, not 100"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1" * 100), "is not what was written"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").unlink(), "cannot be read"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(checkpoints, harm, words):
    for step in (1, 2):
        checkpoints.save(Process(), Position(step=step), None)
    harm(checkpoints.folder / "step_00000002")
    newest, (problem,) = checkpoints.newest()
    assert newest.name == "step_00000001"
    assert words in problem


def test_a_damaged_newer_one_does_not_push_out_a_new_one(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", dataclasses.replace(RECIPE, keep=1))
    checkpoints.save(Process(), Position(step=20), None)
    (checkpoints.folder / "step_00000020" / "model.safetensors").unlink()
    checkpoints.save(Process(), Position(step=15), None)
    newest, _ = checkpoints.newest()
    assert newest.name == "step_00000015"
    checkpoints.save(Process(), Position(step=20), None)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000020"]
    assert find_damage(checkpoints.folder / "step_00000020") is None


def test_a_run_goes_on_from_the_last_whole_one_and_ends_the_same(tmp_path):
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    train(RECIPE, whole, quiet=True)
    shutil.copytree(whole, hurt)
    (hurt / "model.safetensors").unlink()
    newest = max((hurt / "checkpoints").iterdir())
    file = newest / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-50])
    (hurt / "checkpoints" / ".writing_00000099").mkdir()
    train(RECIPE, hurt, resume="auto", quiet=True)
    assert (hurt / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (hurt / "checkpoints" / ".writing_00000099").exists()


def test_a_foreign_checkpoint_is_refused(tmp_path):
    out = tmp_path / "run"
    train(RECIPE, out, quiet=True)
    newest = max((out / "checkpoints").iterdir())
    (newest / "position.json").write_text('{"step": 1, "who": "knows"}')
    (newest / "manifest.json").unlink()
    _seal(newest)
    with pytest.raises(TrainingError, match="is no checkpoint of normfree"):
        train(RECIPE, out, resume="auto", quiet=True)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Of the same network, which would load."""
    first, second = tmp_path / "first", tmp_path / "second"
    train(RECIPE, first, quiet=True)
    recipe = dataclasses.replace(RECIPE, lr=0.2)
    train(recipe, second, quiet=True)
    theirs = max((first / "checkpoints").iterdir())
    shutil.rmtree(second / "checkpoints" / theirs.name)
    shutil.copytree(theirs, second / "checkpoints" / theirs.name)
    with pytest.raises(ValueError, match=rf"{theirs.name} is of another recipe \(lr is 0.2, was 0.1\)"):
        train(recipe, second, resume="auto", quiet=True)


class Runs:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_a_file_that_could_run_code_is_refused_and_runs_none(name, tmp_path):
    """A checkpoint as complete as ours, but for what its pickle would call."""
    witness, out = tmp_path / "witness", tmp_path / "run"
    train(RECIPE, out, quiet=True)
    newest = max((out / "checkpoints").iterdir())
    torch.save(Runs(witness), newest / name)
    (newest / "manifest.json").unlink()
    checkpoint._seal(newest)
    assert find_damage(newest) is None
    try:
        with pytest.raises(TrainingError, match="does not fit this training: Weights only load failed"):
            train(RECIPE, out, resume="auto", quiet=True)
    finally:
        assert not witness.exists()
    pickle.loads(pickle.dumps(Runs(witness)))
    assert witness.exists()  # anybody else would have run it


def test_what_was_put_aside_returns(checkpoints):
    folder = checkpoints.folder
    newest = checkpoints.save(Process(), Position(step=1), None)
    newest.rename(folder / f".writing_{newest.name.removeprefix('step_')}_before")
    (folder / ".writing_00000099").mkdir()
    checkpoints.clean()
    assert checkpoints.newest() == (newest, [])
    assert not list(folder.glob(".writing_*"))


def test_another_number_of_threads_is_said(tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(RECIPE, out, quiet=True)
    assert read_position(max((out / "checkpoints").iterdir())).threads == torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    with pytest.warns(UserWarning, match=r"going on with 63 threads, not \d+ as before: .*OMP_NUM_THREADS=\d+"):
        train(RECIPE, out, resume="auto", quiet=True)
