"""Data sets of files that are read without Python: windows of HDF5, cells of AnnData, images.

The loader's threads read and decode them, so no worker processes are needed, and the interpreter's lock is not held meanwhile.
"""

import glob as _glob
import json
import os

import numpy as np

from . import _native, codec, node
from .dataset import _INDEX_BITS, tag_of
from .worker import Recipe, seed_of, seeded

# Decoded chunks that each process keeps besides the node's cache.
_KEPT_BYTES = 64 << 20
_HDF5 = ("h5", "hdf5", "hdf", "he5")
_IMAGES = ("jpg", "jpeg", "png")


def _paths(path, extensions):
    """Files of a folder (recursively), a pattern, a file, or a list of these; sorted where they were searched for."""
    if isinstance(path, (list, tuple)):
        found = [one for part in path for one in _paths(part, extensions)]
    else:
        path = os.fspath(path)
        if not os.path.exists(path) and _glob.has_magic(path):
            found = sorted(_glob.glob(path, recursive=True))
        else:
            found, lines = _native.find_files(path, list(extensions))
            for line in lines:
                node.say(f"left out: {line}")
    if not found:
        raise FileNotFoundError(f"{path}: no files ({', '.join('.' + extension for extension in extensions)})")
    return [os.path.abspath(one) for one in found]


def _stamps(paths):
    facts = [os.stat(path) for path in paths]
    return [(path, fact.st_size, fact.st_mtime_ns) for path, fact in zip(paths, facts)]


