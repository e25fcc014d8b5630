"""Failures of commands: one sentence, the right exit code, and nothing lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import normfree
from normfree import exporting
from normfree.cli import main
from normfree.errors import ChartError, TrainingError
from normfree.extras import require_extra
from normfree.plotting import write_chart
from normfree.sources import model_factory
from normfree.training.data.batches import watching_workers

MINE = """
import torch
from torch import nn

def needs(x): pass
def key(): {}["a"]
def exits(): raise SystemExit(0)
def large(): torch.empty(2**50)
def small(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
"""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command in a folder that holds mine.py: exit code, standard output, standard error."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["normfree", *arguments])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("needs", "mine:needs cannot be called so: needs() missing 1 required positional argument: 'x'"),
        ("key", "mine:key raised KeyError: 'a' ("),
        ("exits", "mine:exits raised SystemExit: 0 ("),
        ("large", "not enough memory ("),
    ],
)
def test_what_a_function_of_the_user_s_raises_is_said_with_its_line(factory, words, run):
    code, _, err = run("spp", f"mine:{factory}")
    assert code == 2
    assert err.startswith(f"normfree: {words}")
    assert err.count("\n") == 1
    if words.endswith("("):
        assert "mine.py, line " in err or "asked for" in err


def test_what_nobody_foresaw_is_exit_code_1_with_its_traceback_in_a_file(run, monkeypatch, tmp_path):
    def fail(*arguments, **others):
        raise LookupError("a bug")

    monkeypatch.setattr("normfree.cli.spp.characterize", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = run("spp", "mine:small", "--size", "16")
    assert code == 1
    place = err.partition("its traceback is in ")[2].partition(":")[0]
    assert err.startswith("normfree: unexpected LookupError: a bug (")
    with open(place) as file:
        assert "Traceback (most recent call last)" in (text := file.read())
        assert "LookupError: a bug" in text


def test_too_large_a_batch_is_no_traceback(run):
    code, _, err = run("spp", "mine:small", "--batch", "100000000", "--size", "3200")
    assert code == 2
    assert err.startswith("normfree: not enough memory")
    assert "take fewer or smaller images" in err


def test_versions_are_said(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith(f"normfree {normfree.__version__}, torch {torch.__version__.partition('+')[0]}")


@pytest.mark.parametrize("given", [["--out", ""], ["--out="], ["--report", ""]])
def test_an_empty_place_is_not_this_folder(given, run, tmp_path):
    command = "convert" if given[0] == "--report" else "train"
    code, _, err = run(command, "digits", "--epochs", "1", *given)
    assert (code, err) == (2, f"normfree: {given[0].rstrip('=')} is empty: name a place\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def command(*arguments, **changes):
    return subprocess.run(
        [sys.executable, "-m", "normfree", *arguments], capture_output=True, check=False, env=os.environ | changes
    )


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_output_of_another_encoding_loses_nothing(encoding, tmp_path):
    done = command("spp", "nf_resnet26", "--size", "32", "--out", str(tmp_path / "x.csv"), PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.csv").exists()
    assert b"written" in done.stdout


def test_help_in_a_few_columns_ends():
    assert command("spp", "--help", COLUMNS="5").returncode == 0


def test_a_closed_output_is_no_traceback():
    program = f"{sys.executable} -m normfree models nf_resnet26"
    for redirected in (">&-", "> /dev/full"):
        done = subprocess.run(f"{program} {redirected}", shell=True, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        assert done.returncode == (0 if redirected == ">&-" else 2)


@pytest.mark.parametrize("wait", [0.3, 1.0, 2.0])
def test_ctrl_c_while_it_starts_is_no_traceback(wait):
    started = subprocess.Popen(
        [sys.executable, "-m", "normfree", "models"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    time.sleep(wait)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    assert b"Traceback" not in err


# ---- files that are there already


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_an_export_that_fails_keeps_the_file_before(to, tmp_path, monkeypatch):
    path = tmp_path / f"net.{to}"
    path.write_text("before")

    def full(place, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(OSError, match=r"cannot write .*net\..*: No space left on device \([\d,]+ bytes are free"):
            exporting.export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), path, to=to, size=16)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_network_that_torch_export_does_not_take_is_refused_in_a_sentence(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.map = nn.Conv2d(3, 1, 3), nn.Linear(14, 2)

        def forward(self, x):
            return self.map(self.conv(x))

    model, state = Fixed(), torch.get_rng_state()
    with pytest.raises(
        ValueError, match=r"torch\.export cannot take Fixed with batch size, height and width that vary"
    ):
        exporting.export(model, tmp_path / "net.pt2", to="pt2", size=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["html", "svg", "png", "csv", "json"])
def test_a_report_that_fails_keeps_the_file_before(suffix, tmp_path, monkeypatch):
    report = normfree.characterize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8))
    path = tmp_path / f"spp.{suffix}"
    path.write_text("before")

    def full(place, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(OSError, match=r"cannot write .*spp.* bytes are free"):
            report.save(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_network_that_cannot_be_saved_keeps_the_one_before(tmp_path, monkeypatch):
    model = normfree.create_model("nf_resnet26", width=0.0625, num_classes=2)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("normfree.files.tensors.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        normfree.create_model("nf_resnet26", width=0.125, num_classes=2).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- what is missing


def test_a_missing_extra_is_named_with_what_to_install(monkeypatch):
    require_extra("train", "this")
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ImportError, match=r"^a chart needs altair: pip install 'normfree\[charts\]'$"):
        require_extra("charts", "a chart")


def test_charts_under_a_limit_of_virtual_memory_are_drawn_elsewhere(tmp_path, monkeypatch):
    """The engine would end this process."""
    chart = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "mark": "point", "data": {"values": [{}]}}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10**12, 10**12))
    for suffix in ("png", "svg", "html"):
        assert write_chart(chart, tmp_path / f"chart.{suffix}").stat().st_size > 100
    monkeypatch.setattr("normfree.plotting._IN_ANOTHER_PROCESS", "import os; os.abort()")
    with pytest.raises(ChartError, match="more virtual memory than the 1,000,000,000,000 bytes of ulimit -v"):
        write_chart(chart, tmp_path / "other.png")


def test_a_worker_that_was_killed_is_said_with_advice():
    with pytest.raises(TrainingError, match=r"a process that loads images has died.*fewer workers; there is none"):  # noqa: SIM117
        with watching_workers(lambda: "; there is none"):
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match="something else"), watching_workers(str):
        raise RuntimeError("something else")


def test_errors_of_a_module_name_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_of_mine.py").write_text("\n\n{}['a']\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match=r"\(KeyError: 'a', .*broken_of_mine\.py, line 3\)"):
        model_factory("broken_of_mine:make")


def test_json_is_written_in_letters_of_any_encoding(run):
    code, out, _ = run("train", "--list", "--json")
    assert code == 0
    assert out.isascii()
    assert json.loads(out)["digits"]["model"] == "nf_resnet26"
