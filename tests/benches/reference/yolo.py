"""Values of the installed YOLO package that tests of the task `yolo` compare with.

    .bench-venv/bin/python tests/benches/reference/yolo.py tests/fixtures/yolo_golden.safetensors

Runs the package (ultralytics 8.4, as an oracle; nothing of it is copied): forward passes, loss, gradients, eight optimizer steps with
EMA, assigner, suppression, matching, curves, averages' decay. Weights and images follow from a hash of integers (`draw`) that the tests
compute as well, so that the file holds results alone. Large tensors are kept as signatures: see `signature`.
"""

import os
import sys
import tempfile

os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
os.environ["YOLO_OFFLINE"] = "true"

import numpy as np
import torch
from safetensors.torch import save_file
from ultralytics.cfg import get_cfg
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.engine.validator import BaseValidator
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.loss import v8DetectionLoss
from ultralytics.utils.metrics import ap_per_class, box_iou
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.torch_utils import ModelEMA

CLASSES = 3
SIDE = 96
STEPS = 8
BATCH = 2
OUT = {}


def draw(count, salt):
    """Uniform in [-1, 1), f64."""
    mask = np.uint64(0xFFFFFFFF)
    x = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(salt * 40503 + 12345)) & mask
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(2246822519)) & mask
    x ^= x >> np.uint64(13)
    return x.astype(np.float64) / 2.0**31 - 1.0


def signature(tensor):
    """Two-norm, largest absolute value, two projections on hashed vectors, the first eight values (0 where there are none)."""
    x = tensor.detach().double().flatten().numpy()
    first = np.zeros(8)
    first[: min(8, x.size)] = x[:8]
    marks = [np.sqrt((x * x).sum()), np.abs(x).max(), (x * draw(x.size, 1)).sum(), (x * draw(x.size, 2)).sum()]
    return torch.from_numpy(np.concatenate([marks, first]))


def weights(model):
    state = model.state_dict()
    for salt, name in enumerate(sorted(state)):
        value = state[name]
        if "dfl" in name or "num_batches" in name:
            continue
        u = draw(value.numel(), salt + 10)
        if name.endswith("running_var"):
            u = 1.0 + 0.5 * np.abs(u)
        elif name.endswith("running_mean"):
            u = 0.1 * u
        elif ".bn.weight" in name:
            u = 1.0 + 0.2 * u
        elif ".bn.bias" in name:
            u = 0.1 * u
        elif name.endswith("bias"):
            u = 0.5 * u - (1.0 if ".cv3." in name else 0.0)
        else:
            u = u * np.sqrt(3.0 / (value.shape[1] * value.shape[2] * value.shape[3]))
        state[name] = torch.from_numpy(u.astype(np.float32)).view(value.shape)
    model.load_state_dict(state)
    return model


def images(index, height=SIDE, width=SIDE):
    bytes_ = ((draw(BATCH * 3 * height * width, 500 + index) + 1.0) * 128.0).astype(np.uint8)
    return torch.from_numpy(bytes_).view(BATCH, 3, height, width)


def boxes(index):
    """Rows of image, class, cx, cy, w, h: large, small and crowded ones; every fourth batch has an image without any."""
    u = (draw(200, 900 + index) + 1.0) / 2.0
    rows = []
    for image in range(BATCH):
        if index % 4 == 3 and image == 1:
            continue
        for row in range(2 + (index + image) % 4):
            a = u[(image * 8 + row) * 5 : (image * 8 + row) * 5 + 5]
            w, h = 0.05 + 0.6 * a[3] ** 2, 0.05 + 0.6 * a[4] ** 2
            cx, cy = w / 2 + a[1] * (1 - w), h / 2 + a[2] * (1 - h)
            rows.append([image, int(a[0] * CLASSES), cx, cy, w, h])
    return torch.tensor(np.array(rows, dtype=np.float64).reshape(-1, 6), dtype=torch.float32)


def as_batch(rows):
    return {"batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": rows[:, 2:]}


def built():
    torch.manual_seed(0)
    model = weights(DetectionModel("yolov8n.yaml", ch=3, nc=CLASSES, verbose=False))
    model.args = get_cfg()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "dfl" not in name
    return model