class Files:
    """A data set whose samples are made without Python: see :func:`hdf5`, :func:`h5ad` and :func:`images`.

    It has `len()` and `[i]` like any data set. :class:`headroom_train.DataLoader` reads it in `num_workers` threads; a `transform`
    runs in as many worker processes, and at every use. `headroom_train.cached(...)` keeps whole samples in the node's cache.
    """

    def __init__(self, text, transform, seed):
        self.text, self.transform, self.seed = text, transform, int(seed)
        self.tag = tag_of(text)
        self.base, self.epoch, self.decodes = 0, 0, 0
        self._opened = None
        self.length = len(self.native())

    # `cached()` tells data sets apart by this.
    def headroom_text(self):
        return self.text

    def open(self):
        raise NotImplementedError

    def native(self):
        """The open files, of this process."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self.open())
        return self._opened[1]

    def __getstate__(self):
        return {**vars(self), "_opened": None}

    def __len__(self):
        return self.length

    def index(self, index):
        index = int(index)
        index = index + self.length if index < 0 else index
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        return index

    def __getitem__(self, index):
        index = self.index(index)
        sample = codec.decode(codec.Bytes(self.native().sample(index)))
        if self.transform is None:
            return sample
        with seeded(seed_of(self.seed + 1, self.epoch, index)):
            return self.transform(sample)

    def set_epoch(self, epoch):
        """The epoch that seeds the transform where samples are asked for by index."""
        self.epoch = int(epoch)

    def describe(self, index):
        """File and rows of a sample."""
        return self.native().describe(self.index(index))

    @property
    def dataset(self):
        return self

    def recipe(self, collate_fn):
        return Recipe(self, self.transform, collate_fn, self.seed, self.tag, False)

    def _set_template(self, native, sample):
        native.set_template(bytes(codec.joined(*codec.encode(sample, self.tag))))
        return native


class _Windows(Files):
    def __init__(self, paths, columns, dataset, window, stride, transform, seed):
        self.alone = isinstance(columns, str)
        self.columns = (columns,) if self.alone else tuple(columns)
        self.paths, self.table, self.window, self.stride = paths, dataset, window, stride
        files = f"{_stamps(paths)} {self.columns} {dataset}"
        self.key = tag_of(f"entries {files}") >> _INDEX_BITS << _INDEX_BITS
        super().__init__(f"windows {files} {window} {stride} {self.alone}", transform, seed)

    def open(self):
        native = _native.Files.windows(
            self.paths, list(self.columns), self.table, self.window, self.stride, _KEPT_BYTES, node.node(), self.key
        )
        fields = native.facts()["fields"]
        arrays = [np.zeros((self.window, *shape), typestr) for _, typestr, shape in fields]
        return self._set_template(native, arrays[0] if self.alone else dict(zip(self.columns, arrays)))


def hdf5(path, columns, window, stride=None, *, dataset=None, transform=None, seed=0):
    """Windows of `window` rows, every `stride` rows (default: `window`), of the HDF5 files at `path`.

    `path`: a file, a folder (with all below it), a pattern such as `"sessions/*.hdf5"`, or a list of these. `columns`: names of
    fields of a table, or of datasets beside each other, by name or path; `dataset=` names the table where there is more than one. A
    sample is a dict of arrays `[window, ...]`; of one column given as a text, the array alone. Fields of a table are float32,
    datasets are what the file holds.

    Chunks are decoded once per node while the node's cache has room for them.

    >>> data = headroom.hdf5("sessions/", columns=("emg", "joint_angles"), window=500, stride=50)
    """
    stride = window if stride is None else stride
    for name, value in (("window", window), ("stride", stride)):
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of rows, 1 or more")
    names = (columns,) if isinstance(columns, str) else tuple(columns)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"columns={columns!r}: expected names, each once")
    return _Windows(_paths(path, _HDF5), columns, dataset, int(window), int(stride), transform, seed)


class _Cells(Files):
    def __init__(self, paths, matrix, label, transform, seed):
        self.paths, self.matrix, self.label = paths, matrix, label
        super().__init__(f"cells {_stamps(paths)} {matrix} {label}", transform, seed)

    def open(self):
        native = _native.Files.cells(self.paths, self.matrix, self.label, _KEPT_BYTES)
        facts = native.facts()
        self.genes, self.classes = facts["genes"], facts["classes"]
        row = np.zeros(len(self.genes), np.float32)
        return self._set_template(native, row if self.label is None else (row, 0))


def h5ad(path, label=None, *, matrix="X", transform=None, seed=0):
    """Cells of the AnnData files (`.h5ad`, and 10x Genomics' `.h5`) at `path`, all with the same genes.

    A sample is the cell's values of all genes as float32, and with `label=` (a column of `obs`) its class as a number, -1 where it
    has none. `data.genes` and `data.classes` are their names. `matrix`: `X`, `layers/NAME` or `raw/X`, stored by cells.
    """
    return _Cells(_paths(path, ("h5ad", "h5")), str(matrix), label, transform, seed)


class _Images(Files):
    def __init__(self, paths, labels, classes, transform, seed):
        self.paths, self.labels, self.classes = paths, labels, classes
        super().__init__(f"images {_stamps(paths)} {labels}", transform, seed)

    def open(self):
        mark = 987654321
        spec = json.dumps(["T", [["a", "|u1", [mark, mark, 3]], ["i"]]], separators=(",", ":"))
        return _native.Files.images(self.paths, self.labels, spec.split(str(mark)), self.tag)


def images(path, labels=None, *, transform=None, seed=0):
    """JPEG and PNG files at `path` as pairs of an array `[H, W, 3]` of bytes and a number.

    Without `labels` the number is that of the file's folder below `path`, in the order of their names, as in torchvision's
    `ImageFolder`; `data.classes` names them. `labels`: a number for each file of a list.
    """
    paths = _paths(path, _IMAGES)
    if labels is not None:
        labels = [int(label) for label in labels]
        if len(labels) != len(paths):
            raise ValueError(f"{len(paths)} images have {len(labels)} labels: give one for each")
        return _Images(paths, labels, None, transform, seed)
    root = os.path.abspath(os.fspath(path)) if isinstance(path, (str, os.PathLike)) else os.path.commonpath(paths)
    folders = [os.path.relpath(one, root).split(os.sep)[0] if os.path.dirname(one) != root else "" for one in paths]
    classes = sorted(set(folders))
    places = {name: number for number, name in enumerate(classes)}
    return _Images(paths, [places[folder] for folder in folders], classes, transform, seed)
