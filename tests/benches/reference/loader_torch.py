"""PyTorch's DataLoader over the EMG windows (h5py, two persistent workers, shuffled): one line of JSON with samples/s per
epoch. `loader_torch.py '{"files": [...], "batch": 64, "samples": 0, "epochs": 2, "workers": 2, "rdcc_nbytes": 67108864}'`"""

import json
import sys
import time

import torch
from data_torch import EmgWindows
from torch.utils.data import DataLoader


def main():
    job = json.loads(sys.argv[1])
    data = EmgWindows("", files=job["files"], rdcc_nbytes=job["rdcc_nbytes"])
    torch.manual_seed(42)
    loader = DataLoader(data, batch_size=job["batch"], shuffle=True, drop_last=True, num_workers=job["workers"],
                        persistent_workers=job["workers"] > 0)
    epochs = []
    for _ in range(job["epochs"]):
        # Workers start before the clock, as Headroom's threads do.
        batches = iter(loader)
        started, samples = time.perf_counter(), 0
        for x, _y in batches:
            samples += len(x)
            if job["samples"] and samples >= job["samples"]:
                break
        epochs.append(samples / (time.perf_counter() - started))
        del batches
    print(json.dumps({"windows": len(data), "samples_per_s": epochs}))


if __name__ == "__main__":
    main()
