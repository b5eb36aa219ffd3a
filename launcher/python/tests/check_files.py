"""Windows of HDF5, cells and images: read without Python, equal to what h5py and Pillow read."""

import os
import pickle
import tempfile

import h5py
import numpy as np
from PIL import Image

from helpers import HAS_TORCH, headroom, raises

ROWS = (1000, 1300, 900)


def sessions(folder, **options):
    """Tables of two fields, and datasets of other types beside them."""
    random = np.random.default_rng(0)
    for number, rows in enumerate(ROWS):
        table = np.zeros(rows, dtype=[("time", "f8"), ("emg", "f4", (4,)), ("angle", "f8")])
        table["emg"], table["angle"] = random.normal(size=(rows, 4)), random.normal(size=rows)
        with h5py.File(os.path.join(folder, f"s{number}.hdf5"), "w") as file:
            file.create_dataset("emg2pose/timeseries", data=table, **options)
            file.create_dataset("raw/count", data=np.arange(rows * 3, dtype="i2").reshape(rows, 3), **(
                dict(options, chunks=(64, 3)) if options else {}))
            file.create_dataset("raw/time", data=np.arange(rows) + 0.5)


CHUNKED = dict(chunks=(128,), compression="gzip", shuffle=True)


def expected(folder, window, stride):
    for number, rows in enumerate(ROWS):
        with h5py.File(os.path.join(folder, f"s{number}.hdf5")) as file:
            table = file["emg2pose/timeseries"][:]
        for start in range(0, rows - window + 1, stride):
            yield table["emg"][start: start + window], table["angle"][start: start + window].astype("f4")


def test_windows_equal_those_of_h5py_in_every_layout():
    for options in ({}, CHUNKED):
        with tempfile.TemporaryDirectory() as folder:
            sessions(folder, **options)
            data = headroom.hdf5(folder, columns=("emg", "angle"), window=100, stride=30)
            known = list(expected(folder, 100, 30))
            assert len(data) == len(known)
            for index, (emg, angle) in enumerate(known):
                sample = data[index]
                assert list(sample) == ["emg", "angle"] and sample["emg"].dtype == np.float32
                assert np.array_equal(sample["emg"], emg) and np.array_equal(sample["angle"], angle)
            assert data.describe(31).endswith("s1.hdf5 rows 0..100") and np.array_equal(data[-1]["emg"], known[-1][0])
            raises(IndexError, f"of {len(known)}", lambda: data[len(known)])


