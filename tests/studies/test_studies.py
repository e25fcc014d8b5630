"""Every study at a toy size, end to end, and what it makes of failures and interruptions."""

import dataclasses
import json

import pytest

from normfree.studies import runner
from normfree.studies.runner import Cell, Study, entries, run, table
from normfree.studies.trainings import STUDIES, study
from normfree.training import RECIPES


@pytest.mark.parametrize("name", STUDIES)
def test_at_a_toy_size(name, tmp_path):
    toy = study(name, "digits", "toy")
    small = [
        dataclasses.replace(
            c, recipe=dataclasses.replace(c.recipe, model_args=("width=0.25",), batch=c.recipe.batch * 2)
        )
        for c in toy.cells
    ]
    toy = dataclasses.replace(toy, cells=tuple(small))
    said = []
    found = run(toy, tmp_path, seeds=1, said=said.append)
    assert len(found) == len(said) == len(toy.cells)
    assert all(entry.accuracies or entry.failed for entry in found)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "results.csv", "table.md", "chart.png"}
    assert run(toy, tmp_path, seeds=1, said=said.append) == found  # nothing is trained twice
    assert len(said) == len(toy.cells)


@pytest.mark.parametrize("name", STUDIES)
def test_every_cell_of_every_size_is_a_recipe(name):
    for budget in ("toy", "small", "full"):
        cells = study(name, "fashion_mnist", budget).cells
        assert len({(cell.row, cell.column) for cell in cells}) == len(cells)


def test_rates_are_chosen_by_the_first_seed_and_cells_may_fail_or_be_missing(tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPES["digits"], model_args=("width=0.25",))
    cells = tuple(Cell(row, "1", dataclasses.replace(recipe, model=row)) for row in ("a", "b", "c"))
    one = Study("s", "claim", "depth", cells, rates=(0.1, 0.4))
    trained = []

    def train(recipe, folder, **_):
        if recipe.model == "c":
            raise KeyboardInterrupt
        trained.append((recipe.model, recipe.lr, recipe.seed))
        folder.mkdir(parents=True)
        if recipe.model == "b":
            raise runner.TrainingError("the loss of step 3 is not finite")
        accuracy = type("Accuracy", (), {"top1": 100 * recipe.lr + recipe.seed})()
        return type("Result", (), {"finished": True, "accuracy": accuracy})()

    monkeypatch.setattr(runner, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run(one, tmp_path, seeds=3)
    expected = [(0.1, 0), (0.4, 0), (0.4, 1), (0.4, 2)]
    assert [(lr, seed) for model, lr, seed in trained if model == "a"] == expected
    titles, rows = table(one, entries(one, tmp_path, 3))
    assert titles == ["depth", "1"]
    assert rows == [["a", "41.00 ± 1.00"], ["b", "fails"], ["c", "missing"]]
    result = json.loads((tmp_path / "runs" / "b_1" / "lr_0.1_seed_0" / "result.json").read_text())
    assert "not finite" in result["error"]


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="did you mean depth"):
        study("dept", "digits", "toy")
