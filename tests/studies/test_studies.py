"""Studies at a toy size, end to end, and what they make of failures and interruptions."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from normfree.models import create_model
from normfree.plotting import COLORS
from normfree.studies import charts, runner
from normfree.studies.definitions import STUDIES, define_study
from normfree.studies.results import build_table, write_results
from normfree.studies.runner import read_entries, run_study
from normfree.studies.study import Cell, Rates, Study
from normfree.studies.trainings import StudyTables, fingerprint
from normfree.training import RECIPES, Result
from normfree.training.metrics import Accuracy
from tests.helpers import slow_but


def small(name):
    """A toy study of narrow networks on large batches."""
    toy = define_study(name, "digits", "toy")
    cells = []
    for cell in toy.cells:
        recipe = cell.recipe
        if recipe.model_args and not recipe.model.startswith("normfree.studies.pretrained"):
            recipe = dataclasses.replace(recipe, model_args=("width=0.25", *recipe.model_args[1:]))
        cells.append(dataclasses.replace(cell, recipe=dataclasses.replace(recipe, batch=recipe.batch * 6)))
    return dataclasses.replace(toy, cells=tuple(cells))


def over(top1, folder, stop_requested=False):
    """What a training that has ended leaves and returns."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").touch()
    return Result(Path(), 1, True, Accuracy(100, 1.0, top1, top1, top1), top1, stop_requested, 1.0)


def accuracy_found(folder, **_):
    """What a test finds."""
    return Accuracy(100, 1.0, 80.0, 90.0, 70.0)


@pytest.mark.parametrize("name", slow_but({"batch-size"}, STUDIES))
def test_at_a_toy_size_every_cell_is_trained_once_and_has_its_place_in_the_table(name, tmp_path, weight_packages):
    toy, said = small(name), []
    found = run_study(toy, tmp_path, seeds=1, on_message=said.append)
    assert len(found) == len(toy.cells)
    steps = len(toy.cells) + sum(len(entry.tests) for entry in found)  # a training each, and a test unless that failed
    assert len(said) == steps
    assert [len(entry.trainings) for entry in found] == [1] * len(toy.cells)
    pictures = {"chart.png"} | {"ablation": {"signal.png", "signal.csv"}, "budget": {"memory.csv"}}.get(name, set())
    files = {"runs", "trainings.csv", "tests.csv", "results.csv", "table.md"} | pictures
    assert {path.name for path in tmp_path.iterdir()} == files
    assert run_study(toy, tmp_path, seeds=1, on_message=said.append) == found  # nothing is trained twice
    assert len(said) == steps
    beside = {
        "ablation": ["last block's variance at start, middle, end", "its squared mean over variance"],
        "budget": ["million multiply-accumulates", "seconds to train", "MiB that a step adds"],
        "large-rate": ["largest that trains"],
    }
    titles, rows = build_table(toy, found, tmp_path)
    assert titles[len(titles) - len(beside.get(name, [])) :] == beside.get(name, [])
    filled = {(row[0], title) for row in rows for title, text in zip(titles[1:], row[1:], strict=True) if text}
    cells = {(cell.row, cell.column) for cell in toy.cells}
    assert filled == cells | {(row[0], title) for row in rows for title in beside.get(name, [])}


@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_of_every_size_is_a_recipe(name):
    for budget in ("toy", "small", "full"):
        cells = define_study(name, "fashion_mnist", budget).cells
        assert len({(cell.row, cell.column) for cell in cells}) == len(cells)
        assert len({fingerprint(cell.recipe) for cell in cells}) == len(cells)


