"""A 3-D U-Net that finds balls in noisy volumes: .npy files written on the spot. Needs numpy."""

from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

SIDE = 24


def volume(seed):
    """A noisy volume f32 `[1, S, S, S]` and the mask of its ball."""
    chance = np.random.default_rng(seed)
    place = np.stack(np.meshgrid(*[np.arange(SIDE)] * 3, indexing="ij"))
    ball = ((place - chance.uniform(6, SIDE - 6, (3, 1, 1, 1))) ** 2).sum(0) < chance.uniform(3, 6) ** 2
    return (ball + chance.normal(0, 0.5, ball.shape)).astype("float32")[None], ball[None]


class Volumes(list, torch.utils.data.Dataset):
    def __getitem__(self, index):
        both = np.load(super().__getitem__(index))
        return both[:1], both[1:] > 0


def block(inner, outer):
    return nn.Sequential(nn.Conv3d(inner, outer, 3, padding=1), nn.GroupNorm(4, outer), nn.ReLU())


class Unet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down, self.deep = block(1, width), block(width, 2 * width)
        self.up, self.last = block(3 * width, width), nn.Conv3d(width, 1, 1)

    def forward(self, x):
        fine = self.down(x)
        coarse = F.interpolate(self.deep(F.max_pool3d(fine, 2)), scale_factor=2)
        return self.last(self.up(torch.cat([fine, coarse], 1)))


def dice(p, x, y):
    found = p > 0
    return 2 * (found & y).sum(), found.sum() + y.sum()


def build(folder="sample-data/balls", volumes=120, width=8):
    files = [Path(folder) / f"{number:04}.npy" for number in range(volumes)]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        if not file.exists():
            np.save(file, np.concatenate([part.astype("float32") for part in volume(number)]))
    cut, loss = volumes * 4 // 5, lambda p, y: F.binary_cross_entropy_with_logits(p, y.float())
    data = dict(train=Volumes(files[:cut]), val=Volumes(files[cut:]))
    return dict(model=lambda: Unet(width), loss=loss, metrics={"dice": dice}, **data)
