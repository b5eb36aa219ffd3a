"""Writes tests/fixtures/vgg_golden.json: what PyTorch makes of VGG16's features and of LPIPS with made-up weights.

`src/task/deblur/vgg.rs` and `lpips.rs` are held to these values. Weights and frames follow from `numbers`, in f64, so that
both sides make the same ones; names and shapes are torchvision's `vgg16` and those of the `lpips` package.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

LAYERS = [(0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256),
          (17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512)]
# After these convolutions LPIPS compares: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
TAPS, POOLED_BEFORE = [2, 7, 14, 21, 28], [5, 10, 17, 24]


def numbers(shape, scale, shift=0.5):
    """(n · 2654435761 mod 2³²) / 2³² - shift, times scale, n from 0."""
    count = torch.Size(shape).numel()
    n = torch.arange(count, dtype=torch.int64) * 2654435761 % 2**32
    return ((n.double() / 2**32 - shift) * scale).float().view(shape)


def weights(number, cin, cout):
    return numbers([cout, cin, 3, 3], (24 / (9 * cin)) ** 0.5), numbers([cout], 0.1)


def features(x, last):
    """Outputs of the ReLU after each convolution of TAPS up to `last`, of frames that are normalised already."""
    found = []
    for number, cin, cout in LAYERS:
        if number > last:
            break
        if number in POOLED_BEFORE:
            x = F.max_pool2d(x, 2)
        weight, bias = weights(number, cin, cout)
        x = F.relu(F.conv2d(x, weight, bias, padding=1))
        if number in TAPS:
            found.append(x)
    return found


def channels(values):
    return torch.tensor(values).view(1, 3, 1, 1)


def relu3_3(frames):
    return features((frames - channels([0.485, 0.456, 0.406])) / channels([0.229, 0.224, 0.225]), 14)[-1]


def lpips(a, b):
    """Zhang et al. 2018, version 0.1 of the package: one value per frame, of frames in 0..1."""
    def parts(frames):
        scaled = (2 * frames - 1 - channels([-0.030, -0.088, -0.188])) / channels([0.458, 0.448, 0.450])
        return [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in features(scaled, 28)]

    total = 0
    for n, (x, y) in enumerate(zip(parts(a), parts(b))):
        lin = numbers([1, x.shape[1], 1, 1], 0.1, shift=0)
        total = total + F.conv2d((x - y).square(), lin).mean([2, 3])[:, 0]
    return total


def main():
    restored, sharp = numbers([2, 3, 32, 48], 1, shift=0), numbers([2, 3, 32, 48], 0.9, shift=-0.05).flip(3)
    small = restored[:1, :, :8, :12]
    golden = {
        "relu3_3": [round(value, 6) for value in relu3_3(small).flatten().tolist()],
        "distance": (relu3_3(restored) - relu3_3(sharp)).abs().mean().item(),
        "lpips": lpips(restored, sharp).tolist(),
    }
    path = Path(__file__).resolve().parents[2] / "fixtures" / "vgg_golden.json"
    path.write_text(json.dumps(golden) + "\n")
    print({name: value if name != "relu3_3" else len(value) for name, value in golden.items()})


if __name__ == "__main__":
    with torch.no_grad():
        main()
