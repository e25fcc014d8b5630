"""Count what ends how: `python -m tests.trials --out docs/trials.md`."""

import argparse
import collections
import random
import tempfile
import time
from pathlib import Path

import torch

from normfree.cli.output import progress
from normfree.files.whole import write_whole
from tests.trials.calls import try_calls
from tests.trials.commands import try_commands
from tests.trials.files import try_files
from tests.trials.trainings import try_kills, try_processes

TRIALS = {
    "files": (try_files, 2900, "damaged files"),
    "commands": (try_commands, 330, "command lines"),
    "calls": (try_calls, 830, "calls with a wrong argument"),
    "kills": (try_kills, 100, "kills of trainings that are taken up again"),
    "processes": (try_processes, 50, "trainings of two processes with workers"),
}


def main():
    """Run the trials that are named, print every fault and the counts, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--count", type=int, help="of each kind, instead of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the page, such as docs/trials.md")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forks have no others
    lines, faults = [], 0
    for name in options.only:
        trial, count, what = TRIALS[name]
        verdicts, seconds = run(trial, options.count or count, options.seed)
        counts = collections.Counter(verdict or "FAULT" for _, verdict, _ in verdicts)
        faults += counts["FAULT"]
        said = "; ".join(f"{verdict}: {number}" for verdict, number in counts.most_common())
        lines.append(f"| {what} | {len(verdicts)} | {said} | {counts['FAULT']} | {options.seed} | {seconds:.0f} s |")
        print(lines[-1], flush=True)
    if options.out is not None:
        write_whole(options.out, _PAGE.format(rows="\n".join(lines)))
    raise SystemExit(1 if faults else 0)


def run(trial, count, seed):
    """Return the verdicts of a trial, with its seconds; faults are printed."""
    start, verdicts = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch, progress() as bar:
        task = bar.add_task(trial.__name__, total=count)
        for kind, verdict, words in trial(random.Random(seed), count, Path(scratch)):
            verdicts.append((kind, verdict, words))
            bar.advance(task)
            if not verdict:
                print(f"FAULT, {kind}: {words}", flush=True)
    return verdicts, time.monotonic() - start


_PAGE = """# Bad files and bad days, counted

What is damaged, wrong or interrupted ends in a sentence that names it, and what was good is still there. These trials
are drawn from a seed; `python -m tests.trials --out docs/trials.md` repeats all of them, with `--only`, `--count` and
`--seed` others. A fault would be: a traceback, a crash, a hang, more than 2 GiB of memory, an error that does not name
the file, a file with a checksum that is read as something else, a model that is not as it was, a training that ends
otherwise.

| tried | count | how they ended | faults | seed | took |
|---|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
