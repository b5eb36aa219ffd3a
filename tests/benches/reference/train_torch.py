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
from emg_torch import TdsLstm, default_config


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stride", type=int, default=50)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--started", type=float, default=time.time())
    args = parser.parse_args()

    dist.init_process_group("gloo")
    torch.manual_seed(42)
    data = EmgWindows(args.data, stride=args.stride)
    sampler = DistributedSampler(data, shuffle=True, seed=42, drop_last=True)
    loader = DataLoader(data, batch_size=args.batch, sampler=sampler, num_workers=args.workers, drop_last=True,
                        persistent_workers=args.workers > 0, prefetch_factor=2 if args.workers else None)
    model = DistributedDataParallel(TdsLstm(default_config()), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01, fused=True)

    step, first_step_s, begin, epoch = 0, None, None, 0
    while step < args.steps:
        sampler.set_epoch(epoch)
        epoch += 1
        for x, y in loader:
            if step == args.warmup:
                begin = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            out = model(x)
            loss = torch.nn.functional.mse_loss(out, y) + 0.5 * torch.nn.functional.l1_loss(out, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if first_step_s is None:
                first_step_s = time.time() - args.started
            if step == args.steps:
                break
    seconds = time.perf_counter() - begin
    if dist.get_rank() == 0:
        samples = (args.steps - args.warmup) * args.batch * dist.get_world_size()
        print(json.dumps({"samples_per_s": samples / seconds, "first_step_s": first_step_s, "loss": loss.item()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
