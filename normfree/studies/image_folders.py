"""Photographs and drawings that packages ship, as folders that `--data imagefolder:PATH` reads.

    pip install --no-deps elpv-dataset==1.0.0.post1
    python -m normfree.studies.image_folders elpv --out data/elpv
    apt-get install openclipart-png
    python -m normfree.studies.image_folders openclipart --out data/openclipart

- elpv: 2,624 photographs of solar cells in electroluminescence (300 × 300, grey), four degrees of defect
  (Buerhop-Lutz et al. 2018; images CC BY-NC-SA 4.0).
- openclipart: 3,990 drawings in 21 categories (public domain), without shapes/stars, computer/icons and the links to
  drawings of another name; what is transparent becomes white.

Neither has a test set: a hash of a file's name puts 60 % into `train`, 20 % into `val` and 20 % into `test`. Images are
scaled to fit a white square of `--size` pixels.
"""

import argparse
import hashlib
import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from normfree.images import to_rgb
from normfree.training.data.instances import UNREADABLE

_ELPV = "elpv_dataset"
_OPENCLIPART = Path("/usr/share/openclipart/png")
_SKIPPED = ("shapes/stars", "computer/icons")


def split_of(name: str) -> str:
    """Return train, val or test for the name of a file, by its hash."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.6 else "val" if share < 0.8 else "test"


def elpv(source: Path | None) -> Iterator[tuple[Path, str]]:
    """Yield files and classes of the package elpv-dataset, or of its unpacked folder `data`.

    Raises FileNotFoundError where it is not, ValueError for labels that are no degrees.
    """
    if source is None:
        found = importlib.util.find_spec(_ELPV)
        if found is None or found.origin is None:
            raise FileNotFoundError("elpv-dataset is not installed: pip install --no-deps elpv-dataset==1.0.0.post1")
        source = Path(found.origin).parent / "data"
    for line in (source / "labels.csv").read_text(encoding="utf-8").splitlines():
        name, degree, _ = line.split()
        yield source / name, f"defect_{round(float(degree) * 100):03d}"


def openclipart(source: Path | None) -> Iterator[tuple[Path, str]]:
    """Yield files and classes of Debian's openclipart-png, or of its folder `png`. Raises FileNotFoundError."""
    source = source or _OPENCLIPART
    if not source.is_dir():
        raise FileNotFoundError(f"there is no {source}: install Debian's openclipart-png")
    for path in sorted(source.rglob("*.png")):
        place = path.relative_to(source).as_posix()
        if not place.startswith(_SKIPPED) and not path.is_symlink():
            yield path, place.partition("/")[0]


SOURCES: dict[str, Callable[[Path | None], Iterator[tuple[Path, str]]]] = {"elpv": elpv, "openclipart": openclipart}


def write_folders(name: str, out: Path, *, size: int, source: Path | None = None) -> Counter[str]:
    """Write the images of a source as .png files, and count those of each split, and what could not be read.

    Raises FileNotFoundError where the source is not, ValueError for an `out` that is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty")
    counts: Counter[str] = Counter()
    for path, label in SOURCES[name](source):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # some drawings are posters
                with Image.open(path) as opened:
                    image = _fit(opened, size)
        except UNREADABLE:
            counts["unreadable"] += 1
            continue
        split = split_of(path.name)
        folder = out / split / label
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{path.parent.name}_{path.name}")
        counts[split] += 1
    return counts


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Scale an image into the middle of a white square."""
    if "A" in image.getbands() or "transparency" in image.info:
        drawn = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)
    rgb = to_rgb(image)
    scale = size / max(rgb.size)
    small = rgb.resize([max(1, round(side * scale)) for side in rgb.size], Image.Resampling.BICUBIC, reducing_gap=3)
    square = Image.new("RGB", (size, size), "white")
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


def main() -> None:
    """Write what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="unpacked folder of the package; by default that of the system")
    parser.add_argument("--size", type=int, default=128)
    options = parser.parse_args()
    counts = write_folders(options.name, options.out, size=options.size, source=options.source)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
