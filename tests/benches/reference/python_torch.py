"""The models of the bench `python_task`, and their training by torchrun + DataLoader with DistributedDataParallel, Lightning or accelerate.

    torchrun ... python_torch.py HOW MODEL SAMPLES EPOCHS BATCH WORKERS     # HOW: torchrun, lightning, accelerate
    python python_torch.py loop                                             # a step by torch.optim alone, ms
"""

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


class Windows(torch.utils.data.Dataset):
    """Made-up windows of the task `emg`."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        return torch.randn(500, 16, generator=draw), torch.randn(500, 20, generator=draw)


def emg():
    """The network of the task `emg`, as configs/default.yaml has it."""
    from emg_torch import CONFIGS, EmgModel

    return EmgModel(**CONFIGS["default"])


def build(kind="small", samples=2048):
    if kind == "emg":
        from emg_torch import loss_fn

        return dict(model=emg, loss=loss_fn, train=Windows(samples), val=Windows(16))
    if kind == "tiny":
        return dict(model=Tiny, train=Numbers(samples), val=Numbers(64))
    return dict(model=Small, train=Pictures(0, samples), val=Pictures(10**6, 64))


def pss(pid):
    for line in open(f"/proc/{pid}/smaps_rollup"):
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0


class Clock:
    """Time of the first step, and of each epoch."""

    def __init__(self):
        self.first, self.spent = None, []

    def epoch(self):
        self.began = time.time()

    def step(self):
        self.first = self.first or time.time()

    def end(self):
        self.spent.append(time.time() - self.began)


def loader_of(data, batch, workers, sampler=None):
    return torch.utils.data.DataLoader(
        data, batch_size=batch, sampler=sampler, shuffle=sampler is None, num_workers=workers, persistent_workers=workers > 0, drop_last=True
    )


def as_tuple(fields):
    return fields if isinstance(fields, (list, tuple)) else [fields]


def by_torchrun(built, clock, epochs, batch, workers):
    torch.distributed.init_process_group("gloo")
    net = torch.nn.parallel.DistributedDataParallel(built["model"]())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    sampler = torch.utils.data.DistributedSampler(built["train"], shuffle=True, drop_last=True)
    loader = loader_of(built["train"], batch, workers, sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        clock.epoch()
        for fields in loader:
            optimizer.zero_grad()
            loss, _ = net(*as_tuple(fields))
            loss.backward()
            optimizer.step()
            clock.step()
        clock.end()
    return len(loader)


def by_accelerate(built, clock, epochs, batch, workers):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = built["model"]()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader_of(built["train"], batch, workers))
    for _ in range(epochs):
        clock.epoch()
        for fields in loader:
            optimizer.zero_grad()
            loss, _ = net(*as_tuple(fields))
            accelerator.backward(loss)
            optimizer.step()
            clock.step()
        clock.end()
    return len(loader)


def by_lightning(built, clock, epochs, batch, workers):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = built["model"]()

        def training_step(self, fields, index):
            return self.net(*as_tuple(fields))[0]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

        def on_train_epoch_start(self):
            clock.epoch()

        def on_train_batch_end(self, *_):
            clock.step()

        def on_train_epoch_end(self):
            clock.end()

    world = int(os.environ["WORLD_SIZE"])
    trainer = lightning.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=epochs, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    loader = loader_of(built["train"], batch, workers)
    trainer.fit(Module(), loader)
    return len(built["train"]) // (batch * world)


def main(how, kind, samples, epochs, batch, workers):
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(0)
    clock, built = Clock(), build(kind, samples)
    steps = {"torchrun": by_torchrun, "lightning": by_lightning, "accelerate": by_accelerate}[how](built, clock, epochs, batch, workers)
    if rank == 0:
        step_s = sum(clock.spent[1:]) / max(1, steps * (epochs - 1))
        rate = batch * world / step_s if epochs > 1 else 0
        print(json.dumps({"first": clock.first, "rate": rate, "step_ms": 1e3 * step_s}), flush=True)


def loop(steps=2000):
    """Milliseconds of a step of the tiny model without any loader: zero_grad, forward, backward, torch.optim."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, x, spent = Tiny(), torch.randn(32, 8), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss, _ = net(x)
        loss.backward()
        optimizer.step()
        loss.item()
        spent.append(time.perf_counter() - began)
    print(json.dumps({"step_ms": 1e3 * sorted(spent)[steps // 2]}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "loop":
        loop()
    else:
        main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7]))
