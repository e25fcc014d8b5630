"""The command line: `normfree spp`, `models`, `demo`, `convert`, `export`, `bench`, `train`, `eval` and `study`."""

import os
import sys

from normfree.errors import SignalError, TrainingError


def main() -> None:
    """Run the command that the arguments name; a fault that the user can mend is one sentence and exit code 2."""
    import tyro

    from normfree.cli.bench import bench
    from normfree.cli.convert import convert
    from normfree.cli.demo import demo
    from normfree.cli.export import export
    from normfree.cli.models import models
    from normfree.cli.spp import spp
    from normfree.cli.study import study
    from normfree.cli.train import evaluate, train, train_command

    try:
        if sys.argv[1:2] == ["train"]:
            train_command(sys.argv[2:])
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
            },
            prog="normfree",
            description="Deep networks without activation normalization, and the tools to see why they work.",
        )
        sys.stdout.flush()
    except (SignalError, TrainingError, ValueError, TypeError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `normfree models | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        print(f"normfree: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("normfree: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
