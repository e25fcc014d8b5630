"""`normfree study`: the paper's claims, measured."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from normfree.cli.output import Json, announce, first_process, show_json, show_table


def study(
    name: Annotated[str, tyro.conf.Positional],
    /,
    *,
    data: str = "fashion_mnist",
    seeds: int = 3,
    budget: Literal["toy", "small", "full"] = "small",
    only: tuple[str, ...] = (),
    out: Path | None = None,
    json_output: Json = False,
) -> None:
    """Train the cells of a study and set them out: table.md, chart.png, results.csv, trainings.csv, tests.csv, runs/.

    What the tables hold is not done again, and what was interrupted goes on.

    Args:
        name: microbatch, batch-size, depth, budget, ablation, large-rate, regularization, convert or finetune.
        data: As for `normfree train`.
        seeds: Trainings per cell.
        budget: "toy" to see that it runs, "small" for one machine, "full" for a cluster.
        only: Train these rows and columns of the table; others are shown as far as they are there.
        out: Folder of the results; studies/NAME by default.
        json_output: Print the table as JSON, every training with it.
    """
    from normfree.studies.definitions import define_study
    from normfree.studies.results import build_table, write_results
    from normfree.studies.runner import run_study

    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; it must be at least 1")
    defined = define_study(name, data, budget)
    folder = out or Path("studies") / name
    folder.mkdir(parents=True, exist_ok=True)
    speaks = first_process() and not json_output
    if speaks:
        print(defined.claim)

    def on_message(text: str) -> None:
        if speaks:
            print(text, flush=True)

    entries = run_study(defined, folder, seeds=seeds, only=only, on_message=on_message)
    if not first_process():
        return
    titles, rows = build_table(defined, entries, folder)
    written = write_results(defined, folder, entries)
    if json_output:
        trainings = [asdict(training) for entry in entries for training in entry.trainings]
        show_json({"claim": defined.claim, "columns": titles, "rows": rows, "trainings": trainings})
        return
    show_table(titles, rows)
    announce(written)
