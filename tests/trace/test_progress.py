"""What is told of long measurements: nothing for five seconds, then what is done and where."""

import io
import sys

import pytest
import torch
from torch import nn

import normfree
from normfree.trace import progress
from normfree.trace.progress import reached, telling

IMAGES = torch.randn(4, 3, 8, 8)


class Terminal(io.StringIO):
    """Standard error that is a terminal."""

    def isatty(self):
        """Tell so."""
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def test_what_is_short_says_nothing(capsys):
    normfree.convert(network(), IMAGES)
    assert capsys.readouterr().err == ""


def test_what_is_long_tells_the_part_and_the_module_ever_more_seldom(clock, capsys):
    with telling("converting Net"):
        reached("a")
        clock[0] = 6
        with telling("setting scales, pass 1"):
            reached("b")
            clock[0] = 11
            reached("c")
        clock[0] = 12.4
        reached("d")
    assert capsys.readouterr().err.splitlines() == [
        "normfree: converting Net, setting scales, pass 1, at b (6 s)", "normfree: converting Net, at d (12 s)",
    ]  # fmt: skip
    reached("e")
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_one_line_which_is_taken_away(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with telling("measuring Net"):
        clock[0] = 5.5
        reached("a")
        clock[0] = 6
        reached("b")
    written = terminal.getvalue()
    assert written.split("\r\x1b[K") == [
        "",
        "normfree: measuring Net, at a (6 s)",
        "normfree: measuring Net, at b (6 s)",
        "",
    ]
    assert "\n" not in written


@pytest.mark.parametrize("keep", ["weights", "function"])
def test_a_conversion_tells_all_of_its_parts(keep, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SILENT", 0.0)
    monkeypatch.setattr(progress._Told, "due", property(lambda self: 0.0, lambda self, value: None), raising=False)
    normfree.convert(network(), IMAGES, keep=keep)
    told = capsys.readouterr().err
    parts = ["measuring Sequential", "setting scales, pass 1" if keep == "weights" else "comparing outputs"]
    assert all(f"normfree: converting Sequential, {part}, at 0 (" in told for part in parts)


def test_a_closed_standard_error_ends_nothing(clock, monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        with telling("measuring Net"):
            clock[0] += 6
            reached("a")
