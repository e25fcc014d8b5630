"""Reports: their verdicts, limits, files and views."""

import csv
import dataclasses
import json

import pytest
import torch
from rich.console import Console

from normfree import SignalError, characterize, compare, create_model
from normfree.signal import SignalRecord, SignalReport


def report(values, *, model="net", stages=None, **attributes):
    """A report of the given (squared mean, variance, residual variance) per record."""
    stages = stages or [1] * len(values)
    records = [
        SignalRecord(f"layer{stage}.{i}", stage, (2, 8, 4, 4), "identity", *value, samples={"variance": (value[1],)})
        for i, (stage, value) in enumerate(zip(stages, values, strict=True))
    ]
    return SignalReport(model=model, inputs="2×3×8×8", kind="join", records=tuple(records), **attributes)


HEALTHY = [(0.01, 1.04, 1.0), (0.01, 1.08, 1.0), (0.02, 1.12, 1.0)]


def test_healthy_signal_passes_and_says_so():
    healthy = report(HEALTHY)
    healthy.check(max_variance=2, max_mean_to_std=0.5, min_residual=0.5)
    assert healthy.verdicts == [
        "the signal neither explodes, vanishes nor drifts: variance 1.04 to 1.12, squared mean at most 0.0179 of the "
        "variance"
    ]


@pytest.mark.parametrize(
    ("values", "attributes", "limits", "words"),
    [
        ([(1, 3, 2), (9, 20, 10), (50, 150, 99)], {}, {"max_variance": 100}, "variance passes 100 at layer1.2"),
        ([(1, 3, 2), (9, 20, 10), (50, 150, 99)], {}, {"max_variance": 10}, "variance passes 10 at layer1.1"),
        (
            [(0.1, 1, 1), (1.5, 1, 1)],
            {},
            {"max_mean_to_std": 1},
            "channel squared mean passes the variance at layer1.1: activations drift, the convolutions after them are "
            "not standardized",
        ),
        ([(0.1, 1, 1), (0.1, 1, 1e-9)], {}, {"min_residual": 0.1}, "residual variance is 1e-09 at layer1.1"),
        ([(0.1, 1, 1), (0.1, float("inf"), 1)], {}, {}, "not finite from layer1.1"),
    ],
)
def test_check_raises_with_the_first_place_and_the_cause(values, attributes, limits, words):
    with pytest.raises(SignalError) as error:
        report(values, **attributes).check(**limits)
    assert words in str(error.value)


def test_verdicts_name_the_cause():
    exploding = [(1, 2.0**i, 1) for i in range(1, 12)]
    assert "growing by a factor of 2.00 per join: nothing normalizes" in report(exploding).verdicts[0]
    assert "BatchNorm2d bound the branches" in report(exploding, normalizers=("BatchNorm2d",)).verdicts[0]
    vanishing = [(0, 10.0**-i, 1) for i in range(4)]
    assert "falls below 0.01 at layer1.3" in report(vanishing).verdicts[0]


def test_linear_growth_and_reset_is_batch_norm_s():
    steps = [(0.1, v, 0.27) for v in (0.5, 0.8, 1.1, 0.5, 0.8, 1.1, 1.4)]
    words = report(steps, stages=[1, 1, 1, 2, 2, 2, 2], normalizers=("BatchNorm2d",)).verdicts[0]
    assert "grows linearly within a stage, by 0.3 per block, and is reset at layer2.3" in words


def test_verdicts_on_the_paper_s_networks():
    words = {
        "nf_resnet26": "variance follows the prediction",
        "bn_resnet50": "grows linearly within a stage",
        "unnormalized_resnet50": "nothing normalizes the branches",
        "nf_resnet26_unstandardized": "activations drift, the convolutions after them are not standardized",
    }
    for name, expected in words.items():
        torch.manual_seed(0)
        found = characterize(create_model(name, width=1), torch.randn(8, 3, 96, 96)).verdicts
        assert any(expected in verdict for verdict in found), (name, found)


def test_a_report_is_a_sequence_of_records_and_becomes_dicts():
    one = report(HEALTHY)
    assert len(one) == 3
    assert [record.name for record in one] == [one[0].name, one[1].name, one[2].name]
    assert one.to_dicts()[0]["variance"] == 1.04
    assert json.loads(json.dumps(one.to_dicts()))[0]["shape"] == [2, 8, 4, 4]


