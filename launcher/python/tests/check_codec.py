"""Samples of every kind through the cache, and batches equal to PyTorch's."""

import collections
import pathlib

import numpy as np

from headroom_train import codec, collate
from helpers import HAS_TORCH, headroom, raises

Point = collections.namedtuple("Point", "x y")
DTYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]


def through(value):
    """As a worker writes it and a rank reads it."""
    return codec.decode(codec.Bytes(codec.joined(*codec.encode(value, 7))))


def same(one, other):
    assert type(one) is type(other), (one, other)
    if isinstance(one, np.ndarray) and one.dtype.hasobject:
        assert one.tolist() == other.tolist()
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes(), (one, other)
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(other)
        [same(a, b) for a, b in zip(one, other)]
    elif isinstance(one, dict):
        assert list(one) == list(other)
        [same(one[key], other[key]) for key in one]
    elif HAS_TORCH and type(one).__module__ == "torch":
        import torch

        assert one.dtype == other.dtype and one.shape == other.shape, (one, other)
        assert torch.equal(one.reshape(-1).contiguous().view(torch.uint8), other.reshape(-1).contiguous().view(torch.uint8))
    else:
        assert one == other or one != one, (one, other)


def samples():
    random = np.random.default_rng(3)
    for dtype in DTYPES:
        yield (random.random((3, 4, 5)) * 100).astype(dtype)
    yield np.array(3.5)
    yield np.zeros((0, 3), np.float32)
    yield np.arange(24).reshape(4, 6)[::2, ::3]
    yield np.asfortranarray(np.arange(12.0).reshape(3, 4))
    yield np.array(["a", "bc"])
    yield np.array([1, "x", None], dtype=object)
    yield np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
    yield np.array(["2024-01-01"], dtype="M8[D]")
    yield np.arange(3, dtype=">i4")
    yield from (1, -1, 1 << 62, 1 << 80, True, False, 2.5, float("inf"), float("nan"), "", "text ü \ud800", b"", b"\0bytes", None)
    yield from (np.float32(1.5), np.int16(-3), np.bool_(True))
    yield {"image": np.ones((2, 2), np.uint8), "label": 3, 5: "five", "meta": {"id": "x", "box": [1.0, 2.0]}}
    yield (np.ones(2), [1, (2, "three")], Point(1, np.zeros(1)), {})
    yield {("tuple", "key"): 1}
    yield pathlib.Path("/tmp/x")
    yield collections.OrderedDict(a=1)
    yield {1, 2}


def test_every_kind_of_sample_comes_back_as_it_was():
    for sample in samples():
        same(through(sample), sample)


def test_the_cache_gives_what_was_put_into_it():
    cache = headroom.Cache("kinds")
    for number, sample in enumerate(samples()):
        assert cache.put(number, sample)
        same(cache.get(number), sample)
        same(cache.get(number, copy=True), sample)


def test_views_are_read_only_and_copies_are_not():
    cache = headroom.Cache()
    cache.put("a", {"x": np.arange(1000.0)})
    view, copy = cache.get("a")["x"], cache.get("a", copy=True)["x"]
    raises(ValueError, "read-only", lambda: view.fill(0))
    copy.fill(0)
    assert cache.get("a")["x"].sum() == 499500 and view.sum() == 499500
    assert view.ctypes.data == cache.get("a")["x"].ctypes.data, "no copy was made"


def test_without_torch_batches_are_arrays_of_the_same_structure():
    made = collate._of_arrays([(np.ones(2, np.float32), 1, 2.5, True, "a", {"k": np.int16(3)}, Point(1, 2))] * 3)
    assert isinstance(made, list) and made[0].shape == (3, 2) and made[0].dtype == np.float32
    assert made[1].dtype == np.int64 and made[2].dtype == np.float64 and made[3].dtype == bool
    assert made[4] == ("a", "a", "a") and made[5]["k"].dtype == np.int16 and type(made[6]) is Point


class Given:
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def batches_of(samples, workers, name):
    data = headroom.cached(Given(samples), name=f"{name} {workers}")
    loader = headroom.DataLoader(data, batch_size=len(samples), num_workers=workers)
    made = [list(loader)[0] for _ in range(2)]
    loader.close()
    return made


def test_batches_equal_those_of_pytorch():
    if not HAS_TORCH:
        return
    import torch
    from torch.utils.data import default_collate

    random = np.random.default_rng(5)
    kinds = [[(random.random((3, 2)) * 9).astype(dtype) for _ in range(4)] for dtype in DTYPES if dtype not in ("u2", "u4", "u8")]
    of_torch = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
                torch.float32, torch.float64, torch.complex64]
    kinds += [[(torch.rand(2, 5) * 9).to(dtype) for _ in range(4)] for dtype in of_torch]
    kinds += [[torch.rand(()) for _ in range(3)], [torch.rand(4, 6)[::2, ::3] for _ in range(3)], [torch.empty(0, 3)] * 2]
    kinds += [[1, 2, 3], [1.5, 2.5], [True, False], ["a", "bcd"], [b"a", b"b"], [np.float32(1), np.float32(2)],
              [np.int64(3), np.int64(4)], [np.bool_(True), np.bool_(False)]]
    kinds.append([(torch.ones(2), i, f"name {i}", {"a": np.ones(3) * i, "b": [i, str(i)]}, Point(i, 0.5)) for i in range(5)])
    kinds.append([{"ids": torch.arange(4), "mask": torch.ones(4, dtype=torch.bool), "text": "x" * i} for i in range(4)])
    for number, samples in enumerate(kinds):
        expected = default_collate(samples)
        for workers in (0, 1):
            for made in batches_of(samples, workers, f"kind {number}"):
                same(made, expected)


def test_what_pytorch_refuses_is_refused_in_its_words():
    if not HAS_TORCH:
        return
    import torch
    from torch.utils.data import default_collate

    for number, samples in enumerate([[None, None], [np.array(["a"]), np.array(["b"])], [torch.ones(2), torch.ones(3)],
                                      [(1, 2), (1, 2, 3)], [{1}, {2}]]):
        error = None
        try:
            default_collate(samples)
        except Exception as wrong:
            error = wrong
        for workers in (0, 1):
            raises(type(error), str(error)[:30], lambda: batches_of(samples, workers, f"odd {number}"))


def test_batches_can_be_written_and_keep_their_memory_alive():
    data = headroom.cached([np.full(50000, i, np.float32) for i in range(12)], name="kept")
    loader = headroom.DataLoader(data, batch_size=2, num_workers=1)
    for _ in range(3):
        kept = list(loader)
        for number, batch in enumerate(kept):
            array = np.asarray(batch)
            assert (array[0] == 2 * number).all() and (array[1] == 2 * number + 1).all()
            array += 1
    loader.close()
