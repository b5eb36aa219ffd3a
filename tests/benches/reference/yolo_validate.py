"""Weights and the installed YOLO package: what it measures of ours, and weights that it trained for us to measure.

    yolo_validate.py val WEIGHTS.safetensors DATA.yaml '{"width": 0.125, "imgsz": 160, "batch": 16}'
    yolo_validate.py train OUT.safetensors DATA.yaml '{"width": 0.125, "imgsz": 160, "batch": 8, "epochs": 20}'

Prints one line of JSON. `val` reads `model.safetensors` or `ema.safetensors` of a checkpoint. `train` writes the averaged weights as f32.
"""

import json
import os
import sys
import tempfile

FOLDER = tempfile.mkdtemp()
os.environ.setdefault("YOLO_CONFIG_DIR", FOLDER)
os.environ["YOLO_OFFLINE"] = "true"

import torch
import yaml
from safetensors.torch import load_file, save_file
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel, yaml_model_load


def shape(options):
    """The package's file of the model, with a width of our own."""
    model = yaml_model_load("yolov8n.yaml")
    model["scales"] = {"n": [options.get("depth", 0.33), options.get("width", 0.25), 1024]}
    path = f"{FOLDER}/yolov8n.yaml"
    with open(path, "w") as file:
        yaml.safe_dump(model, file)
    return path


def validate(weights, data, options):
    with open(data) as file:
        names = yaml.safe_load(file)["names"]
    names = names if isinstance(names, dict) else dict(enumerate(names))
    model = DetectionModel(shape(options), ch=3, nc=len(names), verbose=False)
    model.load_state_dict(load_file(weights), strict=True)
    model.names = names
    yolo = YOLO(shape(options))
    yolo.model = model.eval()
    found = yolo.val(
        data=data, imgsz=options["imgsz"], batch=options["batch"], device="cpu", workers=0, plots=False, verbose=False,
        project=FOLDER, split=options.get("split", "val"),
    )
    box = found.box
    return {"precision": box.mp, "recall": box.mr, "map50": box.map50, "map50_95": box.map}


def train(weights, data, options):
    trainer = DetectionTrainer(overrides=dict(
        model=shape(options), data=data, imgsz=options["imgsz"], batch=options["batch"], nbs=options["batch"],
        epochs=options["epochs"], mosaic=0.5, warmup_epochs=1, workers=0, device="cpu", plots=False, project=FOLDER,
        seed=options.get("seed", 0), verbose=False,
    ))
    trainer.train()
    state = {name: value.float() if value.is_floating_point() else value for name, value in trainer.ema.ema.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, weights)
    return {"tensors": len(state)}


def main(work, weights, data, options):
    result = {"val": validate, "train": train}[work](weights, data, json.loads(options))
    print(json.dumps({name: float(value) for name, value in result.items()}))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(*sys.argv[1:])
