"""`normfree train`: train a recipe; `normfree eval`: test what was trained."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from normfree.cli.output import first_process, show_table


def train(
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE ...")] = (), /
) -> None:
    """Train a network as a recipe says: `normfree train digits --out runs/first`.

    `normfree train --list` shows the recipes, `normfree train RECIPE --help` their fields.
    """
    train_command(list(arguments))


def train_command(arguments: list[str]) -> None:
    """`normfree train …`: the fields' defaults depend on the recipe, so the recipe is read first."""
    from normfree.training import RECIPES, Recipe, recipe
    from normfree.training import train as run

    if arguments[:1] == ["--list"]:
        show_table(
            ("recipe", "model", "data", "epochs", "batch"),
            [(name, r.model, r.data, str(r.epochs), str(r.batch)) for name, r in RECIPES.items()],
        )
        return
    if arguments and arguments[0].startswith("--from="):
        arguments = ["--from", arguments[0].removeprefix("--from="), *arguments[1:]]
    if arguments[:1] == ["--from"] and len(arguments) > 1:
        name, default, rest = "--from FILE", Recipe.from_json(arguments[1]), arguments[2:]
    else:
        name = arguments[0] if arguments and not arguments[0].startswith("-") else "digits"
        default, rest = recipe(name), arguments[1:] if arguments[:1] == [name] else arguments

    folder = Path("runs") / name.strip("-").split()[0]

    def command(
        recipe: Annotated[Recipe, tyro.conf.arg(name="")] = default,
        *,
        out: Path = folder,
        resume: Literal["never", "auto"] = "never",
        quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    ) -> None:
        """Train into a folder: config.json, metrics.csv, checkpoints/, and at the end the weights and curves.png.

        Args:
            recipe: What is trained, on what, and how.
            out: Folder of the run.
            resume: "auto" goes on after the newest checkpoint in the folder, or begins.
            quiet: Print nothing but the result.
        """
        result = run(recipe, out, resume=resume, quiet=quiet)
        if first_process():
            _show(result)

    tyro.cli(command, args=rest, prog=f"normfree train {name}")


def _show(result: Any) -> None:
    if not result.finished:
        print(f"interrupted after step {result.step}: --resume auto goes on")
    elif result.accuracy is not None:
        show_table(
            ("run", "steps", "loss", "top-1 %", "top-5 %", "best top-1 %"),
            [(str(result.out), str(result.step), f"{result.accuracy.loss:.4f}", f"{result.accuracy.top1:.2f}",
              f"{result.accuracy.top5:.2f}", f"{result.best:.2f}")],
        )  # fmt: skip


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    data: str | None = None,
    weights: Path | None = None,
    model: str | None = None,
) -> None:
    """Test a trained network.

    Args:
        run: Folder of a run, or of one of its checkpoints.
        data: Another data set than the run's, with the same classes.
        weights: Another .safetensors file than the run's averaged weights or, where there are none, its last.
        model: The run's model again, where that is a function of a package, which will be imported and called.
    """
    from normfree.training import evaluate_run

    found = evaluate_run(run, data=data, weights=weights, model=model)
    if not first_process():
        return
    show_table(
        ("run", "images", "loss", "top-1 %", "top-5 %"),
        [(str(run), str(found.examples), f"{found.loss:.4f}", f"{found.top1:.2f}", f"{found.top5:.2f}")],
    )
