"""Clips as a PyTorch user would read them after the guide: full frames and voxels as f32 tensors in an LRU cache of each
worker process, cropped after. Run as a program it is a whole job: ranks as processes, each with its DataLoader. It reads
numbers, one a line: so many clips of a new random order on each rank, a line of JSON after each; 0 ends it.

    clips_torch.py '{"data": DIR, "ranks": 3, "workers": 4, "cache_bytes": N, ...}'
"""

import collections
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class LruCache:
    """Tensors by name up to so many bytes; the least recently used leave first."""

    def __init__(self, limit_bytes):
        self.limit_bytes, self.used_bytes, self.tensors = limit_bytes, 0, collections.OrderedDict()
        self.hits = self.lookups = 0

    def get(self, key):
        self.lookups += 1
        if key not in self.tensors:
            return None
        self.hits += 1
        self.tensors.move_to_end(key)
        return self.tensors[key].clone()

    def put(self, key, tensor):
        size = tensor.numel() * tensor.element_size()
        if size > self.limit_bytes:
            return
        while self.used_bytes + size > self.limit_bytes:
            _, old = self.tensors.popitem(last=False)
            self.used_bytes -= old.numel() * old.element_size()
        self.tensors[key] = tensor
        self.used_bytes += size


class Clips(Dataset):
    """Items: blur, sharp `[T, 3, h, w]` in 0..1 and voxels `[T, K, h, w]`, one random crop for all."""

    def __init__(self, data, clip=5, crop=256, bins=32, spike_h=360, spike_w=640, cache_bytes=0, **_):
        self.clip, self.crop, self.bins, self.spike = clip, crop, bins, (spike_h, spike_w)
        self.cache = LruCache(cache_bytes)
        self.clips = []
        for sequence in sorted((Path(data) / "train").iterdir()):
            stems = sorted(path.stem for path in (sequence / "blur").glob("*.png"))
            self.clips += [(sequence, stems[n : n + clip]) for n in range(len(stems) - clip + 1)]

    def __len__(self):
        return len(self.clips)

    def cached(self, key, load):
        tensor = self.cache.get(key)
        if tensor is None:
            tensor = load()
            self.cache.put(key, tensor)
        return tensor

    def image(self, path):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div_(255)

    def voxel(self, path, size):
        """Bit-packed planes, upside down -> counts in bins -> log1p -> the frame's size."""
        height, width = self.spike
        bits = np.unpackbits(np.fromfile(path, np.uint8), bitorder="little")
        planes = len(bits) // (height * width)
        planes_of = bits[: planes * height * width].reshape(planes, height, width)[:, ::-1]
        counts = np.zeros((self.bins, height, width), np.float32)
        for time, plane in enumerate(planes_of):
            counts[time * self.bins // planes] += plane
        return F.interpolate(torch.from_numpy(counts).log1p_()[None], size=size, mode="bilinear", align_corners=False)[0]

    def __getitem__(self, index):
        sequence, stems = self.clips[index]
        parts = {"blur": [], "sharp": [], "voxel": []}
        for stem in stems:
            for kind in ("blur", "sharp"):
                path = sequence / kind / f"{stem}.png"
                parts[kind].append(self.cached(f"{kind}:{path}", lambda: self.image(path)))
            path, size = sequence / "spike" / f"{stem}.dat", parts["blur"][0].shape[1:]
            parts["voxel"].append(self.cached(f"voxel:{path}", lambda: self.voxel(path, size)))
        y, x = (int(torch.randint(0, side - self.crop + 1, ())) for side in parts["blur"][0].shape[1:])
        item = {k: torch.stack([t[:, y : y + self.crop, x : x + self.crop] for t in v]) for k, v in parts.items()}
        worker = torch.utils.data.get_worker_info()
        return item, torch.tensor([worker.id if worker else 0, self.cache.hits, self.cache.lookups])


def rank(number, job, wanted, barrier, results):
    torch.set_num_threads(1)
    clips = Clips(**job)
    options = {"persistent_workers": True, "prefetch_factor": job["prefetch"]} if job["workers"] else {}
    order = torch.Generator().manual_seed(42)

    class Shard(torch.utils.data.Sampler):
        """As DistributedSampler: every rank draws the same order and takes its share."""

        def __iter__(self):
            shuffled = torch.randperm(len(clips), generator=order).tolist()
            return iter(shuffled[number :: job["ranks"]][: wanted.value])

        def __len__(self):
            return wanted.value

    loader = DataLoader(clips, batch_size=1, sampler=Shard(), num_workers=job["workers"], **options)
    latest, before = {}, (0, 0)
    while True:
        barrier.wait()
        if wanted.value == 0:
            return
        started, samples = time.time(), 0
        for item, counts in loader:
            samples += 1
            worker, hits, lookups = counts[0].tolist()
            # Workers count from their start, and their items may come in any order.
            latest[worker] = max(latest.get(worker, (0, 0)), (lookups, hits))
            assert item["voxel"].shape[-1] == job["crop"]
        seconds = time.time() - started
        lookups, hits = (sum(counts[n] for counts in latest.values()) for n in (0, 1))
        results.put((samples, seconds, hits - before[1], lookups - before[0]))
        before = (lookups, hits)


def main():
    job = {"clip": 5, "crop": 256, "bins": 32, "workers": 4, "prefetch": 4, "ranks": 3, **json.loads(sys.argv[1])}
    context = mp.get_context("spawn")
    barrier, results = context.Barrier(job["ranks"] + 1), context.Queue()
    wanted = context.Value("l", 0, lock=False)
    ranks = [context.Process(target=rank, args=(n, job, wanted, barrier, results)) for n in range(job["ranks"])]
    [process.start() for process in ranks]
    for line in sys.stdin:
        if int(line) == 0:
            break
        wanted.value = int(line)
        barrier.wait()
        parts = [results.get() for _ in ranks]
        samples, _, hits, lookups = (sum(part[n] for part in parts) for n in range(4))
        rate = samples / max(part[1] for part in parts)
        print(json.dumps({"samples": samples, "samples_per_s": rate, "hits": hits, "lookups": lookups}), flush=True)
    wanted.value = 0
    barrier.wait()
    [process.join() for process in ranks]
    sys.exit(max(process.exitcode for process in ranks))


if __name__ == "__main__":
    main()