def test_rates_are_chosen_by_the_best_mean_and_cells_may_fail_or_be_missing(tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPES["digits"], model_args=("width=0.25",))
    names = ("high", "low", "luck", "never", "none")
    cells = tuple(Cell(name, "1", dataclasses.replace(recipe, model=name)) for name in names)
    one = Study("s", "claim", "depth", cells, rates=Rates(0.4), balanced=True)
    best = {"high": 0.8, "low": 0.2, "luck": 0.2}
    trained = []

    def train(recipe, folder, **_):
        if recipe.model == "none":
            raise KeyboardInterrupt
        trained.append((recipe.model, recipe.lr, recipe.seed))
        if recipe.model == "never" or recipe.lr > 1:
            raise runner.NotFiniteError("the loss of step 3 is not finite; there is no checkpoint yet")
        if (recipe.model, recipe.lr, recipe.seed) == ("luck", 0.4, 0):
            return over(60, folder)
        if (recipe.model, recipe.lr, recipe.seed) == ("luck", 0.4, 2):
            raise runner.NotFiniteError("the loss of step 3 is not finite; there is no checkpoint yet")
        return over(50 - 10 * abs(recipe.lr - best[recipe.model]) + recipe.seed, folder)

    tests = []

    def evaluate_run(folder, *, data, trusted_model):
        tests.append(folder.name.rpartition("_")[0])
        return Accuracy(100, 1.0, 40.0 + len(tests) % 3, 90.0, 30.0)

    monkeypatch.setattr(runner, "train", train)
    monkeypatch.setattr(runner, "evaluate_run", evaluate_run)
    with pytest.raises(KeyboardInterrupt):
        run_study(one, tmp_path, seeds=3)
    tried = {name: [(lr, seed) for model, lr, seed in trained if model == name] for name in best | {"never": 0}}
    # The first rate, both of its neighbours, and on until both neighbours of the best are known.
    assert tried["high"] == [(0.4, 0), (0.2, 0), (0.8, 0), (1.6, 0), (0.8, 1), (0.8, 2)]
    assert tried["low"] == [(0.4, 0), (0.2, 0), (0.8, 0), (0.1, 0), (0.2, 1), (0.2, 2)]
    # A rate that the first seed alone bears well gives way to its neighbour, and that one's neighbours are tried.
    assert tried["luck"] == [(0.4, 0), (0.2, 0), (0.8, 0), (0.4, 1), (0.4, 2), (0.1, 0), (0.2, 1), (0.2, 2)]
    assert tried["never"] == [(0.4 / 2**power, 0) for power in range(5)]  # and gives up
    assert len(tests) == 9  # three seeds of what was chosen, once
    found = read_entries(one, tmp_path, 3)
    titles, rows = build_table(one, found, tmp_path)
    assert titles == ["depth", "1"]
    assert dict(rows) == dict.fromkeys(best, "41.00 ± 1.00 / 30.00 ± 0.00") | {"never": "fails", "none": "missing"}
    assert StudyTables(tmp_path).trainings.find(cells[3], 0.4, 0).error == "the loss of step 3 is not finite"
    assert {path.name for path in write_results(one, tmp_path, found)} == {"results.csv", "table.md", "chart.png"}


def test_only_trainings_of_the_same_recipe_count(tmp_path, monkeypatch):
    recipe = RECIPES["digits"]
    monkeypatch.setattr(runner, "train", lambda recipe, folder, **_: over(90.0, folder))
    monkeypatch.setattr(runner, "evaluate_run", accuracy_found)
    before = Study("s", "claim", "depth", (Cell("a", "1", recipe),))
    run_study(before, tmp_path, seeds=1)
    longer = dataclasses.replace(before, cells=(Cell("a", "1", dataclasses.replace(recipe, epochs=9)),))
    assert [len(study.trainings) for study in read_entries(longer, tmp_path, 1)] == [0]
    assert [len(study.trainings) for study in read_entries(before, tmp_path, 1)] == [1]


