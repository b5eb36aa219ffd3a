"""MosaicML Streaming and LitData over the samples of `scripts/bench python`: `python_peers.py KIND DATA SAMPLES` prints a line of JSON.

Both want the data set converted first. Samples are converted decoded, which is the most that these formats can save: nothing is decoded
later. The conversion's seconds are given apart.
"""

import json
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import numpy as np  # noqa: E402
import python as bench  # noqa: E402


class Item:
    """A sample for LitData, which hands functions to its own processes."""

    def __init__(self, made):
        self.made = made

    def __call__(self, index):
        x, y = self.made[index]
        return {"x": x, "y": y}


def streaming(made, folder):
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    x = made[0][0]
    columns = {"x": f"ndarray:{x.dtype}:{','.join(map(str, x.shape))}", "y": "int"}
    with MDSWriter(out=folder, columns=columns) as out:
        for index in range(len(made)):
            x, y = made[index]
            out.write({"x": x, "y": y})
    converted = time.perf_counter()
    data = StreamingDataset(local=folder, shuffle=True, shuffle_seed=1, batch_size=bench.BATCH, num_canonical_nodes=1)
    return converted, DataLoader(data, batch_size=bench.BATCH, num_workers=2, persistent_workers=True, drop_last=True)


def litdata(made, folder):
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    optimize(fn=Item(made), inputs=list(range(len(made))), output_dir=folder, num_workers=2, chunk_bytes="64MB")
    converted = time.perf_counter()
    data = StreamingDataset(folder, shuffle=True, drop_last=True, seed=1)
    return converted, StreamingDataLoader(data, batch_size=bench.BATCH, num_workers=2, persistent_workers=True, drop_last=True)


def main(kind, data, samples):
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        converted, loader = {"streaming": streaming, "litdata": litdata}[kind](bench.DATA[data](samples), os.path.join(folder, "data"))
        times, first, steps = [], None, 0
        for _ in range(bench.EPOCHS):
            start, steps = time.perf_counter(), 0
            for batch in loader:
                first = first or time.perf_counter() - start
                assert batch["x"].shape[0] == bench.BATCH
                steps += bench.BATCH
            times.append(time.perf_counter() - start)
        anonymous, shared = bench.memory_of([os.getpid(), *bench.children()])
        print(json.dumps(dict(first=steps / times[0], later=[steps / spent for spent in times[1:]], first_batch_s=first, anonymous=anonymous,
                              shared=shared, decodes=samples, converted_s=converted - began)), flush=True)
        del loader, batch


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
