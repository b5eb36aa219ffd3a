"""The EMG windows as a PyTorch user would read them: h5py, lazy files per worker, one window per item."""

import glob
import os

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset


class EmgWindows(Dataset):
    """Windows of `window` rows at `stride`; x [T, 16] f32, y [T, 20] f32. Files open lazily in each worker."""

    def __init__(self, root, window=500, stride=50, rdcc_nbytes=64 << 20, files=None):
        self.paths = files or sorted(glob.glob(os.path.join(root, "**", "*.hdf5"), recursive=True))
        self.window, self.stride, self.rdcc_nbytes = window, stride, rdcc_nbytes
        counts = []
        for path in self.paths:
            with h5py.File(path, "r") as file:
                rows = len(file["emg2pose/timeseries"])
            counts.append(max(0, (rows - window) // stride + 1))
        self.ends = np.cumsum(counts)
        self.tables = {}

    def __len__(self):
        return int(self.ends[-1])

    def table(self, index):
        if index not in self.tables:
            file = h5py.File(self.paths[index], "r", rdcc_nbytes=self.rdcc_nbytes, rdcc_w0=0.75)
            self.tables[index] = file["emg2pose/timeseries"]
        return self.tables[index]

    def __getitem__(self, item):
        index = int(np.searchsorted(self.ends, item, side="right"))
        first = item - (int(self.ends[index - 1]) if index else 0)
        start = first * self.stride
        rows = self.table(index)[start : start + self.window]
        x = torch.from_numpy(np.ascontiguousarray(rows["emg"], dtype=np.float32))
        y = torch.from_numpy(rows["joint_angles"].astype(np.float32))
        return x, y
