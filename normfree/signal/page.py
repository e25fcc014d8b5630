"""The page of a report: chart, tree of the model, details of what is pointed at, verdicts and tables."""

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from normfree.plotting import render
from normfree.signal import table
from normfree.signal.record import SignalRecord, SignalRecords

Named = Sequence[tuple[str, str, SignalRecords]]  # name, label of its row, report


def render_page(title: str, caption: str, spec: dict[str, Any], reports: Named) -> str:
    """Return the page as one HTML file that needs no network."""
    details = [
        {"model": name, "records": [_details(record, number) for number, record in enumerate(report, 1)]}
        for name, _, report in reports
    ]
    return _PAGE.format(
        title=html.escape(title),
        caption=html.escape(caption),
        tree="".join(_tree(index, name, label, report) for index, (name, label, report) in enumerate(reports)),
        sections=sections(reports),
        spec=_for_script(spec),
        details=_for_script(details),
        bundle=render("javascript_bundle"),
    )


def sections(reports: Named) -> str:
    """Return verdicts and a table per report, as HTML."""
    return "".join(_section(name, label, report) for name, label, report in reports)


def _for_script(value: Any) -> str:
    """Write JSON for a script element, which no module's name can end: "<" does not appear in it."""
    return json.dumps(value).replace("<", "\\u003c")


def _tree(index: int, name: str, label: str, report: SignalRecords) -> str:
    """List a model's stages, and in them its blocks with what joins in each."""
    stages: dict[int, list[str]] = {}
    for position, record in enumerate(report):
        joins = "" if record.shortcut == "none" else f" <small>+ {html.escape(record.shortcut)}</small>"
        stages.setdefault(record.stage, []).append(
            f'<li><button type="button" data-report="{index}" data-record="{position}">{html.escape(record.name)}'
            f"{joins}</button></li>"
        )
    parts = "".join(
        f"<details{' open' if len(report) <= _OPEN else ''}><summary>stage {stage}, {len(blocks)} "
        f"{report.kind}{'s' * (len(blocks) > 1)}</summary><ul>{''.join(blocks)}</ul></details>"
        for stage, blocks in stages.items()
    )
    return f"<section><h3>{html.escape(f'{name}, {label}' if label else name)}</h3>{parts}</section>"


def _details(record: SignalRecord, number: int) -> list[tuple[str, str]]:
    """Return what is shown of a record, as pairs of words."""
    pairs = [
        ("module", record.name),
        ("block", str(number)),
        ("stage", str(record.stage)),
        ("shape", "×".join(map(str, record.shape))),
        ("shortcut", record.shortcut),
    ]
    numbers = {
        "squared mean": record.squared_mean,
        "variance": record.variance,
        "residual variance": record.residual_variance,
        "expected variance": record.expected_variance,
        "predicted squared mean": record.predicted_squared_mean,
        "predicted variance": record.predicted_variance,
        "gradient variance": record.gradient_variance,
    }
    return pairs + [(name, _number(value)) for name, value in numbers.items() if value is not None]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _section(name: str, label: str, report: SignalRecords) -> str:
    heading = html.escape(f"{name}, {label}" if label else name)
    verdicts = "".join(f"<li>{html.escape(line)}</li>" for line in table.footer(report))
    columns, rows = table.cells(report)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<section><h2>{heading}</h2><ul>{verdicts}</ul><details><summary>{html.escape(table.title(report))}</summary>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></details></section>"
    )


_OPEN = 60  # records up to which all stages of the tree are open

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1480px; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.05rem; margin: 1.5rem 0 0; }}
h3 {{ font-size: .95rem; margin: 0 0 .3rem; }}
ul {{ margin: .3rem 0; padding-left: 1.2rem; }}
#figure {{ display: flex; gap: 1.5rem; align-items: flex-start; flex-wrap: wrap; }}
#chart {{ overflow-x: auto; min-width: 0; }}
#beside {{ flex: 1 1 280px; max-width: 480px; font-size: 13px; }}
#tree {{ max-height: 26rem; overflow-y: auto; border: 1px solid #ddd; padding: .5rem; }}
#tree ul {{ list-style: none; padding-left: .8rem; }}
#tree button {{ font: inherit; border: 0; background: none; padding: 1px 4px; cursor: pointer; text-align: left; }}
#tree button[aria-current=true] {{ background: #0072b2; color: #fff; }}
#tree button:focus-visible, summary:focus-visible {{ outline: 2px solid #d55e00; }}
#details {{ margin-top: .8rem; }}
#details td {{ overflow-wrap: anywhere; }}
summary {{ cursor: pointer; color: #555; }}
table {{ border-collapse: collapse; font-size: 13px; margin: .5rem 0; }}
th, td {{ padding: 2px 10px; text-align: right; border-bottom: 1px solid #eee; font-variant-numeric: tabular-nums; }}
th:nth-child(-n+3), td:nth-child(-n+3) {{ text-align: left; }}
@media print {{
  body {{ max-width: none; margin: 0; }}
  #chart, #chart svg, #chart canvas {{ max-width: 100%; height: auto; }}
  #beside {{ display: none; }}
  tr {{ break-inside: avoid; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{caption}</p>
<div id="figure">
<div id="chart"></div>
<div id="beside">
<nav id="tree" aria-label="blocks of the models">{tree}</nav>
<div id="details" role="status">Click on a point, or on a block above, to see its numbers.</div>
</div>
</div>
{sections}
<script id="spec" type="application/json">{spec}</script>
<script id="records" type="application/json">{details}</script>
<script type="module">
const read = name => JSON.parse(document.getElementById(name).textContent);
const models = read("records");
const find = (report, record) =>
  document.querySelector(`#tree button[data-report="${{report}}"][data-record="${{record}}"]`);
function show(report, record) {{
  const table = document.createElement("table");
  for (const pair of models[report].records[record]) {{
    const row = table.insertRow();
    for (const text of pair) row.insertCell().textContent = text;
  }}
  const heading = document.createElement("h3");
  heading.textContent = models[report].model;
  document.getElementById("details").replaceChildren(heading, table);
  document.querySelector("#tree button[aria-current]")?.removeAttribute("aria-current");
  const button = find(report, record);
  button.setAttribute("aria-current", "true");
  button.closest("details").open = true;
  return button;
}}
document.getElementById("tree").addEventListener("click", event => {{
  const button = event.target.closest("button");
  if (button) show(button.dataset.report, button.dataset.record);
}});
document.getElementById("tree").addEventListener("keydown", event => {{
  const step = {{ ArrowDown: 1, ArrowUp: -1 }}[event.key];
  const button = event.target.closest("button");
  if (!step || !button) return;
  event.preventDefault();
  const next = find(button.dataset.report, Number(button.dataset.record) + step);
  if (next) {{
    next.closest("details").open = true;
    next.focus();
    show(next.dataset.report, next.dataset.record);
  }}
}});
let opened = [];
addEventListener("beforeprint", () => {{
  opened = [...document.querySelectorAll("section > details:not([open])")];
  for (const part of opened) part.open = true;
}});
addEventListener("afterprint", () => {{ for (const part of opened) part.open = false; }});
{bundle}
const actions = {{ export: true, source: false, compiled: false, editor: false }};
const {{ view }} = await vegaEmbed("#chart", read("spec"), {{ mode: "vega-lite", actions }});
view.addEventListener("click", (event, item) => {{
  if (item?.datum?.report === undefined) return;
  show(item.datum.report, item.datum.block - 1).scrollIntoView({{ block: "nearest" }});
}});
document.body.dataset.drawn = "true";
</script>
</body>
</html>
"""
