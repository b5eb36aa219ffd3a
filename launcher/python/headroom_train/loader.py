"""A drop-in for `torch.utils.data.DataLoader` over the node's cache."""

import atexit
import collections
import itertools
import multiprocessing
import os
import weakref

from . import _native, codec, collate, node, worker
from .dataset import Cached, Plain
from .files import Files
from .place import place
from .sampler import checked_state

_NO_USE = (1 << 64) - 1
_open = weakref.WeakSet()


class _Planned:
    """Batches in Headroom's own order."""

    def __init__(self, loader):
        self.length, self.seed, self.shuffle = loader.data.length, loader.seed, loader.shuffle
        self._order = _native.Order(self.length, self.seed & _NO_USE, self.shuffle)
        self._loader = loader

    def steps(self, position=0):
        left, size = self.length - position, self._loader.global_batch
        return left // size if self._loader.drop_last else -(-left // size)

    def batches(self, epoch, position):
        loader = self._loader
        for step in range(self.steps(position)):
            at = position + step * loader.global_batch
            ids, uses = self._order.batch(
                epoch, at, loader.global_batch, (loader.rank, loader.world_size), loader.pads
            )
            yield min(at + loader.global_batch, self.length), ids, uses


class _Given:
    """Batches of a sampler of the user's."""

    def __init__(self, loader, sampler, batch_sampler):
        self.length, self.seed, self.shuffle = loader.data.length, None, None
        self._sampler, self._batches, self._loader = sampler, batch_sampler, loader

    def steps(self, position=0):
        if self._batches is not None:
            return max(0, len(self._batches) - position)
        count, size = len(self._sampler), self._loader.batch_size
        steps = count // size if self._loader.drop_last else -(-count // size)
        return max(0, steps - position)

    def _lists(self):
        if self._batches is not None:
            yield from self._batches
            return
        draw, size = iter(self._sampler), self._loader.batch_size
        while True:
            ids = list(itertools.islice(draw, size))
            if len(ids) < size and (self._loader.drop_last or not ids):
                return
            yield ids

    def batches(self, epoch, position):
        for chosen in (self._sampler, self._batches, getattr(self._batches, "sampler", None)):
            if hasattr(chosen, "set_epoch"):
                chosen.set_epoch(epoch)
        for number, ids in enumerate(self._lists()):
            if number >= position:
                ids = [self._loader.index(index) for index in ids]
                yield number + 1, ids, [_NO_USE] * len(ids)


