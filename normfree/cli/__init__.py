"""The command line: `normfree spp`, `models`, `demo`, `export` and `bench`."""

import os
import sys

from normfree.errors import SignalError


def main() -> None:
    """Run the command that the arguments name; what the user can mend is one sentence and exit code 2."""
    import tyro

    from normfree.cli.bench import bench
    from normfree.cli.demo import demo
    from normfree.cli.export import export
    from normfree.cli.models import models
    from normfree.cli.spp import spp

    try:
        tyro.extras.subcommand_cli_from_dict(
            {"spp": spp, "models": models, "demo": demo, "export": export, "bench": bench},
            prog="normfree",
            description="Deep networks without activation normalization, and the tools to see why they work.",
        )
        sys.stdout.flush()
    except (SignalError, ValueError, TypeError, ImportError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `normfree models | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        print(f"normfree: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("normfree: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
