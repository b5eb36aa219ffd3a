"""Rates and momenta of the installed YOLO package's own training loop, batch by batch, for tests of the schedule.

    .bench-venv/bin/python tests/benches/reference/yolo_schedule.py tests/fixtures/yolo/schedule.json

Trains the smallest model on a few images of 32 pixels; a callback writes down each group's learning rate and momentum.
"""

import json
import os
import sys
import tempfile

FOLDER = tempfile.mkdtemp()
os.environ.setdefault("YOLO_CONFIG_DIR", FOLDER)
os.environ["YOLO_OFFLINE"] = "true"

import numpy as np
from PIL import Image
from ultralytics.models.yolo.detect import DetectionTrainer

IMAGES, BATCH = 20, 4
CASES = {
    "linear": dict(epochs=5),
    "cosine": dict(epochs=5, cos_lr=True, lrf=0.1),
    "short": dict(epochs=2),
    "half": dict(epochs=6, warmup_epochs=1.5, lr0=0.02, momentum=0.9, warmup_momentum=0.5),
    "adamw": dict(epochs=4, optimizer="AdamW", lr0=0.001429, momentum=0.9, warmup_bias_lr=0.0),
}


def data():
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        os.makedirs(f"{FOLDER}/images/{split}")
        os.makedirs(f"{FOLDER}/labels/{split}")
        for index in range(IMAGES if split == "train" else 2):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{FOLDER}/images/{split}/{index}.png")
            with open(f"{FOLDER}/labels/{split}/{index}.txt", "w") as file:
                file.write("0 0.5 0.5 0.5 0.5\n")
    with open(f"{FOLDER}/data.yaml", "w") as file:
        file.write(f"path: {FOLDER}\ntrain: images/train\nval: images/val\nnames: [thing]\n")


def run(name, options):
    overrides = dict(
        model="yolov8n.yaml", data=f"{FOLDER}/data.yaml", imgsz=32, batch=BATCH, nbs=BATCH, workers=0, device="cpu", val=False,
        plots=False, save=False, project=FOLDER, name=name, optimizer="SGD", verbose=False,
    )
    trainer = DetectionTrainer(overrides={**overrides, **options})
    rows = []

    def note(trainer):
        groups = {group["param_group"]: group for group in trainer.optimizer.param_groups}
        momentum = groups["weight"].get("momentum", groups["weight"].get("betas", [0])[0])
        rows.append([groups["weight"]["lr"], groups["bn"]["lr"], groups["bias"]["lr"], momentum, trainer.accumulate])

    trainer.add_callback("on_train_batch_end", note)
    trainer.train()
    return rows


def main(path):
    data()
    result = {"batches": IMAGES // BATCH, "cases": {}}
    for name, options in CASES.items():
        result["cases"][name] = {"options": options, "rows": run(name, options)}
    with open(path, "w") as file:
        json.dump(result, file)
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
