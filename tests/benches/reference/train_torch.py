"""One rank of the reference: PyTorch DDP (gloo) + DataLoader, started by torchrun; prints one JSON line on rank 0."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parent))
from data_torch import EmgWindows
from emg_torch import CONFIGS, EmgModel, loss_fn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--files", type=int, help="train on the first so many files; absent: all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stride", type=int, default=50)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5, help="steps between two records; the first ends the warm-up")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(42)
    paths = sorted(str(path) for path in Path(args.data).rglob("*.hdf5"))[: args.files]
    data = EmgWindows(args.data, stride=args.stride, files=paths)
    sampler = DistributedSampler(data, shuffle=True, seed=42, drop_last=True)
    loader = DataLoader(data, batch_size=args.batch, sampler=sampler, num_workers=args.workers, drop_last=True,
                        persistent_workers=args.workers > 0, prefetch_factor=2 if args.workers else None)
    model = DistributedDataParallel(EmgModel(**CONFIGS["default"]), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01, fused=True)

    step, samples, epoch, ends, losses = 0, 0, 0, {}, {}
    while step < args.steps:
        sampler.set_epoch(epoch)
        epoch += 1
        for x, y in loader:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            samples += len(x) * dist.get_world_size()
            if step == 1 or step % args.every == 0:
                ends[step], losses[step] = time.time(), loss.detach()
            if step == args.steps:
                break
    mean = torch.stack(list(losses.values()))
    dist.all_reduce(mean)
    if dist.get_rank() == 0:
        losses = dict(zip(losses, (mean / dist.get_world_size()).tolist()))
        print(json.dumps({"samples": samples, "windows": len(data), "ends": ends, "losses": losses}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
