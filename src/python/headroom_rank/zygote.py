"""The process from which all ranks of a node are forked, once PyTorch and the user's module are imported.

The launcher asks over a socket: a message of JSON with the descriptors of one rank, answered by that rank's process. A rank
becomes a child of the launcher, which adopts it when the process in between has ended.
"""

import ctypes
import gc
import json
import os
import signal
import socket

from . import failure, start

_PR_SET_PDEATHSIG = 1
_MOST_BYTES, _MOST_DESCRIPTORS = 1 << 18, 64


def why_not(torch):
    """Why this process must not be forked; None: it may."""
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        names = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in threads if thread != str(os.getpid())]
        return f"{len(threads) - 1} threads run once the module is imported ({', '.join(sorted(set(names)))})"
    if torch.cuda.is_initialized():
        return "the module uses CUDA when it is imported, and CUDA does not survive a fork"
    return None


def serve(number):
    """Forks ranks until the launcher closes the socket; returns this process's exit code."""
    connection = socket.socket(fileno=number)
    try:
        session = start.prepare()
        session.facts()
        refused = why_not(start.load_torch())
    except (start.Refused, failure.UserFailure) as error:
        # Each rank says it for itself.
        refused = str(error)
    connection.sendall(json.dumps({"refused": refused}).encode())
    if refused is not None:
        return 0
    # A collector that visits these objects writes to their pages, which all ranks share.
    gc.collect()
    gc.freeze()
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, _MOST_BYTES, _MOST_DESCRIPTORS)
        if not data:
            return 0
        pid = _fork(json.loads(data), descriptors, session, connection)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(json.dumps({"pid": pid}).encode())


def _fork(order, descriptors, session, connection):
    """The process of a new rank, whose parent is the launcher from here on."""
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            own = os.getpid()
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                os.close(writer)
                connection.close()
                _be_rank(order, descriptors, session, own)
            os.write(writer, b"%d" % pid)
        finally:
            os._exit(0)
    os.close(writer)
    pid = int(os.read(reader, 32) or b"0")
    os.close(reader)
    os.waitpid(between, 0)
    return pid


def _be_rank(order, descriptors, session, between):
    code = 1
    try:
        os.setpgid(0, 0)
        libc = ctypes.CDLL(None, use_errno=True)
        # The process in between ends at once; then the launcher is the parent, and this dies with it. Where that is gone, whoever
        # adopts orphans is.
        while os.getppid() == between:
            os.sched_yield()
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != order["parent"]:
            os._exit(0)
        for name in order["unset"]:
            os.environ.pop(name, None)
        os.environ.update(order["env"])
        for role, descriptor in zip(order["roles"], descriptors):
            if role == "cgroup":
                try:
                    os.write(descriptor, b"0")
                except OSError:
                    pass
                os.close(descriptor)
            elif role in ("1", "2"):
                os.dup2(descriptor, int(role))
                os.close(descriptor)
            else:
                os.environ[role] = str(descriptor)
        code = start.rank([], session)
    except BaseException as error:  # The last words of a process that nobody else speaks for.
        start.say(f"a forked rank: {error!r}")
    start.leave(code)
