"""What a program and the run around it tell each other: progress, records, a request to stop, memory."""

import json
import math
import os
import signal
import socket
import sys
import threading
import time

from . import _native, node
from .codec import loaded_torch
from .place import place

_MIB = 1 << 20
# Memory is recorded at most so often, seconds: reading it takes milliseconds.
_MEMORY_EVERY_S = 1.0
_STOPS = (signal.SIGTERM, signal.SIGUSR1)


class _Run:
    """Where records go, and when the last ones were written."""

    def __init__(self):
        self.process = os.getpid()
        self.place = place()
        self.folder = os.environ.get("HEADROOM_RUN_DIR")
        self.started = time.time()
        self.last, self.memory_at = None, 0.0
        self.files = {}
        self.reports = None
        name = os.environ.get("HEADROOM_REPORTS")
        if name:
            self.reports = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self.reports.setblocking(False)
            self.name = b"\0" + name.encode()

    def write(self, file, record):
        if self.folder is None:
            return
        try:
            if file not in self.files:
                self.files[file] = os.open(
                    os.path.join(self.folder, file), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
                )
            os.write(self.files[file], (json.dumps(record) + "\n").encode())
        except OSError as error:
            node.say_once(f"{file} cannot be written ({error}): the program goes on without its records")

    def tell(self, message):
        if self.reports is not None:
            try:
                self.reports.sendto(json.dumps(message).encode(), self.name)
            except OSError:
                # The launcher is behind, or ends: a progress bar is worth no delay.
                pass


_run = None
_stop = {"signal": None, "installed": False}


def _current():
    global _run
    if _run is None or _run.process != os.getpid():
        _run = _Run()
    return _run


def _plain(value):
    """A number as JSON has it; None for what is no finite number."""
    item = getattr(value, "item", None)
    value = item() if callable(item) else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"report() takes numbers, found {type(value).__name__}")
    return value if math.isfinite(value) else None


def report(step, loss=None, *, epoch=None, epochs=None, steps=None, lr=None, samples=None, phase="train", **metrics):
    """Records one step: the progress bar, `metrics.jsonl`, and the memory of this rank.

    `samples`: samples of the step over all ranks, for samples/s. Metrics are numbers by any name; on rank 0 they go to the run's
    records, from which its plots are drawn. Without `launch` it does nothing. Costs some 20 µs, and once a second
    some milliseconds; a tensor on a device is waited for.
    """
    run, now = _current(), time.time()
    step = int(step)
    if run.place.rank == 0 and (run.folder is not None or run.reports is not None):
        took = now - run.last[1] if run.last and run.last[0] < step else None
        per_step = took / (step - run.last[0]) if took is not None else None
        run.last = (step, now)
        rate = samples / per_step if samples and per_step else None
        number = None if loss is None else _plain(loss)
        record = {
            "t": now, "step": step, "epoch": int(epoch) + 1 if epoch is not None else 1, "loss": number,
            "lr": None if lr is None else _plain(lr), "samples_per_s": rate, "data_wait_s": None, "step_s": per_step,
            "grad_norm": None, "scale": None, "cache_hit_rate": _hit_rate(),
        }
        record.update({f"{phase}.{name}": _plain(value) for name, value in metrics.items()})
        run.write("metrics.jsonl", record)
        run.tell({
            "kind": "progress", "phase": phase, "epoch": record["epoch"], "epochs": int(epochs or 0), "step": step,
            "steps": int(steps or 0), "loss": number if number is not None else 0.0, "samples_per_s": rate or 0.0,
            "pss_bytes": 0, "cache_hit_rate": record["cache_hit_rate"],
        })
    if run.folder is not None and now - run.memory_at >= _MEMORY_EVERY_S:
        run.memory_at = now
        run.write(f"memory.rank{run.place.rank}.jsonl", _memory_record(now, step, phase))


def _counters():
    found = node.found_node()
    return found.stats() if found is not None else None


def _hit_rate():
    counters = _counters()
    if not counters:
        return None
    reads = counters["hits"] + counters["misses"] + counters["passed"]
    return counters["hits"] / reads if reads else None


