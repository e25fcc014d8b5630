"""Files that are whole or as before, and what is no file."""

import errno
import os
import re

import pytest

from normfree.errors import TrainingError
from normfree.files.whole import read_whole, replacing, write_whole


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
