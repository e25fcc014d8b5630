"""Trainings on several processes: equal to one alone, and what happens when one of them dies or is asked to stop."""

import contextlib
import dataclasses
import json
import shutil
import signal
import subprocess
import time

import psutil
import pytest

from normfree.training import train
from tests.training.tiny import TINY, command, largest_difference, rows

pytestmark = pytest.mark.slow

DOUBLE = dataclasses.replace(TINY, precision="double", batch=72, stochastic_depth_rate=0.0, clip_norm=0.1)


def run(*arguments, **more):
    subprocess.run(command(*arguments, "--quiet", **more), check=True, capture_output=True, timeout=120)


def results(out):
    """What metrics.csv says, but for the speed."""
    return [
        float(value or 0)
        for row in rows(out)
        for name, value in row.items()
        if name not in ("kind", "images_per_second")
    ]


def test_one_process_two_and_accumulated_parts_train_alike(tmp_path):
    """Float64, 20 clipped steps of unequal last size and 359 test images, to 1e-10; not so with BatchNorm."""
    alone = tmp_path / "one"
    train(DOUBLE, alone, quiet=True)
    assert max(float(row["gradient_norm"] or 0) for row in rows(alone)) > DOUBLE.clip_norm
    for name, processes, parts in (("accumulated", 0, 4), ("two", 2, 1), ("two, accumulated", 2, 2)):
        out = tmp_path / name
        run(dataclasses.replace(DOUBLE, accumulate=parts), out, processes=processes)
        found = largest_difference(alone, out)
        assert found < 1e-10, f"{name}: {found}"
        assert results(out) == pytest.approx(results(alone), rel=1e-10), name
    position = next((tmp_path / "two" / "checkpoints").glob("*/position.json"))
    assert json.loads(position.read_text())["parts"] == 2


def test_the_first_step_does_not_depend_on_the_cut_but_with_batch_norm_does(tmp_path):
    """In float32, to 1e-6."""
    first = dataclasses.replace(DOUBLE, precision="no", train_images=DOUBLE.batch, warmup_epochs=0.0)
    for model, arguments, same in (("nf_resnet26", ("skip_gain=0.5",), True), ("bn_resnet26", (), False)):
        recipe = dataclasses.replace(first, model=model, model_args=(*first.model_args, *arguments))
        train(recipe, tmp_path / model, quiet=True)
        train(dataclasses.replace(recipe, accumulate=4), tmp_path / f"{model} accumulated", quiet=True)
        run(recipe, tmp_path / f"{model} two", processes=2)
        for cut in ("accumulated", "two"):
            found = largest_difference(tmp_path / model, tmp_path / f"{model} {cut}")
            assert found < 1e-6 if same else found > 1e-4, (model, cut, found)


LONG = dataclasses.replace(TINY, epochs=40, checkpoint_every=3, log_every=1)


def newest(out):
    return max((int(path.name.split("_")[1]) for path in out.glob("checkpoints/step_*")), default=0)


@contextlib.contextmanager
def started(out, *arguments, processes, beyond=0):
    """A run that has written a checkpoint after so many steps; afterwards it is killed."""
    process = subprocess.Popen(
        command(LONG, out, *arguments, processes=processes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while newest(out) <= beyond:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline  # against hanging
            time.sleep(0.1)
        yield process
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            each.kill()
        process.communicate()


def test_a_process_that_dies_ends_the_others_and_one_goes_on_or_two(tmp_path):
    out = tmp_path / "run"
    with started(out, "--quiet", processes=2) as process:
        psutil.Process(process.pid).children()[-1].kill()
        _, told = process.communicate(timeout=60)
        assert process.returncode != 0
        assert "normfree: " in told or "Signal 9" in told
    shutil.copytree(out, tmp_path / "again")
    for folder, processes in ((out, 0), (tmp_path / "again", 2)):
        before = newest(folder)
        with started(folder, "--resume", "auto", "--quiet", processes=processes, beyond=before):
            assert newest(folder) > before


def test_whichever_process_is_asked_to_stop_all_end_well(tmp_path):
    out = tmp_path / "run"
    with started(out, processes=2) as process:
        psutil.Process(process.pid).children()[-1].send_signal(signal.SIGTERM)
        printed, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert printed.count("--resume auto goes on") == 1
    assert newest(out) == len([row for row in rows(out) if row["kind"] == "train"])
