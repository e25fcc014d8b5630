"""Tables that grow and are cut back."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normfree.errors import TrainingError
from normfree.files.csv_tables import Table, append_csv, csv_text, read_csv

COLUMNS = ("step", "kind", "loss")


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
