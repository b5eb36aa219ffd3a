"""Samples as bytes: the layout of one entry of the cache, and the plans by which its parts become objects again.

A sample is a leaf or a nest of tuples, lists, dicts and named tuples. Arrays, tensors and numbers are kept as raw bytes, texts
as UTF-8; other leaves are pickled, and unpickled by processes of the same user alone. The layout is src/entry.rs's.
"""

import importlib
import json
import os
import pickle
import struct
import sys
import warnings

import numpy as np

_MAGIC = 0x31455248
_ALIGN = 64
_VARIES = 1 << 63
_HEAD = struct.Struct("<IIIIQ")
_LEAF = struct.Struct("<QQ")
_INT = struct.Struct("<q")
_FLOAT = struct.Struct("<d")
_PADDING = bytes(_ALIGN)
_MOST_PARTS = 512

# Types of torch with a type of numpy of the same bytes; all others go as bytes and are viewed.
_NUMPY_OF_TORCH = {
    "float16": "<f2", "float32": "<f4", "float64": "<f8", "uint8": "|u1", "int8": "|i1", "int16": "<i2",
    "int32": "<i4", "int64": "<i8", "bool": "|b1", "complex64": "<c8", "complex128": "<c16",
}


def loaded_torch():
    """torch where the program has imported it, else None: it is never imported here."""
    return sys.modules.get("torch")


# From objects to bytes


def _array(value, leaves):
    if not value.flags.c_contiguous:
        value = np.ascontiguousarray(value)
    leaves.append((value.reshape(-1).view(np.uint8) if value.size else b"", False))
    return value


def _pickled(value, leaves):
    leaves.append((pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL), True))
    return ["p"]


def _tensor(value, torch, leaves):
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        return _pickled(value, leaves)
    value = value.detach()
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    flat = value.contiguous().reshape(-1)
    leaves.append((flat.view(torch.uint8).numpy() if flat.numel() else b"", False))
    return ["t", str(value.dtype)[len("torch."):], list(value.shape)]


def _is_named_tuple(kind):
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def _importable(kind):
    module = sys.modules.get(kind.__module__)
    found = module
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


def _walk(value, leaves):
    kind = type(value)
    if kind is np.ndarray or kind is np.memmap:
        if value.dtype.hasobject or value.dtype.names:
            return _pickled(value, leaves)
        _array(np.asarray(value), leaves)
        return ["a", value.dtype.str, list(value.shape)]
    torch = loaded_torch()
    if torch is not None and kind is torch.Tensor:
        return _tensor(value, torch, leaves)
    if kind is int:
        if not -(1 << 63) <= value < 1 << 63:
            return _pickled(value, leaves)
        leaves.append((_INT.pack(value), False))
        return ["i"]
    if kind is float:
        leaves.append((_FLOAT.pack(value), False))
        return ["f"]
    if kind is bool:
        leaves.append((b"\1" if value else b"\0", False))
        return ["b"]
    if kind is str:
        leaves.append((value.encode("utf-8", "surrogatepass"), True))
        return ["s"]
    if kind is bytes:
        leaves.append((value, True))
        return ["y"]
    if value is None:
        return ["0"]
    if kind is tuple:
        return ["T", [_walk(part, leaves) for part in value]]
    if kind is list:
        return ["L", [_walk(part, leaves) for part in value]]
    if kind is dict and all(type(key) in (str, int) for key in value):
        return ["D", list(value), [_walk(part, leaves) for part in value.values()]]
    if _is_named_tuple(kind) and _importable(kind):
        return ["N", kind.__module__, kind.__qualname__, [_walk(part, leaves) for part in value]]
    if isinstance(value, np.generic) and not value.dtype.hasobject and not value.dtype.names:
        leaves.append((value.tobytes(), False))
        return ["n", value.dtype.str]
    return _pickled(value, leaves)