def _memory_record(now, step, phase):
    process, machine, counters = _native.process_memory(), _native.machine_memory(), _counters() or {}
    record = {
        "t": now, "step": step, "phase": phase, "rss_bytes": process.get("rss_bytes", 0),
        "pss_bytes": process.get("pss_bytes", 0), "uss_bytes": process.get("uss_bytes", 0),
        "shared_bytes": process.get("shared_bytes", 0), "anon_bytes": process.get("anonymous_bytes", 0),
        "system_used_bytes": max(0, machine["total_bytes"] - machine["available_bytes"]),
        "system_total_bytes": machine["total_bytes"], "cache_bytes": counters.get("used_bytes", 0),
        "cache_hits": counters.get("hits", 0), "cache_misses": counters.get("misses", 0),
        "gpu_allocated_bytes": 0, "gpu_reserved_bytes": 0, "gpu_peak_bytes": 0,
    }
    torch = loaded_torch()
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        record.update(
            gpu_allocated_bytes=torch.cuda.memory_allocated(), gpu_reserved_bytes=torch.cuda.memory_reserved(),
            gpu_peak_bytes=torch.cuda.max_memory_allocated(),
        )
    return record


def _asked(number, _frame):
    if _stop["signal"] is None:
        _stop["signal"] = number


def stopping():
    """True once this process was asked to end: by SIGTERM, or by SIGUSR1, which the launcher sends when memory runs out.

    The first call takes these signals, which then no longer end the program: save, and leave the loop. A second SIGTERM ends
    it. Ranks may see the request at different steps: where they must leave together, reduce the answer over them.
    """
    if not _stop["installed"]:
        _stop["installed"] = True
        if threading.current_thread() is not threading.main_thread():
            node.say_once("stopping() was first called in a thread: only the main thread can take signals, so call it there")
            _stop["installed"] = False
            return _stop["signal"] is not None
        for number in _STOPS:
            if signal.getsignal(number) in (signal.SIG_DFL, None):
                signal.signal(number, _first_then_default)
    return _stop["signal"] is not None


def _first_then_default(number, frame):
    _asked(number, frame)
    if number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stats():
    """Counters of the cache: `hits`, `misses`, `passed` (no room) of this process, `node_decodes`, `entries`, `used_bytes`,
    `capacity_bytes`, `evictions` of the node. Empty where there is no cache."""
    found = node.node()
    if found is None:
        return {}
    counters = found.stats()
    reads = counters["hits"] + counters["misses"] + counters["passed"]
    counters["hit_rate"] = counters["hits"] / reads if reads else None
    counters["hosts"] = found.hosts
    node.tell_notes(found)
    return counters


def _planned():
    """Lines of the run's plan, where `launch` made one."""
    folder = os.environ.get("HEADROOM_RUN_DIR")
    if folder is None:
        return {}
    try:
        with open(os.path.join(folder, "plan.json"), encoding="utf-8") as file:
            budget = json.load(file)["budget"]
        return {"plan: budget": budget["total_bytes"],
                **{f"plan: {line['name'].replace('_', ' ')}": line["bytes"] for line in budget["lines"]}}
    except (OSError, ValueError, KeyError, TypeError):
        # A plan that cannot be read has no lines.
        return {}


def memory(show=False):
    """The lines of this rank's memory budget, in bytes: this process, its share of the node's cache, what is left, and under `launch`
    the lines of its plan.

    `show=True` prints them as a table as well.
    """
    process, machine, counters = _native.process_memory(), _native.machine_memory(), _counters() or {}
    lines = {
        "rank: own memory": process.get("uss_bytes", 0),
        "rank: with its share of what is shared (PSS)": process.get("pss_bytes", 0),
        "node: cache, in use": counters.get("used_bytes", 0),
        "node: cache, at most": counters.get("capacity_bytes", 0),
        "node: can be had": machine["available_bytes"],
        "node: all": machine["total_bytes"],
        **_planned(),
    }
    if show:
        width = max(map(len, lines))
        for name, value in lines.items():
            sys.stdout.write(f"{name:<{width}}  {value / _MIB:10.1f} MiB\n")
        sys.stdout.flush()
    return lines
