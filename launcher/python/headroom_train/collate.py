"""Batches of samples, equal to those of `torch.utils.data.default_collate`: stacked bytes become tensors without a copy.

Where the program has not imported torch, arrays take the place of tensors, and everything else is the same.
"""

import json

import numpy as np

from .codec import _NUMPY_OF_TORCH, _class_of, decode, loaded_torch, tensor_of


class _Odd(Exception):
    """Samples that have to be collated one by one."""


class _Batched:
    """Builds the function that makes a batch of stacked samples."""

    def __init__(self, torch):
        self.leaf = -1
        self.torch = torch

    def next(self):
        self.leaf += 1
        return self.leaf

    def of(self, node, in_sequence=False):
        kind = node[0]
        if kind in ("s", "y"):
            return self._texts(kind, in_sequence)
        if kind in ("p", "0"):
            raise _Odd
        return getattr(self, "_" + kind)(*node[1:])

    def _texts(self, kind, in_sequence):
        leaf, form = self.next(), tuple if in_sequence else list
        if kind == "y":
            return lambda batch, count: form(batch.texts(leaf))
        return lambda batch, count: form(text.decode("utf-8", "surrogatepass") for text in batch.texts(leaf))

    def _column(self, typestr, shape):
        leaf, shape, torch = self.next(), tuple(shape), self.torch
        if 0 in shape:
            raise _Odd
        if torch is None:
            return lambda batch, count: np.asarray(batch.view(leaf, typestr, (count,) + shape))
        if np.dtype(typestr).kind not in "fiubc":
            raise _Odd
        return lambda batch, count: torch.from_numpy(np.asarray(batch.view(leaf, typestr, (count,) + shape)))

    def _a(self, typestr, shape):
        return self._column(typestr, shape)

    def _n(self, typestr):
        return self._column(typestr, ())

    def _i(self):
        return self._column("<i8", ())

    def _f(self):
        return self._column("<f8", ())

    def _b(self):
        return self._column("|b1", ())

    def _t(self, dtype, shape):
        torch = self.torch
        if dtype in _NUMPY_OF_TORCH:
            return self._column(_NUMPY_OF_TORCH[dtype], shape)
        if torch is None or 0 in shape:
            raise _Odd
        leaf, shape = self.next(), tuple(shape)
        size = torch.empty(0, dtype=getattr(torch, dtype)).element_size() * int(np.prod(shape))

        def column(batch, count):
            raw = np.asarray(batch.view(leaf, "|u1", (count * size,)))
            return tensor_of(torch, raw, dtype, (count,) + shape)

        return column

    def _T(self, parts):
        plans = [self.of(part, True) for part in parts]
        return lambda batch, count: [plan(batch, count) for plan in plans]

    _L = _T

    def _D(self, keys, parts):
        plans = [self.of(part) for part in parts]
        return lambda batch, count: {key: plan(batch, count) for key, plan in zip(keys, plans)}

    def _N(self, module, name, parts):
        kind, plans = _class_of(module, name), [self.of(part, True) for part in parts]
        return lambda batch, count: kind(*[plan(batch, count) for plan in plans])


_plans = {}


def _plan(spec, torch):
    key = (spec, torch is not None)
    if key not in _plans:
        try:
            _plans[key] = _Batched(torch).of(json.loads(spec))
        except _Odd:
            _plans[key] = None
    return _plans[key]


def batch(made, collate_fn=None):
    """The batch whose bytes `made` is."""
    if made.built:
        return decode(made.samples()[0])
    if collate_fn is not None:
        return collate_fn([decode(sample) for sample in made.samples()])
    spec = made.spec
    if spec is None:
        return default_collate([decode(sample) for sample in made.samples()])
    plan = _plan(spec, loaded_torch())
    if plan is not None:
        return plan(made, len(made))
    return default_collate([decode(_Row(made, row)) for row in range(len(made))])


class _Row:
    """One sample of a stacked batch."""

    def __init__(self, made, row):
        self._made, self._row, self.spec = made, row, made.spec

    def view(self, leaf, typestr, shape):
        return self._made.row_view(leaf, self._row, typestr, shape)

    def leaf(self, leaf):
        return self._made.row_leaf(leaf, self._row)


def default_collate(samples):
    """`torch.utils.data.default_collate` where torch is imported; the same of arrays where it is not."""
    if loaded_torch() is not None:
        from torch.utils.data import default_collate as of_torch
        return of_torch(samples)
    return _of_arrays(samples)


def _of_arrays(samples):
    first = samples[0]
    if isinstance(first, np.ndarray):
        return np.stack(samples)
    if isinstance(first, (bool, np.bool_)):
        return np.array(samples, dtype=bool)
    if isinstance(first, np.generic):
        return np.array(samples)
    if isinstance(first, float):
        return np.array(samples, dtype=np.float64)
    if isinstance(first, int):
        return np.array(samples, dtype=np.int64)
    if isinstance(first, (str, bytes)):
        return samples
    if isinstance(first, dict):
        return {key: _of_arrays([sample[key] for sample in samples]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_of_arrays(list(part) if _is_column(part) else part) for part in zip(*samples)))
    if isinstance(first, (tuple, list)):
        lengths = {len(sample) for sample in samples}
        if len(lengths) > 1:
            raise RuntimeError("each element in list of batch should be of equal size")
        return [_of_arrays(list(part) if _is_column(part) else part) for part in zip(*samples)]
    raise TypeError(
        f"batches are made of arrays, numbers, texts, dicts and lists, found {type(first)}: give collate_fn="
    )


def _is_column(part):
    return not isinstance(part[0], (str, bytes))
