"""Peer of `scripts/bench images`: the package's own training loader over the same files. Also makes the files."""

import json
import sys
import time
from pathlib import Path


def make(folder, count, val):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", val)):
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True), labels.mkdir(parents=True)
        for n in range(number):
            width, height = [(640, 480), (640, 427), (480, 640)][n % 3]
            coarse = rng.normal(0, 50, (height // 20 + 2, width // 20 + 2, 3)) + 128
            picture = np.asarray(Image.fromarray(coarse.clip(0, 255).astype("u1")).resize((width, height), Image.BICUBIC), "f4")
            picture += rng.normal(0, 6, (height, width, 1))
            Image.fromarray(picture.clip(0, 255).astype("u1")).save(images / f"{n:05}.jpg", quality=92)
            boxes = [(rng.integers(3), *rng.uniform(0.3, 0.7, 2), *rng.uniform(0.05, 0.4, 2)) for _ in range(7)]
            (labels / f"{n:05}.txt").write_text("".join(" ".join(f"{x:.5g}" for x in box) + "\n" for box in boxes))
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n")


def measure(job):
    import torch
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_dataloader, build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    torch.set_num_threads(1)
    # A path of its own: the package looks for relative ones in its folder of data sets.
    data = check_det_dataset(job["data"])
    args = {"imgsz": job["imgsz"], "cache": job["cache"] or False, "workers": job["workers"], "task": "detect"}
    cfg = get_cfg(overrides=args)
    dataset = build_yolo_dataset(cfg, data["train"], job["batch"], data, mode="train", rect=False, stride=32)
    loader = build_dataloader(dataset, job["batch"], job["workers"], shuffle=True, rank=-1)
    rates = []
    for _ in range(job["epochs"]):
        started, images = time.time(), 0
        for batch in loader:
            images += len(batch["img"])
        rates.append(images / (time.time() - started))
    print(json.dumps({"images_per_s": rates}))


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        measure(json.loads(sys.argv[1]))
