"""Peer of `scripts/bench detect`: the package's own trainer and validator over the same files, on CPU ranks.

    detect_package.py '{"work": "train", "data": "data.yaml", "width": 0.125, "imgsz": 320, "batch": 8, "steps": 40}'
    python -m torch.distributed.run --nproc-per-node 3 detect_package.py '{… "ranks": 3, "cache": "ram"}'

Prints one line of JSON: when steps ended (seconds since 1970), or the seconds of a validation. The package trains on one CPU process
only; here its own code for several devices is given CPU ranks that meet over gloo.
"""

import json
import os
import sys
import tempfile
import time

FOLDER = tempfile.mkdtemp()
os.environ.setdefault("YOLO_CONFIG_DIR", FOLDER)
os.environ["YOLO_OFFLINE"] = "true"

import torch
import torch.distributed as dist
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_validate import shape

RANK = int(os.environ.get("RANK", -1))


class Enough(Exception):
    pass


class CpuRanks(DetectionTrainer):
    """The trainer with its path for several devices, on CPUs."""

    def _setup_ddp(self):
        dist.init_process_group("gloo")
        whole = torch.nn.parallel.DistributedDataParallel

        def on_cpu(model, device_ids=None, **options):
            return whole(model, **options)

        torch.nn.parallel.DistributedDataParallel = on_cpu


def train(job):
    ranks, ends = job.get("ranks", 1), []
    if ranks > 1:
        torch.set_num_threads(1)
    trainer = CpuRanks(overrides=dict(
        model=shape(job), data=job["data"], imgsz=job["imgsz"], batch=job["batch"] * ranks, nbs=job["batch"] * ranks,
        epochs=job.get("epochs", 1000), workers=0, device="cpu", plots=False, val=False, save=False, project=FOLDER, name=str(RANK), amp=False,
        cache=job.get("cache") or False, verbose=False, optimizer="SGD", close_mosaic=0, deterministic=False,
    ))
    trainer.world_size = ranks if ranks > 1 else 0
    if ranks > 1:
        # What the package asks of workers, for want of which it would load in the rank itself.
        trainer.args.workers = job.get("workers", 0)

    def note(trainer):
        ends.append(time.time())
        if len(ends) >= job["steps"]:
            raise Enough

    trainer.add_callback("on_train_batch_end", note)
    try:
        trainer.train()
    except Enough:
        pass
    return {"ends": ends}


def validate(job):
    seconds = []
    yolo = YOLO(shape(job))
    for _ in range(job.get("repeats", 1)):
        began = []
        yolo.callbacks["on_val_start"] = [lambda validator: began.append(time.time())]
        yolo.callbacks["on_val_end"] = [lambda validator: seconds.append(time.time() - began[-1])]
        yolo.val(data=job["data"], imgsz=job["imgsz"], batch=job["batch"], device="cpu", workers=0, plots=False, verbose=False,
                 project=FOLDER)
    return {"seconds": seconds}


def main():
    job = json.loads(sys.argv[1])
    result = {"train": train, "val": validate}[job["work"]](job)
    if RANK in (-1, 0):
        print(json.dumps(result), flush=True)
    if dist.is_initialized():
        # Every rank stops at the same step, none waits for another's end.
        os._exit(0)


if __name__ == "__main__":
    main()
