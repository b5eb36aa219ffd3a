"""torchvision's ResNet-18 on pictures: coloured shapes, drawn and written as PNG on the spot. Needs torchvision."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.io import read_image, write_png
from torchvision.models import resnet18

KINDS = "square", "disc", "cross"


def draw(kind, seed, side=64):
    """A picture `[3, side, side]` of one shape."""
    chance = random.Random(seed)
    picture = torch.full((3, side, side), chance.randrange(40), dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    size, row, column = chance.randrange(10, 20), chance.randrange(20, 44), chance.randrange(20, 44)
    dy, dx = (y - row).abs(), (x - column).abs()
    inside = [(dy < size) & (dx < size), dy**2 + dx**2 < size**2, torch.minimum(dy, dx) + (torch.maximum(dy, dx) > size) * 9 < 4]
    picture[:, inside[kind]] = torch.tensor([chance.randrange(90, 256) for _ in range(3)], dtype=torch.uint8)[:, None]
    return picture


class Pictures(torch.utils.data.Dataset):
    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return read_image(str(self.files[index])), KINDS.index(self.files[index].stem.split("-")[0])


def flip(sample):
    picture, label = sample
    return (picture.flip(-1) if torch.rand(()) < 0.5 else picture), label


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = resnet18(num_classes=len(KINDS))

    def forward(self, pictures, labels):
        prediction = self.body(pictures.float() / 127.5 - 1)
        return F.cross_entropy(prediction, labels), prediction


def build(folder="sample-data/shapes", pictures=600):
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = [Path(folder) / f"{KINDS[number % 3]}-{number:05}.png" for number in range(pictures)]
    for number, file in enumerate(files):
        if not file.exists():
            write_png(draw(number % 3, number), str(file))
    cut = pictures * 4 // 5
    metrics = {"acc": lambda p, x, y: ((p.argmax(1) == y).sum(), len(y))}
    return dict(model=Net, train=Pictures(files[:cut]), val=Pictures(files[cut:]), transform=flip, metrics=metrics)
