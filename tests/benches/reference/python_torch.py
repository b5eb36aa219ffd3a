"""The models of the bench `python_task`, and their training by torchrun + DistributedDataParallel + DataLoader."""

import json
import os
import sys
import time
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F


class Pictures(torch.utils.data.Dataset):
    """Compressed pictures u8 `[3, side, side]`, taken apart by Python in about a millisecond."""

    def __init__(self, first, count, side=48, work=12):
        self.first, self.count, self.side, self.work = first, count, side, work
        draw = torch.Generator().manual_seed(first)
        self.packed = [zlib.compress(bytes(torch.randint(0, 64, (3 * side * side,), generator=draw).tolist())) for _ in range(64)]

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        for _ in range(self.work):
            data = zlib.decompress(self.packed[index % 64])
        picture = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(3, self.side, self.side)
        return picture + index % 4 * 40, index % 4


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4)
        )

    def forward(self, x, y):
        prediction = self.body(x.float() / 255)
        return F.cross_entropy(prediction, y), prediction


class Tiny(nn.Module):
    """Eight numbers in, eight out: what is left is the step itself."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)

    def forward(self, x):
        prediction = self.body(x)
        return prediction.square().mean(), prediction


class Numbers(torch.utils.data.Dataset):
    def __init__(self, count):
        self.data = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


def build(kind="small", samples=2048):
    if kind == "tiny":
        return dict(model=Tiny, train=Numbers(samples), val=Numbers(64))
    return dict(model=Small, train=Pictures(0, samples), val=Pictures(10**6, 64))


def pss(pid):
    for line in open(f"/proc/{pid}/smaps_rollup"):
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0


def main(kind, samples, epochs, batch, workers):
    torch.distributed.init_process_group("gloo")
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(0)
    built = build(kind, samples)
    net = torch.nn.parallel.DistributedDataParallel(built["model"]())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    sampler = torch.utils.data.DistributedSampler(built["train"], shuffle=True, drop_last=True)
    loader = torch.utils.data.DataLoader(
        built["train"], batch_size=batch, sampler=sampler, num_workers=workers, persistent_workers=workers > 0, drop_last=True
    )
    first, spent, steps = None, [], 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        began = time.time()
        for fields in loader:
            optimizer.zero_grad()
            loss, _ = net(*(fields if isinstance(fields, (list, tuple)) else [fields]))
            loss.backward()
            optimizer.step()
            steps += 1
            first = first or time.time()
        spent.append(time.time() - began)
    if rank == 0:
        rate = len(loader) * batch * world / (sum(spent[1:]) / max(1, len(spent) - 1))
        print(json.dumps({"first": first, "rate": rate, "step_ms": 1e3 * sum(spent[1:]) / (len(loader) * (epochs - 1))}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]))
