"""Documents: formats, checksums, and what is made of them."""

import json

import pytest

from normfree.conversion.plan import Plan, PlannedLayer, RemovedNorm
from normfree.errors import TrainingError
from normfree.files.documents import check_format, document_text, read_document
from normfree.training import RECIPES, Recipe
from normfree.training.run.checkpoint import Position, read_position

COLUMNS = ("step", "kind", "loss")


def test_a_document_is_read_as_it_was_written_and_no_other_way(tmp_path):
    path = tmp_path / "it.json"
    values = {"a": 1, "b": [0.1, None, "ä"], "c": {"d": True}}
    path.write_text(document_text(values, format=3))
    assert read_document(path, "document", format=3) == values
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))  # in another order
    assert read_document(path, "document", format=3) == values
    written = json.loads(path.read_text())
    for changed in ({**written, "a": 2}, {k: v for k, v in written.items() if k != "b"}, {**written, "e": 1}):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"it\.json is not what was written .*remove its line `checksum`"):
            read_document(path, "document", format=3)
    del written["checksum"]
    path.write_text(json.dumps({**written, "a": 2}))
    assert read_document(path, "document", format=3)["a"] == 2


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "", "[]", "{", "\xff", "null", "\xef\xbb\xbf{}"])
def test_what_is_no_document_is_refused_with_its_name(text, tmp_path):
    path = tmp_path / "it.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"it\.json is no document"):
        read_document(path, "document")


@pytest.mark.parametrize(("values", "current"), [({}, 1), ({"format": 1}, 1), ({"format": 3, "more": 1}, 3)])
def test_the_format_of_today_is_read_and_no_number_is_the_first(values, current):
    check_format(values, current, "the file")


@pytest.mark.parametrize(
    ("values", "current", "sentence"),
    [
        ({"format": 99}, 1, "the file has format 99, and this normfree reads 1: install a newer normfree"),
        ({"format": 1}, 2, "the file has format 1, which this normfree does not read any more: it reads 2"),
        ({}, 2, "the file has format 1, which this normfree does not read any more: it reads 2"),
        ({"format": 0}, 1, "the file has format 0, which this normfree does not read any more: it reads 1"),
        ({"format": None}, 1, "the file has format None, which this normfree does not read any more: it reads 1"),
        ({"format": "2"}, 1, "the file has format '2', which this normfree does not read any more: it reads 1"),
        ({"format": [99]}, 1, "the file has format [99], which this normfree does not read any more: it reads 1"),
    ],
)
def test_other_formats_are_refused_with_what_to_do(values, current, sentence):
    with pytest.raises(ValueError, match="the file has format") as raised:
        check_format(values, current, "the file")
    assert str(raised.value) == sentence


PLAN = Plan((PlannedLayer("conv", "norm", True, False, True),), (RemovedNorm("norm", False),), ("relu",))
RECIPE = RECIPES["digits"]
POSITION = Position(step=7, epoch=1, step_in_epoch=3, parts=2, seconds=1.5, best=50.0, best_step=4, unreadable=("a",))


def plan_of(text, folder):
    return Plan.from_json(text)


def recipe_of(text, folder):
    (folder / "config.json").write_text(text)
    return Recipe.from_json(folder / "config.json")


def position_of(text, folder):
    (folder / "position.json").write_text(text)
    return read_position(folder)


def unsealed(text):
    """Return the values of a document without its checksum, as they may be changed."""
    values = json.loads(text)
    del values["checksum"]
    return values


WRITTEN = {
    "plan": (plan_of, PLAN, unsealed(PLAN.to_json())),
    "recipe": (recipe_of, RECIPE, unsealed(RECIPE.to_json())),
    "position": (position_of, POSITION, {"format": 1} | json.loads(json.dumps(vars(POSITION)))),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_plans_recipes_and_positions_are_read_with_the_number_of_their_format_and_without(what, tmp_path):
    read, expected, values = WRITTEN[what]
    assert values["format"] == 1
    assert read(json.dumps(values), tmp_path) == expected
    del values["format"]
    assert read(json.dumps(values), tmp_path) == expected


@pytest.mark.parametrize("what", WRITTEN)
@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (99, "has format 99, and this normfree reads 1: install a newer normfree"),
        (0, "has format 0, which this normfree does not read any more: it reads 1"),
    ],
)
def test_plans_recipes_and_positions_of_another_format_are_refused_with_what_to_do(what, number, sentence, tmp_path):
    read, _, values = WRITTEN[what]
    text = json.dumps(values | {"format": number, "what only that format has": 1})
    with pytest.raises((ValueError, TrainingError)) as raised:
        read(text, tmp_path)
    assert sentence in str(raised.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"format": 1}', "3"])
@pytest.mark.parametrize("what", WRITTEN)
def test_what_is_no_plan_recipe_or_position_is_refused(what, text, tmp_path):
    words = {"plan": "is no plan of a conversion", "recipe": "is no recipe", "position": "is no checkpoint of normfree"}
    with pytest.raises((ValueError, TrainingError), match=words[what]):
        WRITTEN[what][0](text, tmp_path)


def test_a_model_that_was_given_another_name_is_found_by_its_old_one(tmp_path):
    for factory in ("CifarResNet", "timm_resnet18"):
        values = unsealed(RECIPE.to_json()) | {"model": f"normfree.studies.small_resnets:{factory}"}
        assert recipe_of(json.dumps(values), tmp_path).model == f"normfree.studies.cifar_resnets:{factory}"
    assert recipe_of(RECIPE.to_json(), tmp_path).model == RECIPE.model
