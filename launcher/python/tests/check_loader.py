"""Order, resume, samplers, workers: what a user of PyTorch's DataLoader relies on."""

import contextlib
import io
import os
import pickle
import random
import resource
import tempfile

import numpy as np

from helpers import HAS_TORCH, Lengths, Numbers, headroom, ids_of, listed, raises

WORLDS = (1, 2, 3)


def loader(data, **more):
    size = {} if "global_batch_size" in more else {"batch_size": 4}
    return headroom.DataLoader(data, **{**size, "shuffle": True, "seed": 9, **more})


def union(batches_of_ranks):
    """Samples of each step over all ranks, in the order of the global batch."""
    steps = []
    for parts in zip(*batches_of_ranks):
        whole = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank::len(parts)] = part
        steps.append(whole)
    return steps


def test_every_sample_comes_once_and_epochs_differ():
    data = Numbers(50)
    for workers in (0, 2):
        it = loader(headroom.cached(data, name=f"once {workers}"), num_workers=workers)
        first, second = ids_of(it), ids_of(it)
        assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(50)) and first != second
        assert len(it) == 13 and [len(batch) for batch in first] == [4] * 12 + [2]
        it.close()


def test_order_is_the_same_for_any_number_of_workers_and_ranks():
    data = headroom.cached(Numbers(60), name="order")
    expected = ids_of(loader(data, batch_size=12))
    for workers in (1, 3):
        it = loader(data, batch_size=12, num_workers=workers)
        assert ids_of(it) == expected
        it.close()
    for world in WORLDS:
        of_ranks = [ids_of(loader(data, batch_size=12 // world, rank=rank, world_size=world)) for rank in range(world)]
        assert union(of_ranks) == expected, world
        of_ranks = [ids_of(loader(data, global_batch_size=12, rank=rank, world_size=world)) for rank in range(world)]
        assert union(of_ranks) == expected, world


def test_a_state_continues_exactly_on_any_number_of_ranks():
    data = headroom.cached(Numbers(70), name="resume")
    whole = sum(ids_of(loader(data, batch_size=6)), [])
    for world in WORLDS:
        first = [loader(data, global_batch_size=6, rank=rank, world_size=world, num_workers=1) for rank in range(world)]
        iterators = [iter(it) for it in first]
        for _ in range(4):
            [next(it) for it in iterators]
        states = [it.state_dict() for it in first]
        assert all(state == states[0] for state in states)
        assert states[0]["position"] == 24 and len(pickle.dumps(states[0])) < 200
        for it in first:
            it.close()
        for other in WORLDS:
            rest = [loader(data, global_batch_size=6, rank=rank, world_size=other, pad=False) for rank in range(other)]
            for it in rest:
                it.load_state_dict(states[0])
            again = [ids_of(it) for it in rest]
            assert sum(union(again), []) == whole[24:] if other == 1 else sorted(sum(sum(again, []), [])) == sorted(whole[24:])
            # The next epoch is whole.
            assert sorted(sum(sum(map(ids_of, rest), []), [])) == list(range(70))


def test_a_state_at_the_end_begins_the_next_epoch_and_wrong_ones_are_refused():
    data = headroom.cached(Numbers(20), name="end")
    it = loader(data)
    list(it)
    state, second = it.state_dict(), ids_of(it)
    again = loader(data)
    again.load_state_dict(state)
    assert again.epoch == 1 and ids_of(again) == second
    raises(ValueError, "seed=9", lambda: loader(data, seed=8).load_state_dict(state))
    raises(ValueError, "samples=20", lambda: loader(headroom.cached(Numbers(21))).load_state_dict(state))
    raises(ValueError, "no state", lambda: loader(data).load_state_dict({"epoch": 1}))
    raises(ValueError, "stands at", lambda: loader(data).load_state_dict({**state, "position": 21}))


def test_abandoned_loops_and_two_loaders_at_once():
    data = headroom.cached(Numbers(40), name="abandon")
    it = loader(data, num_workers=2)
    reference = loader(data)
    epochs = [ids_of(reference) for _ in range(4)]
    for number, batch in enumerate(it):
        if number == 2:
            break
    assert ids_of(it) == epochs[1]
    stale = iter(it)
    next(stale)
    fresh = iter(it)
    raises(RuntimeError, "another loop", lambda: next(stale))
    assert ids_of(fresh) == epochs[3]
    other = loader(data, num_workers=1)
    pairs = list(zip(it, other))
    assert len(pairs) == 10
    for _ in range(3):
        made = loader(data, num_workers=1)
        next(iter(made))
        del made
    it.set_epoch(1)
    assert ids_of(it) == epochs[1]
    it.close()
    assert ids_of(it) == epochs[2], "workers start again"
    it.close()
    other.close()


def test_drop_last_and_short_last_steps():
    data = headroom.cached(Numbers(22), name="last")
    assert [len(batch) for batch in ids_of(loader(data, drop_last=True))] == [4] * 5
    for world in (2, 3):
        padded = [ids_of(loader(data, batch_size=4, rank=rank, world_size=world)) for rank in range(world)]
        assert len({tuple(map(len, batches)) for batches in padded}) == 1, "every rank has as many"
        assert set(sum(sum(padded, []), [])) == set(range(22))
        short = [ids_of(loader(data, batch_size=4, rank=rank, world_size=world, pad=False)) for rank in range(world)]
        assert sorted(sum(sum(short, []), [])) == list(range(22))
        it = loader(data, batch_size=4, rank=0, world_size=world)
        assert len(it) == len(list(it))


def test_samplers_of_ones_own():
    data = headroom.cached(Numbers(30), name="own")
    for workers in (0, 2):
        it = loader(data, shuffle=False, sampler=list(range(29, -1, -2)), num_workers=workers)
        assert ids_of(it) == [[29, 27, 25, 23], [21, 19, 17, 15], [13, 11, 9, 7], [5, 3, 1]] and len(it) == 4
        running = iter(it)
        next(running), next(running)
        state = it.state_dict()
        again = loader(data, shuffle=False, sampler=list(range(29, -1, -2)), num_workers=workers)
        again.load_state_dict(state)
        assert ids_of(again) == [[13, 11, 9, 7], [5, 3, 1]]
        batches = [[0, 0, 1], [2], [-1, 5]]
        own = headroom.DataLoader(data, batch_sampler=batches, num_workers=workers)
        assert ids_of(own) == [[0, 0, 1], [2], [29, 5]] and len(own) == 3
        raises(IndexError, "sample 30 of 30", lambda: list(loader(data, shuffle=False, sampler=[30], num_workers=workers)))
        for made in (it, again, own):
            made.close()
    raises(ValueError, "sampler excludes", lambda: loader(data, sampler=[1]))
    raises(ValueError, "batch_sampler excludes", lambda: headroom.DataLoader(data, 3, batch_sampler=batches))


def draw(sample):
    array, number, text = sample
    return array + np.float32(random.random()) + np.float32(np.random.rand()), number, text


def add_numbers(samples):
    return sum(int(number) for _, number, _ in samples), [text for _, _, text in samples]


def test_transforms_are_functions_of_epoch_and_sample():
    results = []
    for workers in (0, 1, 3):
        data = headroom.cached(Numbers(24), transform=draw, name="transform", seed=4)
        it = loader(data, num_workers=workers)
        epochs = [sorted((int(n), float(row[0])) for x, y, _ in it for n, row in zip(y, np.asarray(x))) for _ in range(2)]
        assert epochs[0] != epochs[1]
        results.append(epochs)
        it.close()
    assert results[0] == results[1] == results[2]
    before = random.getstate(), np.random.get_state()[1].tolist()
    list(loader(data, num_workers=0))
    assert before == (random.getstate(), np.random.get_state()[1].tolist()), "the program's generators are its own"


def test_collate_fn_and_samples_of_varying_length():
    for workers in (0, 2):
        data = headroom.cached(Numbers(10), name=f"sum {workers}")
        it = headroom.DataLoader(data, batch_size=4, collate_fn=add_numbers, num_workers=workers)
        assert [total for total, _ in it] == [6, 22, 17] and [text for _, text in it][2] == ["sample 8", "sample 9"]
        it.close()
        lengths = headroom.cached(Lengths(200), name=f"lengths {workers}")
        it = headroom.DataLoader(lengths, batch_size=7, shuffle=True, collate_fn=list, num_workers=workers)
        for _ in range(2):
            seen = []
            for batch in it:
                for row in map(np.asarray, batch):
                    index = int(row[0]) if len(row) else None
                    assert (row == index).all() and (index is None or len(row) == index % 50 * 100)
                    seen.append(index)
            assert len(seen) == 200 and len(set(seen) - {None}) == 196
        assert it.decodes == 200
        it.close()


def test_single_samples_and_plain_data_sets():
    for workers in (0, 1):
        it = headroom.DataLoader(headroom.cached(Numbers(5), name=f"single {workers}"), batch_size=None, num_workers=workers)
        assert [int(number) for _, number, _ in it] == [0, 1, 2, 3, 4]
        it.close()
        plain = loader(Numbers(20), num_workers=workers)
        first, second = ids_of(plain), ids_of(plain)
        assert sorted(sum(first, [])) == sorted(sum(second, [])) and plain.decodes == 40
        plain.close()
    raises(TypeError, "has no len()", lambda: headroom.DataLoader(type("D", (), {"__getitem__": None})()))
    raises(TypeError, "has no [i]", lambda: headroom.cached(iter([1])))


class Drawn:
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index, random.random()


def test_what_a_data_set_draws_does_not_depend_on_workers():
    made = []
    for workers in (0, 1, 2):
        it = headroom.DataLoader(Drawn(), batch_size=3, num_workers=workers, seed=1)
        made.append([[float(value) for _, values in it for value in values] for _ in range(2)])
        it.close()
    assert made[0] == made[1] == made[2] and made[0][0] != made[0][1]


def test_each_way_to_start_workers():
    for method in ("spawn", "forkserver", "fork"):
        data = headroom.cached(Numbers(16), transform=draw, name=method)
        it = loader(data, num_workers=2, multiprocessing_context=method)
        assert sorted(int(n) for _, y, _ in it for n in y) == list(range(16)) and it.decodes == 16, method
        it.close()


def test_one_decode_per_sample_whatever_the_epochs():
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "log")
        it = loader(headroom.cached(Numbers(80, log), name="log"), num_workers=2)
        for _ in range(3):
            ids_of(it)
        with open(log) as lines:
            assert sorted(listed(lines)) == list(range(80))
        stats = headroom.stats()
        assert it.decodes == 80 and stats["entries"] == 80 and stats["hits"] == 160 and stats["misses"] == 80, stats
        it.close()


def test_a_small_cache_decodes_again_and_gives_the_same():
    headroom.configure(cache=1 << 20)
    data = headroom.cached(Numbers(100, size=10000), name="small")
    for workers in (2, 0):
        it = loader(data, num_workers=workers)
        for _ in range(3):
            assert sorted(sum(ids_of(it), [])) == list(range(100))
        it.close()
    stats = headroom.stats()
    assert stats["evictions"] > 0 and stats["capacity_bytes"] == 1 << 20 and stats["used_bytes"] <= 1 << 20, stats
    assert stats["hits"] > 60, stats


def test_without_a_cache_everything_works():
    headroom.configure(cache=False)
    data = headroom.cached(Numbers(20), transform=draw, name="none")
    for workers in (0, 2):
        it = loader(data, num_workers=workers)
        assert sorted(int(n) for _, y, _ in it for n in y) == list(range(20))
        it.close()
    assert headroom.stats() == {} and headroom.Cache().get("x", 3) == 3 and headroom.Cache().get_or("x", lambda: 5) == 5
    assert headroom.Cache().put("x", 1) is False


def test_a_cached_data_set_by_index():
    data = headroom.cached(Numbers(10), name="index")
    assert data[3][1] == 3 and data[-1][1] == 9 and len(data) == 10 and data.count == 10
    data[3][0][:] = 7
    assert data[3][0][0] == 3, "what a program gets is its own"
    raises(IndexError, "sample 10 of 10", lambda: data[10])
    assert headroom.cached(data) is data
    assert headroom.stats()["misses"] == 2


def test_a_sampler_alone():
    for world in WORLDS:
        parts = [list(headroom.Sampler(Numbers(31), seed=9, rank=rank, world_size=world)) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        assert set(sum(parts, [])) == set(range(31))
        whole = [None] * (world * len(parts[0]))
        for rank, part in enumerate(parts):
            whole[rank::world] = part
        assert whole[:31] == list(headroom.Sampler(31, seed=9, rank=0, world_size=1))
    assert whole == whole[:31] + whole[: len(whole) - 31]
    sampler = headroom.Sampler(31, seed=9, rank=0, world_size=1)
    all_of_it = list(sampler)
    state = sampler.state_dict(used=10)
    again = [headroom.Sampler(31, seed=9, rank=rank, world_size=3) for rank in range(3)]
    for one in again:
        one.load_state_dict(state)
    assert sorted(sum(map(list, again), [])) == sorted(all_of_it[10:])
    sampler.set_epoch(1)
    assert list(sampler) != all_of_it and sorted(sampler) == list(range(31))
    dropped = headroom.Sampler(31, drop_last=True, rank=0, world_size=4)
    assert len(list(dropped)) == len(dropped) == 7
    raises(ValueError, "ranks count from 0", lambda: headroom.Sampler(3, rank=2, world_size=2))


def test_torchs_loader_shares_the_cache_with_its_workers():
    if not HAS_TORCH:
        return
    import torch

    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "log")
        data = headroom.cached(Numbers(40, log), name="torch")
        sampler = headroom.Sampler(data, seed=2)
        for workers in (2, 0, 2):
            it = torch.utils.data.DataLoader(data, batch_size=5, sampler=sampler, num_workers=workers)
            assert sorted(sum(ids_of(it), [])) == list(range(40))
        with open(log) as lines:
            assert sorted(listed(lines)) == list(range(40)), "each sample was decoded once by all of them"


def test_arguments_are_checked_with_words():
    data = headroom.cached(Numbers(10), name="words")
    for more, text in [
        ({"batch_size": 0}, "batch_size=0"), ({"num_workers": -1}, "num_workers=-1"), ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"), ({"global_batch_size": 5, "rank": 0, "world_size": 2, "batch_size": 1}, "not a multiple"),
        ({"prefetch_factor": 0}, "prefetch_factor=0"), ({"timeout": -1}, "timeout=-1"),
    ]:
        raises(ValueError, text, lambda: loader(data, **more))
    raises(ValueError, "cache size '3 apples'", lambda: headroom.configure(cache="3 apples"))
    raises(ValueError, "out of range", lambda: headroom.configure(cache="120%"))


def test_sizes_are_read_as_people_write_them():
    from headroom_train.node import parse_size

    for text, size in [("20GiB", 20 << 30), ("512 MB", 512 * 10**6), ("1.5k", 1536), (7, 7), ("1TiB", 1 << 40), ("3kb", 3000)]:
        assert parse_size(text) == size, text
    assert parse_size("40%", available=1000) == 400


def test_what_the_cache_has_no_room_for_is_read_from_disk_and_nothing_is_left_there():
    headroom.configure(cache=1 << 20)
    with tempfile.TemporaryDirectory() as folder:
        log, disk = os.path.join(folder, "log"), os.path.join(folder, "disk")
        os.mkdir(disk)
        # Eight times the cache.
        data = headroom.cached(Numbers(200, log=log, size=10_000), disk=disk)
        assert os.listdir(disk) == [], "the file has no name"
        expected = ids_of(loader(Numbers(200, size=10_000), batch_size=8))
        for workers in (2, 0):
            it = loader(data, batch_size=8, num_workers=workers)
            assert ids_of(it) == expected
            for _ in range(2):
                assert sorted(sum(ids_of(it), [])) == list(range(200))
            it.close()
        decodes = listed(open(log))
        assert sorted(decodes) == list(range(200)), "each once"
        read, written = data.disk.counts
        assert written == 200 and read > 500, (read, written)
        doubled = headroom.cached(Numbers(200, size=10_000), transform=lambda sample: (sample[0] * 2, *sample[1:]), disk=disk, name="doubled")
        it = loader(doubled, batch_size=8, num_workers=2)
        for epoch in range(3):
            for array, number, _ in it:
                assert (np.asarray(array)[:, 0] == 2 * np.asarray(number)).all()
        assert it.decodes <= 201, it.decodes
        it.close()


def test_a_small_data_set_is_not_written_to_disk_and_bad_folders_are_refused():
    with tempfile.TemporaryDirectory() as disk:
        data = headroom.cached(Numbers(50), disk=disk)
        it = loader(data, num_workers=2)
        assert len(sum(ids_of(it), [])) == 50 and data.disk.counts == (0, 0)
        it.close()
        error = raises(OSError, "give a folder on a local disk", lambda: headroom.cached(Numbers(50), disk=os.path.join(disk, "absent")))
        assert "absent" in str(error)
        # A copy has the same file, while it is open.
        state = pickle.dumps(data)
        again = pickle.loads(state)
        assert again.disk.handle["identity"] == data.disk.handle["identity"] and int(again[7][1]) == 7
        again.disk = data.disk = None
        assert pickle.loads(state).disk is None


def test_torchs_workers_read_the_file_however_they_are_started():
    if not HAS_TORCH:
        return
    import torch.utils.data

    headroom.configure(cache=1 << 20)
    with tempfile.TemporaryDirectory() as folder:
        for start in ("fork", "spawn"):
            log, disk = os.path.join(folder, start), os.path.join(folder, f"{start} disk")
            os.mkdir(disk)
            data = headroom.cached(Numbers(200, log=log, size=10_000), disk=disk, name=start)
            it = torch.utils.data.DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context=start, persistent_workers=True)
            for _ in range(3):
                assert sum((numbers.tolist() for _, numbers, _ in it), []) == list(range(200))
            assert sorted(listed(open(log))) == list(range(200)), "each once"
            del it


def test_a_limit_on_files_ends_writing_with_a_line_and_changes_no_sample():
    headroom.configure(cache=1 << 20)
    with tempfile.TemporaryDirectory() as disk:
        data = headroom.cached(Numbers(100, size=10_000), disk=disk, name="limited")
        it = loader(data, batch_size=10, num_workers=1)
        # More than the cache's memory, which counts as a file, and less than the samples.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, resource.RLIM_INFINITY))
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            for _ in range(3):
                assert sorted(sum(ids_of(it), [])) == list(range(100))
        assert said.getvalue().count("no more decoded samples are written to disk") == 1, said.getvalue()
        read, written = data.disk.counts
        assert 20 < written < 40 and read > 0 and it.decodes > 150, (read, written, it.decodes)
        it.close()


def test_a_damaged_record_is_decoded_again():
    headroom.configure(cache=1 << 20)
    with tempfile.TemporaryDirectory() as disk:
        data = headroom.cached(Numbers(100, size=10_000), disk=disk, name="damaged")
        it = loader(data, batch_size=10, num_workers=1)
        assert len(sum(ids_of(it), [])) == 100
        links = {int(fd): os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        fd = min(fd for fd, link in links.items() if ".samples" in link)
        # A byte within each of the first records, and a head that points far behind the end.
        at = 16 * 100 + 1
        for record in range(5):
            os.pwrite(fd, b"\xff\xfe", at + record * (32 + 40_192) + 20_000)
        os.pwrite(fd, (1 << 50).to_bytes(8, "little"), 16 * 99)
        for _ in range(2):
            assert sorted(sum(ids_of(it), [])) == list(range(100))
        assert 100 < it.decodes < 130, it.decodes
        it.close()


def test_the_name_of_a_file_on_disk_goes_with_its_last_user():
    with tempfile.TemporaryDirectory() as disk:
        # One of two ranks, whose other one never comes.
        os.environ.update(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_PORT="1")
        data = headroom.cached(Numbers(5), disk=disk, name="alone")
        assert len(os.listdir(disk)) == 2, os.listdir(disk)
        data.disk = None
        assert os.listdir(disk) == []