def test_rows_beyond_the_colours_are_told_apart_by_dash_and_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", lambda recipe, folder, **_: over(90.0, folder))
    monkeypatch.setattr(runner, "evaluate_run", accuracy_found)
    names = [f"row {i}" for i in range(2 * len(COLORS) + 1)]
    recipes = [dataclasses.replace(RECIPES["digits"], epochs=1 + i) for i in range(2 * len(names))]
    cells = tuple(Cell(names[i // 2], "12"[i % 2], recipe) for i, recipe in enumerate(recipes))
    many = Study("s", "claim", "batch", cells)
    drawn = []
    monkeypatch.setattr(charts, "write_chart", lambda spec, path: drawn.append(spec) or path)
    charts.draw_study(many, run_study(many, tmp_path, seeds=1), tmp_path / "chart.png")
    line, points = drawn[-1]["hconcat"][0]["layer"]
    for layer, second in ((line, "strokeDash"), (points, "shape")):
        scales = [layer["encoding"][channel]["scale"] for channel in ("color", second)]
        assert [scale["domain"] for scale in scales] == [names, names]
        pairs = zip(*(scale["range"] for scale in scales), strict=True)
        assert len({str(pair) for pair in pairs}) == len(names)


def test_only_the_rows_and_columns_that_are_asked_for_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", lambda recipe, folder, **_: over(90.0, folder))
    monkeypatch.setattr(runner, "evaluate_run", accuracy_found)
    one = define_study("batch-size", "digits", "toy")
    found = run_study(one, tmp_path, seeds=2, only=["64"])
    assert [len(entry.trainings) for entry in found] == [0, 0, 2, 2]
    assert build_table(one, found, tmp_path)[1][0] == ["BatchNorm", "missing", "80.00 ± 0.00"]
    found = run_study(one, tmp_path, seeds=2, only=["256", "NF"])
    assert [len(entry.trainings) for entry in found] == [0, 2, 2, 2]
    with pytest.raises(ValueError, match="batch-size has no '65'; it has 256, 64, and BatchNorm, NF"):
        run_study(one, tmp_path, seeds=2, only=["65"])


def test_asked_to_stop_while_a_training_ends_it_begins_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", lambda recipe, folder, **_: over(90.0, folder, stop_requested=True))
    monkeypatch.setattr(runner, "evaluate_run", accuracy_found)
    said = []
    found = run_study(define_study("batch-size", "digits", "toy"), tmp_path, seeds=2, on_message=said.append)
    assert [len(entry.trainings) for entry in found] == [1, 0, 0, 0]
    assert said[-1] == "interrupted: the same command goes on"


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "trainings.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"trainings\.csv is no table of this kind, .*: it has no column 'recipe'"):
        read_entries(define_study("depth", "digits", "toy"), tmp_path, 1)


def test_a_last_line_that_was_cut_off_is_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", lambda recipe, folder, **_: over(90.0, folder))
    monkeypatch.setattr(runner, "evaluate_run", accuracy_found)
    one, path = define_study("batch-size", "digits", "toy"), tmp_path / "trainings.csv"
    run_study(one, tmp_path, seeds=2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    assert len(StudyTables(tmp_path).trainings.rows()) == whole.count(b"\n") - 2
    run_study(one, tmp_path, seeds=2)
    assert path.read_bytes() == whole


def test_ablations_leave_out_what_they_name():
    arguments = {"width": 0.25, "alpha": 0.5, "num_classes": 10}
    blocks = {
        name: create_model("nf_resnet26", **arguments, **changes).stages[1][1]
        for name, changes in {
            "all": {}, "gamma": {"gamma": False}, "beta": {"beta": False}, "skip": {"skip_gain": None},
            "gains": {"filter_gains": False},
        }.items()
    }  # fmt: skip
    gamma = 1.7128585504496627
    scales = {name: [float(conv.in_scale) for conv in block.conv] for name, block in blocks.items()}
    assert scales["all"] == pytest.approx([gamma / 1.25**0.5, gamma, gamma])
    assert scales["gamma"] == pytest.approx([1 / 1.25**0.5, 1, 1])
    assert scales["beta"] == pytest.approx([gamma, gamma, gamma])
    assert blocks["beta"].expected_variance == pytest.approx(1.25**4)
    assert blocks["skip"].conv[2].skip_gain is None
    assert blocks["all"].conv[2].skip_gain.item() == 0
    assert not any(conv.gain.requires_grad for conv in blocks["gains"].conv)


def test_names_that_do_not_exist_are_refused_with_near_misses():
    with pytest.raises(ValueError, match="did you mean depth"):
        define_study("dept", "digits", "toy")


@pytest.mark.slow
def test_two_processes_train_together_and_one_writes(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "normfree", "study"]
    arguments = [
        "microbatch",
        "--budget",
        "toy",
        "--data",
        "digits",
        "--seeds",
        "2",
        "--only",
        "NF",
        "mixed",
        "--out",
        "both",
    ]
    done = subprocess.run(
        [sys.executable, *command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = StudyTables(tmp_path / "both").trainings.rows()
    assert [(t.row, t.column, t.seed) for t in found] == [("NF", "mixed", 0), ("NF", "mixed", 1)]
    assert [(t.row, t.column, t.seed) for t in StudyTables(tmp_path / "both").tests.rows()] == [
        ("NF", "mixed", 0), ("NF", "mixed", 1),
    ]  # fmt: skip
    assert done.stdout.count("seed 1") == 2  # trained and tested by one


def test_one_image_at_a_time_is_a_failure_of_batch_norm(tmp_path):
    one = define_study("batch-size", "digits", "small")
    (cell,) = (c for c in one.cells if (c.row, c.column) == ("BatchNorm", "1"))
    recipe = dataclasses.replace(cell.recipe, epochs=1, train_images=4, evaluate_every=1, lr=0.1)
    one = dataclasses.replace(one, cells=(dataclasses.replace(cell, recipe=recipe),), rates=None)
    (entry,) = run_study(one, tmp_path, seeds=1)
    assert entry.accuracies == []
    assert "gives a normalizer one value per channel" in entry.trainings[0].error
