"""PyTorch's DataLoader whose workers each keep every window they have read, as a plain dict: what the guides started from.
`cache_torch.py '{"files": [...], "batch": 32, "workers": 4, "epochs": 3}'` prints one line of JSON when it lives to its end."""

import json
import sys

import torch
from data_torch import EmgWindows
from torch.utils.data import DataLoader, Dataset


class Cached(Dataset):
    def __init__(self, data):
        self.data, self.kept = data, {}

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index not in self.kept:
            self.kept[index] = self.data[index]
        return self.kept[index]


def main():
    job = json.loads(sys.argv[1])
    torch.manual_seed(42)
    data = Cached(EmgWindows("", files=job["files"], rdcc_nbytes=64 << 20))
    loader = DataLoader(data, batch_size=job["batch"], shuffle=True, num_workers=job["workers"], persistent_workers=True)
    samples = sum(len(x) for _ in range(job["epochs"]) for x, _y in loader)
    print(json.dumps({"samples": samples}))


if __name__ == "__main__":
    main()
