"""DistributedDataParallel over a data set that is decoded once per node.

    torchrun --nproc-per-node 2 ddp.py
    launch --gpus 2 --cache 64MiB --exec python ddp.py
"""

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import headroom_train as headroom


class Circles(torch.utils.data.Dataset):
    """Points with their distance from the middle."""

    def __len__(self):
        return 512

    def __getitem__(self, index):
        point = np.random.default_rng(index).normal(size=8).astype(np.float32)
        return torch.from_numpy(point), torch.tensor([float(np.linalg.norm(point))])


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    loader = headroom.DataLoader(headroom.cached(Circles()), batch_size=16, shuffle=True, seed=42, num_workers=2)
    step = 0
    for epoch in range(4):
        for x, y in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            step += 1
            headroom.report(step, loss=loss, epoch=epoch, epochs=4, samples=len(x) * loader.world_size)
            if headroom.stopping():
                break
    stats = headroom.stats()
    print(f"rank {loader.rank}: loss {loss.item():.4f}, {stats['node_decodes']} decodes on this node", flush=True)
    loader.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
