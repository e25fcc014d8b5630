"""Files of this package: whole or as before, tables that are cut back, formats with a number."""

import errno
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from normfree.conversion.plan import Plan, PlannedLayer, RemovedNorm
from normfree.errors import TrainingError
from normfree.files.csv_tables import Table, append_csv, csv_text, read_csv
from normfree.files.documents import check_format, document_text, read_document
from normfree.files.tensors import load_state, read_tensors, write_tensors
from normfree.files.whole import read_whole, replacing, write_whole
from normfree.training import RECIPES, Recipe
from normfree.training.run.checkpoint import Position, read_position
from tests.helpers import assert_same_state

COLUMNS = ("step", "kind", "loss")


# ---- replacing


def write_half(path, error):
    """Fail amid the writing."""
    with replacing(path) as temporary:
        temporary.write_text("half of wh")
        raise error


def test_a_file_is_replaced_by_what_was_written_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "file.txt"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            assert temporary != path
            assert not path.exists() or path.read_text() == "first"
            temporary.write_text(text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("no number"), RuntimeError("of a library")]
)
def test_after_a_failure_the_file_is_as_it_was_and_the_error_names_it(error, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(TrainingError, match=r"cannot write .*file\.txt: ") as raised:
        write_half(path, error)
    assert (getattr(error, "strerror", None) or str(error)) in str(raised.value)
    assert re.search(r"\([\d,]+ bytes are free there\)$", str(raised.value))
    assert raised.value.__cause__ is error
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_passes_and_the_file_is_as_it_was(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    assert path.read_text() == "before"
    with replacing(path) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_where_there_can_be_no_file_the_error_names_it(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with (
        pytest.raises(TrainingError, match=r"cannot write .*taken/file\.txt: "),
        replacing(tmp_path / "taken" / "file.txt") as temporary,
    ):
        temporary.write_text("in no folder")
    with pytest.raises(TrainingError, match=r"cannot write .*nothing\.txt: "), replacing(tmp_path / "nothing.txt"):
        assert not (tmp_path / "nothing.txt").exists()  # and nothing is written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


# ---- tables


def test_the_text_of_a_table_is_a_line_per_row_below_the_names_of_its_columns():
    rows = [{"step": 1, "kind": "a,b", "loss": 0.5}, {"step": 2, "kind": 'said "no"'}]
    lines = '1,"a,b",0.5\n2,"said ""no""",\n'
    assert csv_text(COLUMNS, rows) == "step,kind,loss\n" + lines
    assert csv_text(COLUMNS, rows, header=False) == lines
    assert csv_text(COLUMNS, []) == "step,kind,loss\n"
    with pytest.raises(ValueError, match="los"):
        csv_text(COLUMNS, [{"step": 1, "los": 0.5}])


def test_no_file_has_neither_columns_nor_rows(tmp_path):
    assert read_csv(tmp_path / "none.csv") == ((), [])
    (tmp_path / "empty.csv").write_text("")
    assert read_csv(tmp_path / "empty.csv") == ((), [])
    (tmp_path / "cut.csv").write_text("step,ki")
    assert read_csv(tmp_path / "cut.csv") == ((), [])
    (tmp_path / "header.csv").write_text("step,kind\n")
    assert read_csv(tmp_path / "header.csv") == (("step", "kind"), [])


# Of a row's text, one line: what ends lines is not in it.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), max_size=4), first=st.integers(0, 4))
def test_what_is_appended_is_read(rows, first):
    expected = [{"name": name, "note": note} for name, note in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        for part in (expected[:first], expected[first:]):
            append_csv(path, ("name", "note"), part)
        assert read_csv(path) == (("name", "note"), expected)


def test_a_last_line_that_was_cut_off_is_no_row_and_the_next_begins_on_a_clean_line(tmp_path):
    rows = [{"step": str(step), "kind": "train", "loss": f"{step / 7:.5f}"} for step in range(3)]
    added = {"step": "9", "kind": "eval", "loss": "1"}
    text = csv_text(COLUMNS, rows).encode()
    header, *ends = _ends(text)
    for cut in range(len(text) + 1):
        path = tmp_path / f"{cut}.csv"
        path.write_bytes(text[:cut])
        whole = [row for row, end in zip(rows, ends, strict=True) if end <= cut]
        assert read_csv(path) == (COLUMNS if cut >= header else (), whole), f"of {cut} bytes"
        append_csv(path, COLUMNS, [added])
        assert path.read_text() == csv_text(COLUMNS, [*whole, added]), f"of {cut} bytes"
        assert read_csv(path) == (COLUMNS, [*whole, added]), f"of {cut} bytes"


def _ends(text):
    """Where the lines end."""
    return [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]


def test_rows_with_missing_fields_are_left_out(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("step,kind,loss\n1,train,0.5\n2,train\n3\n4,train,\n")
    columns, rows = read_csv(path)
    assert columns == COLUMNS
    assert rows == [{"step": "1", "kind": "train", "loss": "0.5"}, {"step": "4", "kind": "train", "loss": ""}]


def test_a_table_is_cut_back_to_the_rows_before_a_step_and_those_at_it_that_are_wanted(tmp_path):
    table = Table(tmp_path / "metrics.csv", COLUMNS)
    rows = [{"step": str(step), "kind": kind, "loss": "1"} for step in (1, 2, 10, 11) for kind in ("train", "eval")]
    table.add(*rows)
    asked = []

    def keep(row):
        asked.append(row)
        return row["kind"] == "train"

    assert table.cut_back(99) == rows
    assert table.cut_back(10, keep) == rows[:5]
    assert asked == rows[4:6]
    assert read_csv(table.path) == (COLUMNS, rows[:5])
    assert table.cut_back(2) == rows[:4]
    assert table.cut_back(2, lambda row: False) == rows[:2]
    assert table.cut_back(0) == []
    assert table.path.read_text() == "step,kind,loss\n"
    table.add(rows[0])
    assert read_csv(table.path) == (COLUMNS, rows[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_cutting_back_removes_a_last_line_that_was_cut_off_and_begins_a_table_that_is_not_there(tmp_path):
    table = Table(tmp_path / "metrics.csv", COLUMNS)
    assert table.cut_back(5) == []
    assert table.path.read_text() == "step,kind,loss\n"
    table.path.write_text("step,kind,loss\n1,train,0.5\n2,tra")
    assert table.cut_back(5) == [{"step": "1", "kind": "train", "loss": "0.5"}]
    assert table.path.read_text() == "step,kind,loss\n1,train,0.5\n"


@pytest.mark.parametrize(
    "text",
    [
        "step,kind,loss,more\n1,a,2,3\n",
        "step,kind\n1,a\n",
        "loss,kind,step\n",
        "a,b\n",
        "To do:\n- water the plants\n",
    ],
)
def test_a_file_of_other_columns_is_refused_and_left_as_it_is(text, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(TrainingError, match=r"metrics\.csv is no file of a training, or of another one"):
        Table(path, COLUMNS).cut_back(0)
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["a,b", "Remember the milk", "step,kind,loss,more"])
def test_a_single_line_without_an_end_that_is_no_part_of_the_header_is_refused_and_left_as_it_is(text, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(TrainingError, match=r"metrics\.csv is no file of a training, or of another one"):
        Table(path, COLUMNS).cut_back(0)
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "Remember the milk"])
def test_rows_are_not_appended_to_a_file_of_other_columns(text, tmp_path):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="has other columns than step, kind, loss"):
        append_csv(path, COLUMNS, [{"step": 1, "kind": "train", "loss": 0.5}])
    assert path.read_text() == text


def test_a_table_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.csv"):
        Table(tmp_path / "metrics.csv", COLUMNS).add({"step": 1})


@pytest.mark.parametrize("damage", [b"\xff", b'"', b"1,train,0.5,more\n"])
def test_a_damaged_table_is_refused_with_its_name(damage, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(csv_text(COLUMNS, [{"step": 1}]).encode() + damage + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.csv is no table, or a damaged one"):
        read_csv(path)
    path.write_text("step,kind,loss\nx,train,0.5\n")
    with pytest.raises(ValueError, match=r"metrics\.csv is no table of this kind, or a damaged one: .*'x'"):
        Table(path, COLUMNS).cut_back(3)


# ---- documents


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


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name, words in (("pipe", "a device or a pipe"), ("endless", "a device or a pipe"), (".", "a folder")):
        with pytest.raises(ValueError, match=f"is no file but {words}"):
            read_whole(tmp_path / name, largest=100)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_whole(tmp_path / "nothing", largest=100)
    (tmp_path / "large").write_bytes(bytes(101))
    with pytest.raises(ValueError, match="has 101 bytes; such a file has at most 100"):
        read_whole(tmp_path / "large", largest=100)


def test_a_link_stays_a_link_when_its_file_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    write_whole(tmp_path / "link", "words")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "words"


# ---- tensors


def tensors():
    torch.manual_seed(0)
    shared = torch.randn(3, 4)
    return {
        "a": shared, "b": torch.arange(3), "empty": torch.empty(0, 2), "scalar": torch.tensor(1.5),
        "half": torch.ones(2, dtype=torch.bfloat16), "flag": torch.tensor([True, False]), "view": shared[1:],
        "column": torch.randn(4, 4)[:, 1],
    }  # fmt: skip


def test_tensors_are_read_as_they_were_written_and_no_other_way(tmp_path):
    path = tmp_path / "it.safetensors"
    write_tensors(path, tensors(), {"what": "some"})
    read, described = read_tensors(path)
    assert described == {"what": "some"}
    assert_same_state(read, tensors())
    whole = path.read_bytes()
    for place in (len(whole) - 1, whole.index(b"some"), whole.index(b"BF16")):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"it\.safetensors is (not what was written|no \.safetensors file)"):
            read_tensors(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"it\.safetensors is no \.safetensors file, or cut off"):
        read_tensors(path)


def test_tensors_of_others_are_read_unless_they_are_no_numbers(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.tensor(float("inf"))}, tmp_path / "it.safetensors")
    assert set(read_tensors(tmp_path / "it.safetensors")[0]) == {"a", "b"}
    save_file({"a": torch.tensor(float("nan"))}, tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match="has values that are no numbers in a"):
        read_tensors(tmp_path / "it.safetensors")


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    model = torch.nn.Linear(2, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for state, words in (
        ({"weight": torch.ones(2, 2)}, "it lacks bias, and has nothing besides"),
        ({**before, "more": torch.ones(1)}, "it lacks nothing, and has more besides"),
        ({"bias": torch.ones(2), "weight": torch.ones(2, 3)}, r"weight is \(2, 3\) there and \(2, 2\) here"),
    ):
        with pytest.raises(ValueError, match=words):
            load_state(model, state)
        assert_same_state(model.state_dict(), before)
    with pytest.raises(ValueError, match="a of the state is a dict"):
        write_tensors(Path("never"), {"a": {}})


# ---- formats


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
