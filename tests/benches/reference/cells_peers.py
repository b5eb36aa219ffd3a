"""Loaders of cells that others use, over one .h5ad: one line of JSON with cells per second and per CPU second of each epoch.

    cells_peers.py '{"peer": "csr", "data": "cells.h5ad", "batch": 128, "epochs": 2, "samples": 0}'

Peers: `dense` (the seed's: everything densified and log1p'd at the start, DataLoader with one worker), `csr` (scipy in memory, rows
drawn, densified and log1p'd per batch), `sorted` (h5py, sorted rows of a batch out of the file), `anncollection` (anndata's
AnnLoader), `annbatch` and `scdataset` (where they are installed; annbatch on a copy of its own format). Source of the seed's steps: scanpy's normalize_total to 1e4, log1p.
"""

import importlib.util
import json
import resource
import sys
import time

import h5py
import numpy as np

TARGET = 1e4


def cpu_s():
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def read(path):
    import scipy.sparse as sp
    with h5py.File(path) as file:
        group = file["X"]
        shape = tuple(group.attrs["shape"])
        matrix = sp.csr_matrix((group["data"][:], group["indices"][:], group["indptr"][:]), shape=shape)
        labels = file["obs/celltype/codes"][:]
    return matrix, labels


def express(dense):
    sums = dense.sum(1, dtype="f8")
    divisor = np.where(sums > 0, sums / TARGET, 1).astype("f4")
    return np.log1p(dense / divisor[:, None])


def expressed(counts, pointers):
    """Of the values of sparse rows: the zeros of a matrix need no logarithm."""
    sums = np.concatenate([[0.0], np.cumsum(counts, dtype="f8")])[pointers]
    sums = sums[1:] - sums[:-1]
    divisor = np.where(sums > 0, sums / TARGET, 1).astype("f4")
    return np.log1p(counts / np.repeat(divisor, np.diff(pointers)))


def densified(matrix):
    """A scipy matrix by rows as expression, dense."""
    import torch
    matrix.data = expressed(matrix.data.astype("f4", copy=False), matrix.indptr)
    return torch.from_numpy(matrix.toarray())


def batches(cells, batch, epoch):
    order = np.random.default_rng(epoch).permutation(cells)
    return (order[n:n + batch] for n in range(0, cells - batch + 1, batch))


def dense(job):
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    matrix, labels = read(job["data"])
    x = torch.from_numpy(express(matrix.toarray()))
    del matrix
    loader = DataLoader(TensorDataset(x, torch.from_numpy(labels.astype("i8"))), batch_size=job["batch"], shuffle=True, drop_last=True, num_workers=1)
    return lambda epoch: (rows for rows, _ in loader)


def csr(job):
    matrix, _ = read(job["data"])
    def epoch(number):
        for rows in batches(matrix.shape[0], job["batch"], number):
            yield densified(matrix[rows])
    return epoch


def sorted_rows(job):
    import torch
    file = h5py.File(job["data"])
    data, indices, pointers = file["X/data"], file["X/indices"], file["X/indptr"][:]
    cells, genes = file["X"].attrs["shape"]
    def epoch(number):
        for rows in batches(cells, job["batch"], number):
            x = np.zeros((len(rows), genes), "f4")
            for n in np.argsort(rows):
                a, b = pointers[rows[n]], pointers[rows[n] + 1]
                x[n, indices[a:b]] = data[a:b]
            yield torch.from_numpy(express(x))
    return epoch


def anncollection(job):
    import anndata
    from anndata.experimental.pytorch import AnnLoader
    adata = anndata.read_h5ad(job["data"], backed="r")
    import torch
    loader = AnnLoader(adata, batch_size=job["batch"], shuffle=True)
    values = lambda x: x.to_dense() if getattr(x, "is_sparse", False) or getattr(x, "layout", None) == torch.sparse_csr else x
    return lambda epoch: (torch.from_numpy(express(np.asarray(values(batch.X)))) for batch in loader)


def annbatch(job):
    """Its loader refuses matrices of .h5ad files, so it reads a copy in its own format, made once and shuffled."""
    import annbatch as ab
    import zarr
    if importlib.util.find_spec("zarrs"):
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    store = job["data"] + ".annbatch.zarr"
    collection = ab.DatasetCollection(store)
    if collection.is_empty:
        began = time.perf_counter()
        collection.add_adatas([job["data"]])
        print(f"annbatch: {time.perf_counter() - began:.1f} s of conversion", file=sys.stderr)
    loader = ab.Loader(batch_size=job["batch"], chunk_size=job.get("chunk", 32), preload_nchunks=job.get("preload", 128), shuffle=True,
                       preload_to_gpu=False)
    loader.use_collection(collection)
    if job.get("dense"):
        import torch
        return lambda epoch: (torch.from_numpy(express(batch["X"].toarray())) for batch in loader)
    return lambda epoch: (densified(batch["X"]) for batch in loader)


def annbatch_dense(job):
    """As its own examples do: dense first, then the arithmetic on whole matrices."""
    return annbatch({**job, "dense": True})


def scdataset(job):
    import anndata
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader
    cells = anndata.read_h5ad(job["data"], backed="r")
    sets = scDataset(cells, BlockShuffling(block_size=job.get("block", 1)), batch_size=job["batch"], fetch_factor=job.get("fetch", 16),
                     fetch_callback=lambda cells, rows: cells.X[np.sort(rows)], batch_transform=densified)
    loader = DataLoader(sets, batch_size=None)
    return lambda epoch: iter(loader)


PEERS = dict(dense=dense, csr=csr, sorted=sorted_rows, anncollection=anncollection, annbatch=annbatch, annbatch_dense=annbatch_dense, scdataset=scdataset)


def main():
    job = json.loads(sys.argv[1])
    import torch
    torch.set_num_threads(1)
    epoch_of = PEERS[job["peer"]](job)
    epochs = []
    for epoch in range(job["epochs"]):
        cpu, started, cells = cpu_s(), time.perf_counter(), 0
        for x in epoch_of(epoch):
            cells += len(x)
            if job.get("samples") and cells >= job["samples"]:
                break
        seconds, cpu = time.perf_counter() - started, cpu_s() - cpu
        epochs.append({"samples": cells, "seconds": seconds, "samples_per_s": cells / seconds, "samples_per_cpu_s": cells / max(cpu, 1e-9)})
    print(json.dumps({"epochs": epochs}))


if __name__ == "__main__":
    main()