class DataLoader:
    """Batches of a data set, as `torch.utils.data.DataLoader` gives them, from the node's cache.

    With a data set from :func:`headroom_train.cached`, `dataset[i]` runs once per node, in `num_workers` processes that write into
    the cache; later epochs copy stored bytes into batches, without Python. Data sets of files (:func:`headroom_train.hdf5`) are
    read in as many threads. Any other data set is decoded for every use.

    `batch_size` is per rank; `global_batch_size`, in its place, is divided among ranks. Rank and world size come from
    torch.distributed or the launcher's environment. With `shuffle=True` the order depends on (seed, epoch) alone: the ranks' batches
    of a step are together the next samples of one order, for any number of ranks. `pad=True` gives all ranks equally many samples in
    a last short step, some of them twice, as DistributedSampler does; `pad=False` gives each sample once.

    `state_dict()` is what the loop has consumed, exact whatever is being prefetched, and continues on any number of ranks.
    Breaking out of a loop is fine; the next one begins the next epoch. Workers live until :meth:`close`, or the loader's end.
    """

    def __init__(self, dataset, batch_size=1, shuffle=False, sampler=None, batch_sampler=None, num_workers=0,
                 collate_fn=None, pin_memory=False, drop_last=False, timeout=0, worker_init_fn=None,
                 multiprocessing_context=None, generator=None, *, prefetch_factor=2, persistent_workers=True,
                 pin_memory_device="", seed=None, rank=None, world_size=None, global_batch_size=None, pad=True):
        del persistent_workers, pin_memory_device
        if seed is None:
            seed = generator.initial_seed() if generator is not None else 0
        self.dataset, self.seed, self.shuffle = dataset, int(seed), bool(shuffle)
        self.data = dataset if isinstance(dataset, (Cached, Files)) else Plain(dataset, self.seed)
        self.collate_fn, self.pin_memory, self.drop_last = collate_fn, bool(pin_memory), bool(drop_last)
        self.num_workers, self.prefetch_factor = _whole("num_workers", num_workers, 0), _whole(
            "prefetch_factor", prefetch_factor, 1)
        self.timeout, self.worker_init_fn = float(timeout), worker_init_fn
        if not self.timeout >= 0:
            raise ValueError(f"timeout={timeout}: expected seconds, 0 or more")
        here = place() if rank is None or world_size is None else None
        self.rank = here.rank if rank is None else _whole("rank", rank, 0)
        self.world_size = here.world_size if world_size is None else _whole("world_size", world_size, 1)
        if self.rank >= self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}: ranks count from 0")
        self._context = _context(multiprocessing_context)
        self._sizes(batch_size, global_batch_size, sampler, batch_sampler)
        self.pads = bool(pad) and self.world_size > 1
        self.sampler, self.batch_sampler = sampler, batch_sampler
        given = sampler is not None or batch_sampler is not None
        self._order = _Given(self, sampler, batch_sampler) if given else _Planned(self)
        self.epoch, self._position, self._begun = 0, 0, False
        self._iteration = None
        self._threads = self._pool = self._stacker = None

    def _sizes(self, batch_size, global_batch_size, sampler, batch_sampler):
        if batch_sampler is not None and (batch_size not in (1, None) or self.shuffle or sampler is not None
                                          or self.drop_last):
            raise ValueError("batch_sampler excludes batch_size, shuffle, sampler and drop_last")
        if sampler is not None and self.shuffle:
            raise ValueError("sampler excludes shuffle")
        self._single = batch_size is None and batch_sampler is None and global_batch_size is None
        if global_batch_size is not None:
            if batch_size not in (1, None) or sampler is not None or batch_sampler is not None:
                raise ValueError("global_batch_size excludes batch_size, sampler and batch_sampler")
            self.global_batch = _whole("global_batch_size", global_batch_size, 1)
            if self.global_batch % self.world_size:
                raise ValueError(
                    f"global_batch_size {self.global_batch} is not a multiple of {self.world_size} ranks: batches of a step "
                    "would differ in size"
                )
            self.batch_size = self.global_batch // self.world_size
        else:
            self.batch_size = _whole("batch_size", 1 if batch_size is None else batch_size, 1)
            self.global_batch = self.batch_size * self.world_size

    def index(self, index):
        """A sampler's index within the data set."""
        number = int(index)
        number = number + self.data.length if number < 0 else number
        if not 0 <= number < self.data.length:
            raise IndexError(f"the sampler gave sample {index} of {self.data.length}")
        return number

    # Order and state

    def __len__(self):
        return self._order.steps()

    def set_epoch(self, epoch):
        """The epoch of the next loop; one that a loaded state stands in continues there."""
        epoch = _whole("epoch", epoch, 0)
        if self._begun or epoch != self.epoch:
            self.epoch, self._position, self._begun = epoch, 0, False

    def state_dict(self):
        """Where the loop stands: O(1), exact, the same on every rank after the same step."""
        state = {"version": 1, "epoch": self.epoch, "position": self._position, "seed": self._order.seed,
                 "shuffle": self._order.shuffle, "samples": self.data.length}
        if isinstance(self._order, _Given):
            state["unit"] = "batches"
        return state

    def load_state_dict(self, state):
        """Continues at a state: the next loop gives what was left of its epoch."""
        given = isinstance(self._order, _Given)
        if isinstance(state, dict) and (state.get("unit") == "batches") != given:
            raise ValueError("the state was made with a sampler of one's own, or without: give the same kind of order")
        if given:
            if state.get("version") != 1 or state.get("samples") != self.data.length:
                raise ValueError(f"this is no state of this loader: {state!r:.200}")
            epoch, position = int(state["epoch"]), int(state["position"])
        else:
            epoch, position = checked_state(state, self._order)
        if self._order.steps(position) == 0 and position > 0:
            epoch, position = epoch + 1, 0
        self._end_iteration()
        self.epoch, self._position, self._begun = epoch, position, False

    def __iter__(self):
        self._end_iteration()
        if self._begun:
            self.epoch, self._position = self.epoch + 1, 0
        self._begun = True
        self.data.epoch = self.epoch
        self._iteration = iteration = _Iteration(self)
        return iteration

    def _end_iteration(self):
        if self._iteration is not None:
            self._iteration.end()
            self._iteration._replaced = True
            self._iteration = None

    # Workers

    @property
    def _builds(self):
        return self.data.transform is not None or self.collate_fn is not None or self._single

    def threads(self):
        """The loader's threads and workers, started when they are first needed."""
        if self._threads is None or self._process != os.getpid():
            self._start()
        return self._threads

    def _start(self):
        found = node.node() if isinstance(self.data, Cached) else None
        collate_fn = _first_of_one if self._single else self.collate_fn
        recipe = self.data.recipe(collate_fn)
        pool = worker.Pool(recipe, self.num_workers, self._context, self.worker_init_fn, found and found.memory)
        files = self.data.native() if isinstance(self.data, Files) else None
        # Files need workers for the user's own code alone.
        workers = self.num_workers if files is None or self._builds else 0
        lanes = [pool.start(number) for number in range(workers)]
        self._threads = _native.Loader(
            found, self.data.base, self.data.tag, lanes, pool, files=files, disk=getattr(self.data, "disk", None),
            threads=self.num_workers, build=self._builds, apart=False, timeout=self.timeout, batches=self.ahead + 2,
        )
        self._pool, self._process = pool, os.getpid()
        _open.add(self)

    @property
    def ahead(self):
        """Batches under way at once."""
        return self.prefetch_factor * self.num_workers

    def pinned(self, batch):
        if not self.pin_memory:
            return batch
        torch = codec.loaded_torch()
        if torch is None or not torch.cuda.is_available():
            return batch
        from torch.utils.data._utils.pin_memory import pin_memory

        return pin_memory(batch)

    def here(self, epoch, ids, uses):
        """A batch of samples that are read in this thread."""
        data, recipe = self.data, self.data.recipe(_first_of_one if self._single else self.collate_fn)
        if not isinstance(data, Cached):
            samples = []
            for index in ids:
                with worker.seeded(worker.seed_of(data.seed, epoch + 1, index)):
                    samples.append(data.dataset[index])
                data.decodes += 1
            return recipe.batch(samples)
        entries = [data.entry(index, use) for index, use in zip(ids, uses)]
        stored = all(isinstance(entry, _native.Sample) for entry in entries)
        if stored and not self._builds:
            if self._stacker is None:
                self._stacker = _native.Stacker(data.tag, 3)
            return collate.batch(self._stacker.stack(entries))
        samples = []
        for index, entry in zip(ids, entries):
            sample = codec.copied(codec.decode(entry))
            if data.transform is not None:
                with worker.seeded(worker.seed_of(data.seed + 1, epoch, index)):
                    sample = data.transform(sample)
            samples.append(sample)
        return recipe.batch(samples)

    @property
    def decodes(self):
        """Samples that this loader's processes decoded so far."""
        return self.data.decodes + (self._threads.decodes if self._threads is not None else 0)

    def close(self):
        """Ends the workers; they start again when they are needed."""
        self._end_iteration()
        threads, pool, self._threads, self._pool = self._threads, self._pool, None, None
        if threads is not None and self._process == os.getpid():
            self.data.decodes += threads.decodes
            pool.closed = True
            threads.close()
            pool.close()
        _open.discard(self)

    def __del__(self):
        if getattr(self, "_threads", None) is not None and getattr(self, "_process", None) == os.getpid():
            self.close()

    def __getstate__(self):
        state = dict(vars(self))
        state.update(_threads=None, _pool=None, _stacker=None, _iteration=None, _context=None)
        return state