def items_of(items):
    return torch.stack([items["box_loss"], items["cls_loss"], items["dfl_loss"]]).double()


def forward():
    model = built().eval()
    x = images(0, 64, 96).float() / 255
    with torch.no_grad():
        _, raw = model(x)
    OUT["forward/boxes"], OUT["forward/classes"] = raw["boxes"].clone(), raw["scores"].clone()
    model.train()
    with torch.no_grad():
        raw = model(x)
    OUT["forward_train/boxes"], OUT["forward_train/classes"] = raw["boxes"].clone(), raw["scores"].clone()
    OUT["forward_train/mean"] = signature(model.state_dict()["model.21.cv2.bn.running_mean"])
    OUT["forward_train/var"] = signature(model.state_dict()["model.0.bn.running_var"])


def loss_and_gradients():
    for case in range(4):
        rows = boxes(case) if case < 3 else torch.zeros(0, 6)
        model = built()
        for train in (True, False):
            model.train(train)
            raw = model(images(case).float() / 255)
            raw = raw if train else raw[1]
            loss, items = v8DetectionLoss(model)(raw, as_batch(rows))
            kind = "train" if train else "eval"
            OUT[f"loss/{case}/{kind}/items"] = items_of(items)
            OUT[f"loss/{case}/{kind}/sum"] = loss.detach().sum().double().view(1)
            if case in (0, 3) and train:
                model.zero_grad()
                loss.sum().backward()
                for name, parameter in model.named_parameters():
                    if parameter.grad is not None:
                        OUT[f"gradient/{case}/{name}"] = signature(parameter.grad)
        OUT[f"loss/{case}/boxes"] = rows


def steps():
    """Two epochs of four batches: warm-up over the first five iterations, SGD with Nesterov's momentum, clipping, EMA."""
    model = built().train()
    lr0, lrf, momentum, decay, epochs, batches = 0.01, 0.01, 0.937, 5e-4, 2, STEPS // 2
    optimizer = BaseTrainer.build_optimizer(None, model, "SGD", lr0, momentum, decay)
    ema = ModelEMA(model)
    criterion = v8DetectionLoss(model)
    warmup = round(min(3.0, epochs - 1) * batches)
    all_items, norms = [], []
    for ni in range(STEPS):
        factor = max(1 - (ni // batches) / epochs, 0) * (1 - lrf) + lrf
        for group in optimizer.param_groups:
            group["lr"] = lr0 * factor
            if ni <= warmup:
                start = 0.1 if group["param_group"] == "bias" else 0.0
                group["lr"] = np.interp(ni, [0, warmup], [start, lr0 * factor])
                group["momentum"] = np.interp(ni, [0, warmup], [0.8, momentum])
        loss, items = criterion(model(images(ni).float() / 255), as_batch(boxes(ni)))
        loss.sum().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0))
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        all_items.append(items_of(items))
        OUT[f"steps/boxes/{ni}"] = boxes(ni)
    OUT["steps/items"] = torch.stack(all_items)
    OUT["steps/norms"] = torch.stack(norms).double()
    for kind, state in (("after", model.state_dict()), ("ema", ema.ema.state_dict())):
        for name, value in state.items():
            if value.is_floating_point():
                OUT[f"steps/{kind}/{name}"] = signature(value)
    decays = [ema.decay(n) for n in (1, 2, 10, 100, 2000, 20000)]
    OUT["ema/decays"] = torch.tensor(decays, dtype=torch.float64)


