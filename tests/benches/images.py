"""Augmented images per second of the loader (no model), against the package's, same JPEG files, same cores, interleaved.

    scripts/bench images [--images 300] [--repeats 5] [--quick] [--json FILE]

Mosaic, affine, colours and flips at 640 pixels, batches of 16, two threads against two workers; the package is `ultralytics` where it is
installed in .bench-venv, with its cache in memory and without. Medians of the last epochs. `decoder` is what one thread decodes.
"""

import argparse
import importlib.util
import json
import subprocess
import sys

from common import PYTHON, REFERENCE, ROOT, Rows, median, say
from loader import built, run

WORKERS = 2
# Name, options of the bench, the package's cache, and the least ratio that is accepted.
CASES = [
    ("decoded images cached", {"cache": "resized", "cache_mib": 1024}, "ram", 2.0),
    ("files cached", {"cache": "encoded", "cache_mib": 256}, "", 2.0),
    ("nothing cached", {"cache": "encoded", "cache_mib": 0}, "", None),
]


def data(count, val=None):
    """Smooth pictures with some noise, as large in bytes as photographs are."""
    val = val or max(8, count // 20)
    folder = ROOT / "sample-data" / f"bench-images-{count}-{val}"
    if not folder.exists():
        say(f"making {count} images in {folder}")
        subprocess.run([PYTHON, REFERENCE / "images_package.py", "--make", str(folder), str(count), str(val)], check=True)
    return folder / "data.yaml"


def package(path, cache, epochs):
    job = {"data": str(path), "batch": 16, "imgsz": 640, "workers": WORKERS, "cache": cache, "epochs": epochs}
    out = subprocess.run([PYTHON, REFERENCE / "images_package.py", json.dumps(job)], check=True, stdout=subprocess.PIPE, text=True,
                         cwd=path.parent)
    return json.loads(out.stdout.splitlines()[-1])["images_per_s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat of two epochs")
    parser.add_argument("--json")
    args = parser.parse_args()
    repeats, epochs = (1, 2) if args.quick else (args.repeats, 3)
    has_package = importlib.util.find_spec("ultralytics") is not None
    path, bench = data(args.images), built("images")
    rows = Rows(["case", "ours /s", "package /s", "ratio", "goal", "decoder /s", "of decoder"], 24)
    found, missed = [], []
    for name, options, cache, goal in CASES:
        ours, theirs, decoder = [], [], []
        for _ in range(repeats):
            line = run(bench, path, threads=WORKERS, epochs=epochs, **options)
            ours.append(median(line["images_per_s"][1:]))
            decoder.append(line["decoder_per_s"])
            if has_package:
                theirs.append(median(package(path, cache, epochs)[1:]))
        mine, theirs, decoder = median(ours), median(theirs) if theirs else None, median(decoder)
        ratio = mine / theirs if theirs else None
        shown = [f"{mine:.0f}", f"{theirs:.0f}" if theirs else "-", f"{ratio:.2f}" if ratio else "-", goal or "-"]
        rows.add([name, *shown, f"{decoder:.0f}", f"{mine / (decoder * WORKERS):.2f}"])
        found.append({"case": name, "ours": mine, "package": theirs, "ratio": ratio, "decoder": decoder})
        missed += [name] if goal and ratio and ratio < goal else []
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)
    if missed:
        sys.exit(f"below the goal: {', '.join(missed)}")


if __name__ == "__main__":
    main()
