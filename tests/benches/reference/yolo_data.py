"""Labels and validation images as the installed package reads them: tests/fixtures/yolo/package.json, with the images beside it.

    .bench-venv/bin/python tests/benches/reference/yolo_data.py

Of each label file whether its image is used, and its boxes; of each validation image its shape, padding, boxes, and the CRC-32 of its bytes
`[3, H, W]`. Source: ultralytics 8.4.190, numpy and Pillow of the same day.
"""

import json
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[3] / "tests/fixtures/yolo"
LABELS = [
    "1 .5 .5 .2 .1\n",
    "",
    "\n  \n",
    "\ufeff1.0 0.5 0.5 0.2 0.1\r\n\r\n2 0.1 0.1 0.1 0.1\r\n",
    "1 .5 .5 .2 .1\n1 .50 .5 .2 .1\n",
    "0 1.005 .5 .1 .1\n",
    "0 1.02 .5 .1 .1\n",
    "0 -.005 .5 .1 .1\n",
    "0 -.02 .5 .1 .1\n",
    "0 .5 .5 -.1 .1\n",
    "0 .5 .5 0 0\n",
    "-1 .5 .5 .1 .1\n",
    "0.5 .5 .5 .1 .1\n",
    "3 .5 .5 .1 .1\n",
    "0 .5 .5 .1\n",
    "0 .5 .5 .1 .1 .9\n",
    "0 .5 .5 .1 nan\n",
    "0 .25 .25 .75 .25 .5 .5\n",
    "0 .1 .1 .2 .2 .3 .3\n0 .5 .5 .1 .1\n",
    "2 0.1 0.2 0.4 0.2 0.4 0.6 0.1 0.6\n",
]
# Height, width.
SIZES = [(160, 160), (100, 300), (300, 100), (33, 47), (50, 61), (320, 240), (240, 321), (12, 200), (90, 64), (64, 90)]
SIDE, BATCH = 160, 4


def noise(height, width, seed):
    count = np.arange(height * width * 3, dtype=np.uint64) + np.uint64(seed * 7919)
    return (((count * count * np.uint64(31) + count * np.uint64(17)) >> np.uint64(3)) & np.uint64(255)).astype("u1").reshape(height, width, 3)


def data_set(folder, mode, batch):
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_yolo_dataset

    cfg = get_cfg(overrides={"imgsz": SIDE, "task": "detect", "cache": False})
    names = {0: "a", 1: "b", 2: "c"}
    data = {"names": names, "nc": 3, "channels": 3, "train": str(folder / "images"), "val": str(folder / "images")}
    return build_yolo_dataset(cfg, str(folder / "images"), batch, data, mode=mode, rect=mode == "val", stride=32)


def labels(folder):
    (folder / "images").mkdir(parents=True), (folder / "labels").mkdir()
    for n, text in enumerate(LABELS):
        Image.fromarray(noise(12, 12, n)).save(folder / f"images/{n:03}.png")
        (folder / f"labels/{n:03}.txt").write_bytes(text.encode())
    found = {Path(entry["im_file"]).stem: entry for entry in data_set(folder, "train", 1).labels}
    cases = []
    for n, text in enumerate(LABELS):
        entry = found.get(f"{n:03}")
        rows = None if entry is None else np.concatenate([entry["cls"].reshape(-1, 1), entry["bboxes"].reshape(-1, 4)], 1).tolist()
        cases.append({"text": text, "rows": rows})
    return cases


def rectangles(folder):
    (folder / "images").mkdir(parents=True), (folder / "labels").mkdir()
    for n, (height, width) in enumerate(SIZES):
        Image.fromarray(noise(height, width, n)).save(folder / f"images/{n:03}.png")
        (folder / f"labels/{n:03}.txt").write_text(f"{n % 3} 0.4 0.6 0.3 0.2\n")
    data = data_set(folder, "val", BATCH)
    cases = []
    for n in range(len(data)):
        sample = data[n]
        image = sample["img"].numpy()
        cases.append({
            "number": int(Path(sample["im_file"]).stem),
            "height": image.shape[1],
            "width": image.shape[2],
            "rows": np.concatenate([sample["cls"].numpy().reshape(-1, 1), sample["bboxes"].numpy()], 1).tolist(),
            "crc": zlib.crc32(np.ascontiguousarray(image).tobytes()),
        })
    return cases


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp())
    found = {"side": SIDE, "batch": BATCH, "sizes": SIZES, "labels": labels(folder / "a"), "rectangles": rectangles(folder / "b")}
    shutil.rmtree(folder)
    (ROOT / "package.json").write_text(json.dumps(found, indent=1) + "\n")