class _Iteration:
    """One loop over a loader."""

    def __init__(self, loader):
        self._loader = loader
        self._plan = loader._order.batches(loader.epoch, loader._position)
        self._ends, self._over, self._replaced = collections.deque(), False, False
        self._ended = False

    def __iter__(self):
        return self

    def __len__(self):
        return self._loader._order.steps(self._loader._position)

    def __next__(self):
        loader = self._loader
        if self._replaced and not self._ended:
            raise RuntimeError(
                "another loop over this loader has begun, or it was closed: make a second DataLoader to have two at once"
            )
        if self._over:
            raise StopIteration
        try:
            made, position = self._alone() if loader.num_workers == 0 else self._threaded()
        except BaseException:
            self._ended = True
            self.end()
            raise
        loader._position = position
        return loader.pinned(made)

    def _alone(self):
        try:
            position, ids, uses = next(self._plan)
        except StopIteration:
            self._over = True
            raise
        return self._loader.here(self._loader.epoch, ids, uses), position

    def _threaded(self):
        loader = self._loader
        threads = loader.threads()
        # While memory is short each worker prepares one batch ahead, no more.
        ahead = loader.num_workers if node.is_short() else loader.ahead
        while len(self._ends) < ahead:
            drawn = next(self._plan, None)
            if drawn is None:
                break
            position, ids, uses = drawn
            self._ends.append(position)
            threads.push(loader.epoch, ids, uses)
        made = threads.next()
        if made is None:
            self._over = True
            raise StopIteration
        position = self._ends.popleft()
        if isinstance(made, bytes):
            raise worker.unpacked(made)
        return collate.batch(made), position

    def end(self):
        """Forgets what was asked for ahead."""
        if not self._over:
            self._over = True
            if self._loader._threads is not None and self._loader._process == os.getpid():
                self._loader._threads.cancel()
        self._ends.clear()


def _first_of_one(samples):
    """The way to collate where batch_size is None: samples come one by one."""
    if codec.loaded_torch() is not None:
        from torch.utils.data import default_convert

        return default_convert(samples[0])
    return samples[0]


def _whole(name, value, least):
    if isinstance(value, bool) or int(value) != value or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number, {least} or more")
    return int(value)


def _context(wanted):
    if wanted is None or isinstance(wanted, str):
        return multiprocessing.get_context(wanted)
    return wanted


@atexit.register
def _close_all():
    # Before the interpreter ends: threads of a loader may want it.
    for loader in list(_open):
        loader.close()