def encode(value, tag):
    """The parts of an entry in order, and its number of bytes."""
    leaves = []
    spec = json.dumps(_walk(value, leaves), separators=(",", ":")).encode()
    at = _HEAD.size + _LEAF.size * len(leaves) + len(spec)
    head = [_HEAD.pack(_MAGIC, len(spec), len(leaves), 0, tag)]
    parts, end = [], at
    for data, varies in leaves:
        size = len(data)
        start = -(-end // _ALIGN) * _ALIGN
        if start > end:
            parts.append(_PADDING[: start - end])
        head.append(_LEAF.pack(start, size | _VARIES if varies else size))
        if size:
            parts.append(data)
        end = start + size
    return [b"".join(head) + spec] + parts, end


def write(descriptor, parts, offset):
    """Writes parts one behind the other."""
    for first in range(0, len(parts), _MOST_PARTS):
        some = parts[first: first + _MOST_PARTS]
        total = sum(len(part) for part in some)
        done = os.pwritev(descriptor, some, offset)
        while done < total:
            rest = memoryview(b"".join(bytes(part) for part in some))[done:]
            done += os.pwrite(descriptor, rest, offset + done)
        offset += total


# From bytes to objects


class Bytes:
    """An entry in memory of this process, with the interface of `_native.Sample`; its arrays can be written."""

    def __init__(self, data):
        magic, length, count, _, self.tag = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("this is no sample of this version of headroom_train")
        at = _HEAD.size + _LEAF.size * count
        self._data = data
        self._leaves = [_LEAF.unpack_from(data, _HEAD.size + _LEAF.size * leaf) for leaf in range(count)]
        self.spec = bytes(data[at: at + length])

    def view(self, leaf, typestr, shape):
        offset, size = self._leaves[leaf]
        dtype = np.dtype(typestr)
        count = (size & ~_VARIES) // dtype.itemsize if dtype.itemsize else 0
        return np.frombuffer(self._data, dtype, count, offset).reshape(shape)

    def leaf(self, leaf):
        offset, size = self._leaves[leaf]
        return bytes(self._data[offset: offset + (size & ~_VARIES)])


def joined(parts, total):
    """Parts as one array of bytes."""
    data, at = bytearray(total), 0
    for part in parts:
        data[at: at + len(part)] = memoryview(part)
        at += len(part)
    return data


def _is_quiet():
    # A tensor over the cache's memory is only read; torch warns because it cannot see to that.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def _class_of(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def tensor_of(torch, array, dtype, shape):
    """A tensor over the bytes of an array."""
    made = torch.from_numpy(array)
    if dtype not in _NUMPY_OF_TORCH:
        made = made.view(getattr(torch, dtype)).reshape(shape)
    return made


def _tensor_plan(leaf, dtype, shape):
    torch = loaded_torch()
    if torch is None:
        import torch
    _is_quiet()
    shape = tuple(shape)
    if 0 in shape:
        return lambda source: torch.empty(shape, dtype=getattr(torch, dtype))
    if dtype in _NUMPY_OF_TORCH:
        typestr = _NUMPY_OF_TORCH[dtype]
        return lambda source: torch.from_numpy(np.asarray(source.view(leaf, typestr, shape)))
    size = getattr(torch, dtype).itemsize if hasattr(getattr(torch, dtype), "itemsize") else 2
    total = (int(np.prod(shape)) * size,)
    return lambda source: tensor_of(torch, np.asarray(source.view(leaf, "|u1", total)), dtype, shape)


class _Plan:
    """Builds the function that makes a sample of an entry; leaves are counted as they are met."""

    def __init__(self):
        self.leaf = -1

    def next(self):
        self.leaf += 1
        return self.leaf

    def of(self, node):
        return getattr(self, "_" + {"0": "none"}.get(node[0], node[0]))(*node[1:])

    def _a(self, typestr, shape):
        leaf, shape = self.next(), tuple(shape)
        return lambda source: np.asarray(source.view(leaf, typestr, shape))

    def _t(self, dtype, shape):
        return _tensor_plan(self.next(), dtype, shape)

    def _n(self, typestr):
        leaf = self.next()
        return lambda source: np.asarray(source.view(leaf, typestr, (1,)))[0]

    def _i(self):
        leaf = self.next()
        return lambda source: _INT.unpack(source.leaf(leaf))[0]

    def _f(self):
        leaf = self.next()
        return lambda source: _FLOAT.unpack(source.leaf(leaf))[0]

    def _b(self):
        leaf = self.next()
        return lambda source: source.leaf(leaf) == b"\1"

    def _s(self):
        leaf = self.next()
        return lambda source: source.leaf(leaf).decode("utf-8", "surrogatepass")

    def _y(self):
        leaf = self.next()
        return lambda source: source.leaf(leaf)

    def _p(self):
        leaf = self.next()
        return lambda source: pickle.loads(source.leaf(leaf))

    def _none(self):
        return lambda source: None

    def _T(self, parts):
        plans = [self.of(part) for part in parts]
        return lambda source: tuple([plan(source) for plan in plans])

    def _L(self, parts):
        plans = [self.of(part) for part in parts]
        return lambda source: [plan(source) for plan in plans]

    def _D(self, keys, parts):
        plans = [self.of(part) for part in parts]
        return lambda source: {key: plan(source) for key, plan in zip(keys, plans)}

    def _N(self, module, name, parts):
        kind, plans = _class_of(module, name), [self.of(part) for part in parts]
        return lambda source: kind(*[plan(source) for plan in plans])


_plans = {}


def decode(source):
    """The object whose entry `source` is."""
    spec = source.spec
    plan = _plans.get(spec)
    if plan is None:
        plan = _plans[spec] = _Plan().of(json.loads(spec))
    return plan(source)


def copied(value):
    """The same object with writable arrays and tensors of its own."""
    kind = type(value)
    if kind is np.ndarray:
        return value.copy()
    torch = loaded_torch()
    if torch is not None and kind is torch.Tensor:
        return value.clone()
    if kind in (tuple, list):
        return kind([copied(part) for part in value])
    if kind is dict:
        return {key: copied(part) for key, part in value.items()}
    if _is_named_tuple(kind):
        return kind(*[copied(part) for part in value])
    return value
