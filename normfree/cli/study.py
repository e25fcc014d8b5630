"""`normfree study`: the paper's claims, measured."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from normfree.cli.output import announce, first_process, show_table


def study(
    name: Annotated[str, tyro.conf.Positional],
    /,
    *,
    data: str = "fashion_mnist",
    seeds: int = 3,
    budget: Literal["toy", "small", "full"] = "small",
    only: tuple[str, ...] = (),
    out: Path | None = None,
) -> None:
    """Train the cells of a study and set them out: table.md, chart.png, results.csv, trainings.csv, a folder per run.

    What trainings.csv holds is not trained again, and what was interrupted goes on.

    Args:
        name: microbatch, batch-size, depth, budget, ablation, large-rate, regularization or convert.
        data: As for `normfree train`.
        seeds: Trainings per cell.
        budget: "toy" to see that it runs, "small" for one machine, "full" for a cluster.
        only: Train these rows and columns of the table; others are shown as far as they are there.
        out: Folder of the results; studies/NAME by default.
    """
    from normfree.studies.definitions import study as defined
    from normfree.studies.results import table, write
    from normfree.studies.runner import run

    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; it must be at least 1")
    one = defined(name, data, budget)
    folder = out or Path("studies") / name
    folder.mkdir(parents=True, exist_ok=True)
    first = first_process()
    if first:
        print(one.claim)
    entries = run(one, folder, seeds=seeds, only=only, said=lambda text: print(text, flush=True))
    if first:
        show_table(*table(one, entries, folder))
        announce(write(one, folder, entries))
