"""The command line: `normfree spp`, `sweep`, `models`, `demo`, `convert`, `export`, `bench`, `train` and others."""

import importlib.metadata
import os
import platform
import shutil
import sys

from normfree.cli.failures import release_output, report, say

_PLACES = ("--out", "--report", "--table", "--weights")


def main() -> None:
    """Run the command that the arguments name; a fault that the user can mend is one sentence and exit code 2."""
    code = 0
    try:  # imports of torch take seconds, in which Ctrl-C may come too
        _prepare_terminal()
        _run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `normfree models | head`
        pass
    except KeyboardInterrupt:
        say("interrupted")
        code = 130
    except Exception as error:
        code = report(error)
    release_output()
    if code:
        raise SystemExit(code)


def _prepare_terminal() -> None:
    """Print all letters in some way, and help in 40 columns at least: in fewer tyro lays it out for ever."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if shutil.get_terminal_size().columns < 40:
        os.environ["COLUMNS"] = "40"
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, to the end of the process


def _run(arguments: list[str]) -> None:
    if arguments[:1] in (["--version"], ["-V"]):
        versions = (importlib.metadata.version(name) for name in ("normfree", "torch"))
        print("normfree {}, torch {}, Python {}".format(*versions, platform.python_version()))
        return
    for option, value in zip(arguments, [*arguments[1:], None], strict=True):
        if (option in _PLACES and value == "") or option in [f"{place}=" for place in _PLACES]:
            raise ValueError(f"{option.rstrip('=')} is empty: name a place")  # as a path it would be this folder
    import tyro

    from normfree.cli.bench import bench
    from normfree.cli.convert import convert
    from normfree.cli.demo import demo
    from normfree.cli.export import export
    from normfree.cli.models import models
    from normfree.cli.spp import spp
    from normfree.cli.study import study
    from normfree.cli.sweep import sweep
    from normfree.cli.train import evaluate, train, train_command

    if arguments[:1] == ["train"]:
        train_command(arguments[1:])
        return
    tyro.extras.subcommand_cli_from_dict(
        {
            "spp": spp,
            "models": models,
            "demo": demo,
            "convert": convert,
            "export": export,
            "bench": bench,
            "train": train,
            "eval": evaluate,
            "study": study,
            "sweep": sweep,
        },
        prog="normfree",
        args=arguments,
        description="Deep networks without activation normalization, and the tools to see why they work.",
    )