def assigner():
    model = built()
    assigner = v8DetectionLoss(model).assigner
    from ultralytics.utils.tal import make_anchors

    feats = [torch.zeros(1, 1, SIDE // s, SIDE // s) for s in (8, 16, 32)]
    anchors, strides = make_anchors(feats, model.stride, 0.5)
    count = anchors.shape[0]
    for case in range(6):
        generator = torch.Generator().manual_seed(case)
        scores = torch.rand(BATCH, count, CLASSES, generator=generator) * (0.9 if case % 2 else 0.3) + 0.05
        sides = torch.rand(BATCH, count, 4, generator=generator) * (4 if case < 3 else 2)
        predicted = torch.cat([anchors - sides[..., :2], anchors + sides[..., 2:]], -1) * strides
        rows = boxes(case + 20)
        # Crowded: the same boxes again, slightly moved.
        more = rows.clone()
        more[:, 2:4] += 0.03
        rows = torch.cat([rows, more]) if case >= 2 else rows
        rows = rows[rows[:, 0].argsort(stable=True)]
        targets = v8DetectionLoss(model).preprocess(rows, BATCH, torch.tensor([SIDE] * 4, dtype=torch.float32))
        labels, truth = targets.split((1, 4), 2)
        mask = truth.sum(2, keepdim=True).gt_(0.0)
        _, _, target_scores, positive, numbers = assigner(scores, predicted, anchors * strides, labels, truth, mask)
        OUT[f"assigner/{case}/scores"], OUT[f"assigner/{case}/boxes"] = scores, predicted
        OUT[f"assigner/{case}/rows"] = rows
        OUT[f"assigner/{case}/positive"] = positive.to(torch.uint8)
        OUT[f"assigner/{case}/numbers"] = numbers.to(torch.int32)
        OUT[f"assigner/{case}/targets"] = target_scores.sum(-1)


def suppression():
    generator = torch.Generator().manual_seed(3)
    count = 400
    centres, sizes = torch.rand(1, 2, count, generator=generator) * 200, torch.rand(1, 2, count, generator=generator) * 60 + 10
    scores = torch.rand(1, CLASSES, count, generator=generator) ** 3
    raw = torch.cat([centres, sizes, scores], 1)
    OUT["nms/raw"] = raw
    for name, options in (("val", dict(conf_thres=0.001, multi_label=True)), ("predict", dict(conf_thres=0.25))):
        OUT[f"nms/{name}"] = non_max_suppression(raw.clone(), iou_thres=0.7, max_det=300, **options)[0]


def matching_and_curves():
    class Validator(BaseValidator):
        def __init__(self):
            self.iouv = torch.linspace(0.5, 0.95, 10)

    generator = torch.Generator().manual_seed(11)
    right, confidence, classes, truth_classes = [], [], [], []
    for image in range(12):
        truth = torch.rand(5, 4, generator=generator) * 60
        truth[:, 2:] = truth[:, :2] + 20 + truth[:, 2:] / 2
        labels = torch.randint(0, CLASSES - 1, (5,), generator=generator)
        found = truth.repeat(3, 1) + torch.randn(15, 4, generator=generator) * torch.tensor([1.0, 3.0, 8.0]).repeat_interleave(5)[:, None]
        guesses = labels.repeat(3)
        swap = torch.rand(15, generator=generator) < 0.2
        guesses[swap] = torch.randint(0, CLASSES, (int(swap.sum()),), generator=generator)
        sure = torch.rand(15, generator=generator)
        order = sure.argsort(descending=True)
        found, guesses, sure = found[order], guesses[order], sure[order]
        hits = BaseValidator.match_predictions(Validator(), guesses, labels, box_iou(truth, found))
        OUT[f"matching/{image}/truth"] = torch.cat([labels[:, None].float(), truth], 1)
        OUT[f"matching/{image}/found"] = torch.cat([found, sure[:, None], guesses[:, None].float()], 1)
        OUT[f"matching/{image}/right"] = hits.to(torch.uint8)
        right.append(hits.numpy())
        confidence.append(sure.numpy())
        classes.append(guesses.numpy())
        truth_classes.append(labels.numpy())
    out = ap_per_class(np.concatenate(right), np.concatenate(confidence), np.concatenate(classes), np.concatenate(truth_classes))
    _, _, p, r, f1, ap, unique = out[:7]
    OUT["curves/precision"], OUT["curves/recall"] = torch.from_numpy(p), torch.from_numpy(r)
    OUT["curves/f1"], OUT["curves/average"] = torch.from_numpy(f1), torch.from_numpy(ap)
    OUT["curves/classes"] = torch.from_numpy(np.asarray(unique)).to(torch.int64)


def main(path):
    torch.set_num_threads(1)
    for part in (forward, loss_and_gradients, steps, assigner, suppression, matching_and_curves):
        part()
    save_file({name: value.contiguous() for name, value in OUT.items()}, path)
    print(len(OUT), "tensors,", os.path.getsize(path), "bytes")


if __name__ == "__main__":
    main(sys.argv[1])
