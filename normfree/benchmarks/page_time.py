"""Time from opening a report's page to its first picture, in a browser.

    pip install playwright
    python -m normfree.benchmarks.page_time [--joins 1 50 600] [--rounds 5]

Chromium (on the PATH) opens the file from the disk; the medians of the rounds are printed.
"""

import argparse
import dataclasses
import importlib
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from normfree.models import create_model
from normfree.signal import SignalReport, characterize

LIMIT = 2.0  # seconds to the first picture of 600 joins


def report_of(joins: int) -> SignalReport:
    """Return a report of so many joins, each with a name of its own, in stages of a hundred."""
    torch.manual_seed(0)
    report = characterize(create_model("nf_resnet26", width=0.25), torch.randn(1, 3, 32, 32), predict=True)
    records = [dataclasses.replace(report[0], name=f"blocks.{i}", stage=1 + i // 100) for i in range(joins)]
    return dataclasses.replace(report, records=tuple(records))


def main() -> None:
    """Print the times, and fail where 600 joins take too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--joins", type=int, nargs="+", default=[1, 50, 600])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("chromium is not on the PATH")
    playwright = importlib.import_module("playwright.sync_api")
    arguments = ["--no-sandbox", "--disable-background-networking"]
    late = False
    with playwright.sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        for joins in options.joins:
            path = report_of(joins).save(Path(folder) / "page.html")
            seconds = []
            for _ in range(options.rounds):
                page = browser.new_page()
                start = time.perf_counter()
                page.goto(path.as_uri())
                page.wait_for_selector("body[data-drawn=true]")
                seconds.append(time.perf_counter() - start)
                page.close()
            median = statistics.median(seconds)
            late = late or median > LIMIT
            print(f"{joins} joins: {median:.2f} s to the first picture [{min(seconds):.2f}, {max(seconds):.2f}]")
        browser.close()
    if late:
        sys.exit(f"a picture takes more than {LIMIT} s")


if __name__ == "__main__":
    main()
