"""This process's connection to the node's cache: one for all its data sets and loaders."""

import atexit
import ctypes
import gc
import os
import re
import sys
import threading
import time

from . import _native
from .place import job_name

# Share of the memory that can be had for samples, where nothing was said. Pages are taken as samples come.
_DEFAULT_SHARE = 0.5
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

_lock = threading.RLock()
_settings = {"size": None, "name": None}
_found = {}
_said = set()
_parents = []


def say(text):
    """One line for the user, on standard error."""
    sys.stderr.write(f"headroom: {text}\n")
    sys.stderr.flush()


def say_once(text):
    if text not in _said:
        _said.add(text)
        say(text)


def parse_size(size, available=None):
    """Bytes of `size`: a number, such as "20GiB", "512 MB" or "40%" (of the memory that can be had now)."""
    if isinstance(size, (int, float)) and not isinstance(size, bool):
        value = int(size)
    else:
        match = re.fullmatch(r"\s*([0-9.]+)\s*(%|[kmgt]?i?b?)\s*", str(size), re.IGNORECASE)
        try:
            number = float(match.group(1)) if match else None
        except ValueError:
            number = None
        if number is None:
            raise ValueError(f"cache size {size!r}: expected bytes, such as \"20GiB\", or a share, such as \"40%\"")
        unit = match.group(2).lower()
        if unit == "%":
            if not 0 < number <= 100:
                raise ValueError(f"cache size {size!r} is out of range: use 1 % to 100 %")
            available = _native.machine_memory()["available_bytes"] if available is None else available
            value = int(available * number / 100)
        else:
            power = _UNITS[unit.replace("i", "").replace("b", "")]
            value = int(number * (1000 ** (power.bit_length() // 10) if unit in ("kb", "mb", "gb", "tb") else power))
    if value < 0:
        raise ValueError(f"cache size {size!r}: expected 0 (no cache) or more")
    return value


def configure(cache=None):
    """Sets the size of the node's cache before it is first used: "20GiB", "40%" of the free memory, or False for none.

    Under `launch --cache` the launcher's size counts. The first process of a node that uses the cache hosts it, and its size is
    the node's.
    """
    size = None if cache is None else 0 if cache is False else parse_size(cache)
    with _lock:
        if "node" in _found:
            raise RuntimeError("the cache is in use already: call configure() before the first data set is cached")
        _settings["size"] = size


def _size():
    if _settings["size"] is not None:
        return _settings["size"]
    wanted = os.environ.get("HEADROOM_CACHE_SIZE")
    if wanted:
        return parse_size(wanted)
    return int(_native.machine_memory()["available_bytes"] * _DEFAULT_SHARE)


def _join():
    size, door = _size(), os.environ.get("HEADROOM_CACHE_DOOR")
    if size == 0:
        return None
    # A forked or spawned child joins its parent's cache.
    name = _settings["name"] = _settings["name"] or job_name()
    capacity = max(1 << 20, size // (1 << 20) * (1 << 20))
    try:
        return _native.Node.join(name, capacity, not door)
    except OSError as error:
        say_once(f"no cache: {error}; every sample is decoded for every use")
        return None


def node():
    """The cache of this node, or None where there is none."""
    if "node" in _found:
        return _found["node"]
    with _lock:
        if "node" not in _found:
            _found["node"] = _join()
        found = _found["node"]
    tell_notes(found)
    return found


def found_node():
    """The cache of this node, if this process uses it already."""
    return _found.get("node")


def is_short():
    """Memory is short: the launcher has made the cache smaller, or just did so. At the first sight of it this process gives back
    what its allocators keep."""
    found = _found.get("node")
    short = found is not None and found.is_shrunk
    if short and not _found.get("short"):
        # The young generations alone: a look at all objects writes to all their pages, which workers that were forked share.
        gc.collect(1)
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            # Another C library: it has none.
            pass
    _found["short"] = short
    return short


def lose(error):
    """Goes on without the cache, whose host is gone."""
    with _lock:
        if _found.get("node") is not None:
            _found["node"] = None
            say_once(f"{error}; samples are decoded for every use from now on")


def tell_notes(found):
    if found is not None:
        for note in found.notes():
            say_once(f"cache: {note}")


def name_of_cache():
    """What a child that is started afresh needs to find this process's cache."""
    node()
    return _settings["name"]


def use_cache(name):
    """In a child that was started afresh: the parent's cache."""
    _settings["name"] = name


# A host waits at its end for the other ranks, at most so long, seconds.
_LINGER_S = 30.0


@atexit.register
def _linger():
    found = _found.get("node")
    if found is not None and not found.hosts:
        # The host hears of all reads before this process ends.
        found.stats()
    # One that ends by an exception has its error seen at once.
    if found is None or not found.hosts or getattr(sys, "last_type", None) is not None:
        return
    until, said = time.monotonic() + _LINGER_S, time.monotonic() + 3
    while found.guests > 1 and time.monotonic() < until:
        if time.monotonic() > said:
            said = until
            say(f"waiting for {found.guests - 1} processes that use the cache of this one (at most {_LINGER_S:.0f} s)")
        time.sleep(0.01)


def _after_fork():
    # A lock may be held by a thread that the child does not have.
    global _lock
    _lock = threading.RLock()
    # The parent's threads are not here: the child comes in by the door itself. Its objects must not be ended here.
    _parents.append(_found.pop("node", None))


os.register_at_fork(after_in_child=_after_fork)
