"""The exact order of samples, for a loader of one's own."""

from . import _native
from .place import place

_CHUNK = 1024


class Sampler:
    """Indices of this rank in an order that is a pure function of (seed, epoch, position), for any number of ranks.

    Item `k` of rank `r` of `W` is position `start + k * W + r` of the epoch, so that the ranks' batches of `B` samples are together
    the `W * B` next samples of one order. For `torch.utils.data.DataLoader(sampler=...)`, which then shuffles nothing itself.

    `state_dict(used)` is exact whatever the loader has drawn ahead: `used` is the number of this rank's samples that the loop has
    had since the epoch began, or since the state that was loaded. Any number of ranks continues from it.
    """

    def __init__(self, data, shuffle=True, seed=0, drop_last=False, *, rank=None, world_size=None):
        self.length = data if isinstance(data, int) else len(data)
        if self.length < 0:
            raise ValueError(f"a data set of {self.length} samples: expected 0 or more")
        self.shuffle, self.seed, self.drop_last = bool(shuffle), int(seed), bool(drop_last)
        here = place() if rank is None or world_size is None else None
        self.rank = here.rank if rank is None else int(rank)
        self.world_size = here.world_size if world_size is None else int(world_size)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size}: ranks count from 0")
        self.epoch, self.start = 0, 0
        self._order = _native.Order(self.length, self.seed & ((1 << 64) - 1), self.shuffle)

    def set_epoch(self, epoch):
        """Begins `epoch` at its first sample; the one that a loaded state stands in continues where it stood."""
        if int(epoch) != self.epoch:
            self.epoch, self.start = int(epoch), 0

    def __len__(self):
        left = self.length - self.start
        return left // self.world_size if self.drop_last else -(-left // self.world_size)

    def __iter__(self):
        epoch, start, count = self.epoch, self.start, len(self)
        done = 0
        while done < count:
            some = min(_CHUNK, count - done)
            first = start + done * self.world_size + self.rank
            ids = self._order.ids(epoch, first, self.world_size, some)
            if len(ids) < some:
                # The last item of some ranks: as torch's DistributedSampler, the epoch's first samples once more.
                again = [first + item * self.world_size - self.length for item in range(len(ids), some)]
                ids += [self._order.ids(epoch, position % max(1, self.length), 1, 1)[0] for position in again]
            yield from ids
            done += some

    def state_dict(self, used=0):
        """Where the loop stands after `used` samples of this rank; the same on every rank."""
        position = self.start + int(used) * self.world_size
        return {"version": 1, "epoch": self.epoch, "position": min(position, self.length), "seed": self.seed,
                "shuffle": self.shuffle, "samples": self.length}

    def load_state_dict(self, state):
        """Continues at a state, whatever the number of ranks it was made on."""
        epoch, position = checked_state(state, self)
        if position >= self.length:
            epoch, position = epoch + 1, 0
        self.epoch, self.start = epoch, position


def checked_state(state, of):
    """Epoch and position of a state that belongs to this order."""
    if not isinstance(state, dict) or state.get("version") != 1:
        raise ValueError(f"this is no state of headroom_train's order: {state!r:.200}")
    for key, now in (("seed", of.seed), ("shuffle", of.shuffle), ("samples", of.length)):
        if state.get(key) != now:
            raise ValueError(
                f"the state was made with {key}={state.get(key)!r}, now it is {now!r}: the order would be another one; "
                f"give the same {key}"
            )
    epoch, position = state.get("epoch"), state.get("position")
    if not isinstance(epoch, int) or not isinstance(position, int) or epoch < 0 or not 0 <= position <= of.length:
        raise ValueError(f"the state stands at epoch {epoch!r}, position {position!r} of {of.length} samples")
    return epoch, position
