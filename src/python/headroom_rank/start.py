"""From an interpreter to a rank: PyTorch, the trainer's extension, the user's module, then Headroom's loop."""

import importlib.machinery
import importlib.util
import json
import os
import sys

from . import failure
from .failure import Refused

# The trainer is built against this libtorch; its C++ interface changes from one version to the next.
TORCH = "2.11"
USAGE, USER = 2, 10


def say(text):
    sys.stdout.flush()
    sys.stderr.write(f"rank: error: {text}\n")
    sys.stderr.flush()


def leave(code):
    """Ends this process with `code`. Nothing is torn down: threads of libtorch may be at work."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


def load_torch():
    """Imports PyTorch, with one thread: a process with threads of OpenMP cannot be forked.

    PyTorch imports numpy, whose OpenBLAS starts threads at once where it may have more than one. Decode workers are as many as
    there is work for; the trainer's own threads are set apart from this.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        import torch
    except ImportError as error:
        raise Refused(
            f"{sys.executable} has no PyTorch ({error}): install torch=={TORCH}.* there, or name another Python in "
            "python.interpreter"
        ) from None
    found = torch.__version__.split("+")[0]
    if not found.startswith(TORCH + "."):
        raise Refused(
            f"{sys.executable} has PyTorch {found}, and this trainer is built for {TORCH}: install torch=={TORCH}.* there, or "
            "name another Python in python.interpreter. With any PyTorch, a training loop of your own can use Headroom's cache "
            "and loader: pip install headroom-train"
        )
    torch.set_num_threads(1)
    return torch


def load_trainer():
    """The extension, once libtorch is loaded: it is linked against the libraries that PyTorch has brought."""
    path = os.environ.get("HEADROOM_TRAINER", "")
    name = "headroom_rank._rank"
    if name in sys.modules:
        return sys.modules[name]
    if not os.path.isfile(path):
        raise Refused(f"no trainer at {path!r}: build it with `cargo build --release -p headroom-rank`")
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    try:
        module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path, loader=loader))
        loader.exec_module(module)
    except ImportError as error:
        raise Refused(f"{path} cannot be loaded ({error}): build it anew with `cargo build --release -p headroom-rank`") from None
    sys.modules[name] = module
    return module


def section():
    """The section `python` of the config."""
    text = os.environ.get("HEADROOM_PYTHON")
    if not text:
        raise Refused("HEADROOM_PYTHON is not set: start ranks with `launch --config …`")
    return json.loads(text)


def prepare():
    """PyTorch, the trainer and what the user's function gives."""
    load_torch()
    load_trainer()
    from .session import Session

    return Session(section())


def rank(words, session=None):
    """Runs a rank to its end; returns its exit code."""
    try:
        session = session or prepare()
        session.serve_workers()
    except Refused as error:
        say(error)
        return USAGE
    except failure.UserFailure as error:
        say(error)
        return USER
    return load_trainer().main(session, words)