def test_a_loader_of_files_has_threads_and_no_workers_and_decodes_chunks_once():
    with tempfile.TemporaryDirectory() as folder:
        sessions(folder, **CHUNKED)
        data = headroom.hdf5(folder, columns=("emg", "angle"), window=100, stride=30)
        known, loader = list(expected(folder, 100, 30)), headroom.DataLoader(data, batch_size=8, shuffle=True, num_workers=2)
        for _ in range(2):
            found = [row for batch in loader for row in np.asarray(batch["emg"])]
            order = sorted(range(len(known)), key=lambda n: known[n][0].tobytes())
            assert [row.tobytes() for row in sorted(found, key=lambda row: row.tobytes())] == [
                known[n][0].tobytes() for n in order]
        assert loader._pool.processes == [None, None]
        _, decoded = data.native().counts()
        last = [(rows - 100) // 30 * 30 + 100 for rows in ROWS]
        assert decoded == sum(-(-rows // 128) for rows in last), decoded
        loader.close()


def test_datasets_beside_each_other_keep_their_types():
    with tempfile.TemporaryDirectory() as folder:
        sessions(folder, **CHUNKED)
        data = headroom.hdf5(os.path.join(folder, "s*.hdf5"), columns=("count", "time"), window=50)
        sample = data[21]
        assert sample["count"].dtype == np.int16 and sample["time"].dtype == np.float64
        assert sample["count"][0].tolist() == [150, 151, 152] and sample["time"][:2].tolist() == [50.5, 51.5]
        alone = headroom.hdf5([os.path.join(folder, "s2.hdf5")], columns="raw/time", window=10)
        assert alone[3].tolist() == [30.5 + n for n in range(10)] and len(alone) == 90


def crop(sample):
    at = np.random.randint(50)
    return sample["emg"][at: at + 10], at


def test_a_transform_runs_in_workers_and_is_the_same_without():
    with tempfile.TemporaryDirectory() as folder:
        sessions(folder, **CHUNKED)

        def batches(workers, context=None):
            data = headroom.hdf5(folder, columns=("emg",), window=100, transform=crop)
            loader = headroom.DataLoader(data, batch_size=8, shuffle=True, seed=5, num_workers=workers,
                                         multiprocessing_context=context)
            made = [[np.asarray(batch[1]).tolist() for batch in loader] for _ in range(2)]
            loader.close()
            return made

        alone = batches(0)
        assert alone == batches(2) == batches(1, "spawn") and alone[0] != alone[1]


def test_whole_windows_can_be_cached_and_pytorch_can_have_them():
    with tempfile.TemporaryDirectory() as folder:
        sessions(folder)
        data = headroom.cached(headroom.hdf5(folder, columns=("emg", "angle"), window=100))
        loader = headroom.DataLoader(data, batch_size=4, num_workers=2)
        for _ in range(3):
            assert sum(len(batch["emg"]) for batch in loader) == 32
        assert loader.decodes == 32
        loader.close()
        again = pickle.loads(pickle.dumps(headroom.hdf5(folder, columns="emg", window=100)))
        assert len(again) == 32 and again[3].shape == (100, 4)
        if HAS_TORCH:
            from torch.utils.data import DataLoader

            of_torch = DataLoader(again, batch_size=8, num_workers=2)
            assert sum(batch.shape[0] for batch in of_torch) == 32


def test_what_is_wrong_with_files_is_said_in_words_of_this_package():
    with tempfile.TemporaryDirectory() as folder:
        sessions(folder)
        wrong = lambda **words: headroom.hdf5(folder, **dict(dict(columns=("emg",), window=10), **words))
        raises(OSError, "no columns nope: it holds /emg2pose/timeseries with fields time, emg, angle; /raw/count",
               lambda: wrong(columns=("nope",)))
        raises(OSError, "no dataset zz", lambda: wrong(dataset="zz"))
        raises(OSError, "more than one place", lambda: wrong(columns="time"))
        assert len(wrong(columns="time", dataset="emg2pose/timeseries")[0]) == 10
        raises(ValueError, "window=0", lambda: wrong(window=0))
        raises(ValueError, "each once", lambda: wrong(columns=("emg", "emg")))
        raises(FileNotFoundError, "no files (.h5", lambda: headroom.hdf5(os.path.join(folder, "*.x"), "emg", 10))
        with open(os.path.join(folder, "s1.hdf5"), "r+b") as file:
            file.truncate(3000)
        raises(OSError, "s1.hdf5: is truncated", wrong)
        os.remove(os.path.join(folder, "s1.hdf5"))
        data = wrong()
        with h5py.File(os.path.join(folder, "s2.hdf5"), "a") as file:
            file.create_dataset("more", data=np.zeros(10000))
        loader = headroom.DataLoader(data, batch_size=50, num_workers=1)
        raises(OSError, "s2.hdf5", lambda: list(loader))
        loader.close()


def test_cells_equal_the_matrix_of_the_file():
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        dense = {}
        for number, cells in enumerate((30, 20)):
            matrix = random.poisson(0.4, (cells, 25)).astype("f4")
            dense[number] = matrix
            path = os.path.join(folder, f"c{number}.h5ad")
            rows, columns = np.nonzero(matrix)
            with h5py.File(path, "w") as file:
                file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
                group = file.create_group("X")
                group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": matrix.shape})
                group["data"], group["indices"] = matrix[rows, columns], columns.astype("i4")
                group["indptr"] = np.concatenate([[0], np.cumsum((matrix != 0).sum(1))]).astype("i4")
                for name, names in (("obs", [f"cell{n}" for n in range(cells)]), ("var", [f"gene{n}" for n in range(25)])):
                    frame = file.create_group(name)
                    frame.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index",
                                        "column-order": np.array([b"kind"] if name == "obs" else [], dtype="S4")})
                    frame.create_dataset("_index", data=np.array(names, dtype=object), dtype=h5py.string_dtype())
                kinds = np.array(["B", "T", "NK"][number:] * cells, dtype=object)[:cells]
                file["obs"].create_dataset("kind", data=kinds, dtype=h5py.string_dtype())
        data = headroom.h5ad(folder, label="kind")
        assert len(data) == 50 and len(data.genes) == 25 and sorted(data.classes) == ["B", "NK", "T"]
        loader = headroom.DataLoader(data, batch_size=10, num_workers=2)
        values = np.concatenate([np.asarray(batch[0]) for batch in loader])
        labels = [data.classes[int(one)] for batch in loader for one in batch[1]]
        assert np.array_equal(values, np.concatenate([dense[0], dense[1]]))
        assert labels == (["B", "T", "NK"] * 10) + (["T", "NK"] * 10)
        loader.close()
        assert headroom.h5ad(folder)[7].shape == (25,)
        raises(OSError, "label=", lambda: headroom.h5ad(folder, label="nothing"))


def test_images_have_the_numbers_of_their_folders():
    random = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(6):
            kind, size = ("cat", "dog")[number % 2], (20 + number, 30)
            os.makedirs(os.path.join(folder, kind), exist_ok=True)
            pixels = random.integers(0, 255, (*size, 3), dtype=np.uint8)
            path = os.path.join(folder, kind, f"{number}.{('png', 'jpg')[number // 3]}")
            Image.fromarray(pixels).save(path, **({"quality": 95, "subsampling": 0} if path.endswith("jpg") else {}))
        data = headroom.images(folder)
        assert data.classes == ["cat", "dog"] and data.labels == [0, 0, 0, 1, 1, 1]
        loader = headroom.DataLoader(data, batch_size=None, num_workers=2)
        for index, (pixels, label) in enumerate(loader):
            path = data.paths[index]
            known = np.asarray(Image.open(path).convert("RGB")).astype(int)
            found = np.asarray(pixels)
            assert found.shape == known.shape and found.dtype == np.uint8 and int(label) == data.labels[index]
            # Decoders of JPEG differ in rounding.
            assert np.abs(found - known).max() <= (0 if path.endswith("png") else 6), np.abs(found - known).max()
        loader.close()
        with open(data.paths[0], "r+b") as file:
            file.truncate(200)
        raises(OSError, os.path.basename(data.paths[0]), lambda: data[0])
        raises(ValueError, "1 labels", lambda: headroom.images(folder, labels=[1]))
