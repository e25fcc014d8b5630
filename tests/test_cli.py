"""The command line, as a person uses it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torchvision
from PIL import Image

from normfree import create_model, load_converted
from normfree.cli import main
from normfree.sources import model_factory

SMALL = ["--batch", "2", "--size", "64", "64"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `normfree ARGUMENTS` in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["normfree", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code or 0, out, err

    return call


def write_images(folder, count=3, size=(70, 90)):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_spp_of_every_source(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\ndef small():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
    )
    code, out, err = run("spp", "nf_resnet26", "timm:resnet18", "torchvision:resnet18", "mine:small", *SMALL)
    assert code == 0, err
    for words in (
        "nf_resnet26: signal at 8 joins",
        "timm:resnet18: signal at 8 joins",
        "mine:small: signal at 1 weight",
    ):
        assert words in out


@pytest.mark.parametrize("input", ["noise", "photos", "folder"])
def test_spp_of_every_input(run, tmp_path, input):
    source = write_images(tmp_path / "images") if input == "folder" else input
    code, out, err = run("spp", "nf_resnet26", "--input", source, "--seeds", 2, *SMALL)
    assert code == 0, err
    assert "inputs 2×3×64×64, 2 seeds" in out


def test_spp_writes_what_the_suffix_says(run, tmp_path):
    for suffix in ("html", "png", "svg", "csv", "json"):
        code, out, err = run("spp", "nf_resnet26", "bn_resnet26", "--out", f"spp.{suffix}", *SMALL)
        assert code == 0, err
        assert f"written: spp.{suffix}" in out
        assert (tmp_path / f"spp.{suffix}").stat().st_size > 1000
    assert [report["model"] for report in json.loads((tmp_path / "spp.json").read_text())] == [
        "nf_resnet26",
        "bn_resnet26",
    ]


def test_spp_closed_and_backward(run):
    _, opened, _ = run("spp", "nf_resnet26", *SMALL)
    _, closed, _ = run("spp", "nf_resnet26", "--no-open", "--backward", *SMALL)
    assert "opened for the measurement" in opened
    assert "opened for the measurement" not in closed
    assert "gradient variance" in closed


def test_models(run):
    code, out, _ = run("models", "nf_resnet5*")
    assert code == 0
    assert out.splitlines()[:2] == [
        "model\tparameters\tmultiply-accumulates\tsize\ttest size",
        "nf_resnet50\t25557048\t4089184256\t224\t256",
    ]
    assert "nf_resnet26" in run("models", "26")[1]


BAD = {
    "unknown model": (["spp", "nf_resnet55"], "did you mean nf_resnet5"),
    "unknown timm model": (["spp", "timm:resnet51"], "timm has no model 'resnet51'; did you mean"),
    "unknown torchvision model": (["spp", "torchvision:resnet51"], "torchvision has no model"),
    "factory that does not import": (["spp", "no_such_module:net"], "cannot import 'no_such_module'"),
    "factory with a syntax error": (["spp", "broken:net"], "cannot import 'broken' (SyntaxError"),
    "factory that is not there": (["spp", "json:net"], "json has no 'net'"),
    "factory that makes no model": (["spp", "json:dumps"], "normfree:"),
    "no model": (["spp"], "name at least one model"),
    "empty folder": (["spp", "nf_resnet26", "--input", "empty"], "holds no images"),
    "missing folder": (["spp", "nf_resnet26", "--input", "nowhere"], "no folder of images at nowhere"),
    "broken image": (["spp", "nf_resnet26", "--batch", "1", "--input", "bad"], "cannot be read as an image"),
    "too few images": (["spp", "nf_resnet26", "--input", "few"], "fewer than a batch of 4"),
    "wrong number of channels": (["spp", "four:channels", "--input", "photos"], "images have (1 or 3"),
    "suffix": (["spp", "nf_resnet26", "--out", "spp.pdf"], "suffix must be one of"),
    "folder that is not there": (["spp", "nf_resnet26", "--out", "nowhere/spp.html"], "there is no folder"),
    "output is a folder": (["spp", "nf_resnet26", "--out", "folder.html"], "a folder"),
    "batch": (["spp", "nf_resnet26", "--batch", "0"], "batch is 0"),
    "size": (["spp", "nf_resnet26", "--size", "0", "5"], "size is (0, 5)"),
    "three sizes": (["spp", "nf_resnet26", "--size", "5", "5", "5"], "give height and width"),
    "photographs for a linear layer": (["spp", "four:linear", "--input", "photos"], "images have (1 or 3"),
    "seeds": (["spp", "nf_resnet26", "--seeds", "0"], "seeds is 0"),
    "size of an export": (["export", "nf_resnet26", "--to", "pt2", "--size", "0"], "size is (0,)"),
    "three sizes of a conversion": (["convert", "timm:resnet18", "--size", "5", "5", "5"], "give height and width"),
    "epochs": (["demo", "--epochs", "0"], "epochs is 0"),
    "depth": (["demo", "--depth", "51"], "depth is 51"),
    "pattern": (["models", "nothing*"], "no model matches"),
    "report folder": (["demo", "--out", "file"], "file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(run, tmp_path, case):
    arguments, words = BAD[case]
    (tmp_path / "broken.py").write_text("def net(:\n")
    (tmp_path / "four.py").write_text(
        "from torch import nn\n\ndef channels():\n    return nn.Conv2d(4, 4, 3)\n\n"
        "def linear():\n    return nn.Linear(4, 4)\n"
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    write_images(tmp_path / "few", 1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"\x89PNG not really")
    code, out, err = run(*arguments)
    assert code == 2, (out, err)
    assert words in err
    assert err.startswith("normfree: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_unknown_option_is_exit_code_2(run):
    code, _, err = run("spp", "nf_resnet26", "--sedes", "3")
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize("command", [[sys.executable, "-m", "normfree"], ["normfree"]])
def test_installed_commands(command):
    environment = os.environ | {"PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    done = subprocess.run([*command, "models", "nf_resnet26"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("nf_resnet26\t")


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m normfree models 'nf_regnet_b[012]' | head -n 2"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[1].startswith("nf_regnet_b0\t")
    assert "Traceback" not in done.stderr


def test_convert(run, tmp_path):
    code, out, err = run(
        "convert", "torchvision:resnet18", "--size", "64", "--batch", "4", "--input", "noise",
        "--out", "free.safetensors", "--report", "free.html",
    )  # fmt: skip
    assert code == 0, err
    assert out.startswith("20 layers replaced, 20 normalizers removed, 0 kept")
    assert (tmp_path / "free.html").stat().st_size > 500_000
    fresh = torchvision.models.resnet18(weights=None)
    assert not load_converted(fresh, tmp_path / "free.safetensors").conv1.out_scale.isnan()
    for arguments, words in (
        (["timm:convnext_atto", "--size", "32"], "has no such normalizer"),
        (["torchvision:resnet18", "--out", "free.pt"], "suffix must be one of .safetensors"),
        (["torchvision:resnet18", "--alpha", "0"], "alpha is 0"),
    ):
        code, out, err = run("convert", *arguments)
        assert code == 2
        assert words in err


def test_models_as_json(run):
    code, out, _ = run("models", "nf_regnet_b0", "--json")
    (entry,) = json.loads(out)
    assert code == 0
    assert (entry["parameters"], entry["macs"], entry["size"]) == (8595372, 327149536, 192)
    square, wide = (
        json.loads(run("models", "nf_regnet_b0", "--json", "--size", *size)[1])[0] for size in ([64], [64, 128])
    )
    assert wide["size"] == [64, 128]
    assert 1.8 < wide["macs"] / square["macs"] < 2.1


def test_every_command_that_prints_a_table_prints_json(run, tmp_path):
    small = ["--size", 32, "--batch", 2, "--json"]
    assert json.loads(run("spp", "nf_resnet26", *small)[1])["model"] == "nf_resnet26"
    converted = json.loads(run("convert", "torchvision:resnet18", *small, "--out", "free.safetensors")[1])
    assert sum(change["action"] == "removed" for change in converted["changes"]) == 20
    assert converted["written"] == ["free.safetensors"]
    exported = json.loads(run("export", "nf_resnet26", "--to", "pt2", "--size", 64, 80, "--json")[1])
    assert exported["path"] == "nf_resnet26.pt2"
    assert exported["difference"] < 1e-3
    assert json.loads(run("train", "--list", "--json")[1])["digits"]["model"] == "nf_resnet26"
    quick = ["--epochs", 1, "--batch", 512, "--model-args", "width=0.25", "--quiet", "--json", "--out", "first"]
    trained = json.loads(run("train", "digits", *quick)[1])
    assert trained["finished"]
    tested = json.loads(run("eval", "first", "--json")[1])
    assert tested["top1"] == trained["accuracy"]["top1"]


def test_train_says_what_there_is_and_what_it_takes(run):
    code, out, err = run("train")
    assert code == 2
    assert "nf_regnet_b5\t" in out
    assert "name a recipe, as in: normfree train digits" in err
    for arguments in (["train", "--help"], ["train", "nf_resnet50", "--help"]):
        code, out, _ = run(*arguments)
        assert code == 0
        for words in ("--label-smoothing", "--test-size", "--resume", "--json", "config.json of a run"):
            assert words in out, words
        assert "arguments (default: )" not in out
    assert "the recipe comes first" in run("train", "--epochs", "3")[2]
    assert "--from needs" in run("train", "--from")[2]


def test_images_are_noise_unless_they_are_named(run):
    """One default everywhere."""
    assert "inputs 4×3×32×32" in run("spp", "nf_resnet26", "--size", 32)[1]
    assert "(default: noise)" in run("spp", "--help")[1]
    assert "(default: noise)" in run("convert", "--help")[1]


def test_export_of_a_saved_network(run, tmp_path):
    create_model("nf_resnet26", width=0.25, num_classes=3).save_pretrained(tmp_path / "net")
    code, out, err = run(
        "export", str(tmp_path / "net"), "--to", "pt2", "--out", str(tmp_path / "net.pt2"), "--size", "64"
    )
    assert code == 0, err
    assert "largest difference" in out
    assert (tmp_path / "net.pt2").exists()


@pytest.mark.slow
def test_bench_compares_with_networks_of_any_source(run, tmp_path):
    limit = "normfree.benchmarks.peers:plain_resnet50"
    arguments = ["--batch", "1", "--size", "32", "--rounds", "2", "--processes", "1"]
    code, out, err = run("bench", "--peers", limit, *arguments, "--out", tmp_path / "b.json")
    assert code == 0, err
    assert limit in out
    assert json.loads((tmp_path / "b.json").read_text())["rows"][0]["ratio"] > 0
    converted = ["--model", "torchvision:resnet18", "--convert", "--peers", "torchvision:resnet18", "--json"]
    arguments[1], arguments[3] = "2", "64"
    code, out, err = run("bench", *converted, *arguments)
    assert code == 0, err
    assert [row["peer"] for row in json.loads(out)["rows"]] == ["torchvision:resnet18"]
    code, out, err = run("bench", "inference", *arguments)
    assert code == 0, err
    assert "torchvision:resnet50" in out


@pytest.mark.slow
def test_bench_measures_memory_and_accumulated_steps(run):
    peers = "normfree.benchmarks.peers"
    small = f"--model {peers}:small_nf_resnet26 --peers {peers}:small_bn_resnet26 --batch 16 --size 64".split()
    larger = ["--batch", "64", "--size", "96"]  # where activations are most of it
    code, out, err = run("bench", "memory", *small[:-4], *larger, "--processes", "1", "--json")
    assert code == 0, err
    assert 0.2 < json.loads(out)["rows"][0]["ratio"] < 0.9
    code, out, err = run(
        "bench", *small, "--processes", "1", "--rounds", "2", "--accumulate", "2", "--recompute-weights"
    )
    assert code == 0, err


def test_bench_refuses_names_and_numbers(run):
    code, _, err = run("bench", "--model", "nf_resnet5")
    assert code == 2
    assert "no model is called 'nf_resnet5'; did you mean nf_resnet50" in err
    assert "rounds at least 2" in run("bench", "--rounds", "1")[2]
    assert "inference has neither" in run("bench", "inference", "--accumulate", "2")[2]


def test_a_folder_does_not_hide_a_network(run, tmp_path):
    create_model("nf_resnet26", width=0.25, num_classes=3).save_pretrained(tmp_path / "nf_resnet26")
    assert model_factory("nf_resnet26")().num_classes == 1000
    assert model_factory("./nf_resnet26")().num_classes == 3


def test_train_and_eval(run, tmp_path):
    code, out, err = run("train", "--list")
    assert code == 0, err
    assert "nf_regnet_b5" in out
    quick = ["--epochs", 1, "--batch", 256, "--model-args", "width=0.25", "--lr", 0.1]
    code, out, err = run("train", "digits", *quick, "--out", "first")
    assert code == 0, err
    assert "top-1 %" in out
    assert "epoch 1, test: loss" in err
    code, out, err = run("train", "digits", *quick, "--out", "first")
    assert code == 2
    assert "--resume auto" in err
    code, again, err = run("eval", "first")
    assert code == 0, err
    assert again.splitlines()[-1].split("\t")[3] == out_top1(tmp_path / "first")
    code, _, err = run("train", "--from", "first/config.json", "--out", "second", "--quiet")
    assert (code, err) == (0, "")
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def out_top1(folder):
    return f"{float((folder / 'metrics.csv').read_text().splitlines()[-1].split(',')[4]):.2f}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "digitz"], "did you mean digits"),
        (["train", "digits", "--data", "imagefolder:nowhere", "--out", "x"], "there is no folder nowhere"),
        (["train", "digits", "--epochs", "0"], "epochs is 0"),
        (["train", "digits", "--log", "trackio", "--out", "x"], "pip install trackio"),
        (["train", "--from", "nowhere.json"], "nowhere.json"),
        (["eval", "nowhere"], "nowhere"),
    ],
)
def test_trainings_that_cannot_be(run, arguments, words):
    code, _, err = run(*arguments)
    assert code == 2
    assert words in err


def test_study(run, tmp_path):
    code, out, err = run("study", "batch-size", "--data", "digits", "--budget", "toy", "--seeds", 1)
    assert code == 0, err
    assert "BatchNorm breaks" in out
    assert (tmp_path / "studies" / "batch-size" / "chart.png").exists()
    assert run("study", "batchsize", "--data", "digits")[0] == 2
    assert run("study", "depth", "--seeds", "0")[0] == 2
