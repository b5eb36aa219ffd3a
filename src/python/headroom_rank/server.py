"""Forks decode workers. A process of one thread, made before the rank has any: forking from it is safe at any time."""

import ctypes
import gc
import json
import os
import signal
import socket
import threading

_PR_SET_PDEATHSIG = 1
# Descriptors of the rank that nobody else may hold: their end must be its end.
_OF_THE_RANK = ("HEADROOM_CONTROL_FD", "HEADROOM_COMM_FD", "HEADROOM_CACHE_FD", "HEADROOM_CACHE_MEMFD")


def end_with_parent(parent):
    """Has the kernel end this process when its parent ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def close_descriptors():
    """Closes what belongs to the rank alone."""
    for name in _OF_THE_RANK:
        number = os.environ.pop(name, None)
        if number is not None:
            try:
                os.close(int(number))
            except (OSError, ValueError):
                pass


class Server:
    """The rank's end."""

    def __init__(self, session):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                end_with_parent(parent)
                close_descriptors()
                # As in the zygote, for the workers' sake.
                gc.freeze()
                _serve(theirs, session)
            finally:
                os._exit(0)
        theirs.close()
        self._socket, self._lock = ours, threading.Lock()

    def worker(self, old):
        """A new worker: its socket, its scratch memory, its process; and how process `old` ended, where one is named."""
        ours, theirs = socket.socketpair()
        scratch = os.memfd_create("headroom-scratch", os.MFD_CLOEXEC)
        try:
            with self._lock:
                socket.send_fds(self._socket, [json.dumps({"old": old}).encode()], [theirs.fileno(), scratch])
                answer = self._socket.recv(4096)
        except OSError:
            answer = b""
        finally:
            theirs.close()
        if not answer:
            ours.close()
            os.close(scratch)
            raise OSError(f"the process that starts decode workers (pid {self.pid}) has ended")
        told = json.loads(answer)
        return ours.detach(), scratch, told["pid"], told["end"]


def _end(pid):
    """How child `pid` ended."""
    if not pid:
        return ""
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return "has ended"
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ": the kernel kills so when memory runs out" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"


def _serve(connection, session):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, 4096, 2)
        if not data:
            return
        old = json.loads(data)["old"]
        if old:
            try:
                os.kill(old, signal.SIGKILL)
            except ProcessLookupError:
                pass
        end = _end(old)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                connection.close()
                end_with_parent(parent)
                from . import worker

                worker.work(session, *descriptors)
            finally:
                os._exit(0)
        for number in descriptors:
            os.close(number)
        connection.sendall(json.dumps({"pid": pid, "end": end}).encode())