def test_merge_averages_and_keeps_the_samples():
    a, b = report([(0.0, 1.0, 1.0)]), report([(0.2, 3.0, None)])
    merged = SignalReport.merge([a, b])
    assert merged[0].variance == 2
    assert merged[0].samples["variance"] == (1.0, 3.0)
    assert merged[0].std("variance") == pytest.approx(2**0.5)
    assert merged[0].residual_variance is None
    with pytest.raises(SignalError, match="other joins"):
        SignalReport.merge([a, report(HEALTHY)])


def test_text_and_table_show_shapes_opened_parameters_and_names_as_they_are():
    text = str(report(HEALTHY, opened=("a", "b", "c", "d")))
    assert "layer1.2  1      identity  2×8×4×4" in text
    assert "opened for the measurement (set to one): 4 parameters, a, b, c, …" in text
    console = Console(width=120, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report(HEALTHY, model="[bold]net[/bold]"))
    assert "[bold]net[/bold]" in console.export_text()
    console.file.close()


@pytest.mark.parametrize("suffix", ["html", "png", "svg", "csv", "json"])
def test_every_format_is_saved_as_what_it_is(tmp_path, suffix):
    path = report(HEALTHY).save(tmp_path / f"spp.{suffix}")
    content = path.read_bytes()
    if suffix == "png":
        assert content.startswith(b"\x89PNG")
    elif suffix == "csv":
        rows = list(csv.DictReader(content.decode().splitlines()))
        assert [row["variance"] for row in rows] == ["1.04", "1.08", "1.12"]
    elif suffix == "json":
        assert json.loads(content)["records"][1]["name"] == "layer1.1"
    else:
        assert b"Average channel variance" in content
        assert b"http" not in content.split(b"<body>")[0] or suffix == "svg"


def test_several_reports_stand_in_one_file_in_their_order(tmp_path):
    reports = [report(HEALTHY, model="a"), report(HEALTHY, model="b")]
    assert [r["model"] for r in json.loads(compare(reports).save(tmp_path / "x.json").read_text())] == ["a", "b"]
    rows = list(csv.DictReader(compare(reports).save(tmp_path / "x.csv").read_text().splitlines()))
    assert [row["model"] for row in rows] == ["a"] * 3 + ["b"] * 3


def test_json_holds_no_infinity(tmp_path):
    text = report([(0.1, float("inf"), float("nan"))]).save(tmp_path / "x.json").read_text()
    record = json.loads(text, parse_constant=lambda constant: pytest.fail(constant))["records"][0]
    assert record["variance"] is None


def test_check_claims_no_cause_that_it_does_not_know():
    healthy = report(HEALTHY, standardized=True)
    for limits, words in (
        ({"max_variance": 1.05}, "variance passes 1.05 at layer1.1 (1.08)"),
        ({"max_mean_to_std": 0.1}, "√(squared mean / variance) is 0.134 at layer1.2, above 0.1"),
        ({"min_residual": 2}, "residual variance is 1 at layer1.0, below 2"),
    ):
        with pytest.raises(SignalError) as error:
            healthy.check(**limits)
        assert str(error.value) == f"net: {words}"


def test_names_in_a_figure_are_told_apart():
    reports = [report(HEALTHY, model=name) for name in ("m", "m (2)", "m")]
    spec = json.dumps(compare({"row": reports, "one": reports[0]}).to_vega_lite())
    assert all(f'"{name}"' in spec for name in ("m", "m (2)", "m (3)"))


def test_what_cannot_be_saved_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match="suffix must be one of"):
        report(HEALTHY).save(tmp_path / "spp.pdf")
    with pytest.raises(OSError, match="No such file"):
        report(HEALTHY).save(tmp_path / "missing" / "spp.csv")
    with pytest.raises(ValueError, match="no report"):
        compare([])


def test_notebook_view_escapes_names():
    one = report(HEALTHY)
    hostile = dataclasses.replace(one, records=(dataclasses.replace(one[0], name="<script>alert(1)</script>"),))
    assert "<script>alert" not in hostile._repr_html_()
    assert "&lt;script&gt;" in hostile._repr_html_()


def test_zeros_and_infinities_are_left_out_of_the_figure():
    spec = compare(report([(0.0, float("inf"), 1.0), (0.5, 1.0, 0.0)])).to_vega_lite()
    values = json.dumps(spec)
    assert "Infinity" not in values
    assert "NaN" not in values
