"""Headroom for a train.py of one's own: samples are decoded once per node, whatever the number of ranks, workers and epochs.

    import headroom_train as headroom

    data = headroom.cached(MyDataset(), transform=augment)
    loader = headroom.DataLoader(data, batch_size=64, shuffle=True, seed=42, num_workers=2)
    for x, y in loader:
        ...

It works under `launch --exec`, torchrun, srun, mpirun, Lightning and accelerate, and in one process alone; with any PyTorch, or
without. See README.md.
"""

from . import _native
from .dataset import Cached, cached
from .files import h5ad, hdf5, images
from .loader import DataLoader
from .node import configure
from .place import Place, PlaceError, place
from .run import memory, report, stats, stopping
from .sampler import Sampler
from .store import Cache
from .worker import WorkerError

__version__ = _native.__version__
__all__ = [
    "Cache", "Cached", "DataLoader", "Place", "PlaceError", "Sampler", "WorkerError", "cached", "configure", "h5ad",
    "hdf5", "images", "memory", "place", "report", "stats", "stopping",
]
