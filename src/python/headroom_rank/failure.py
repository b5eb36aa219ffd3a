"""Errors of the user's code, told by their place."""

import linecache
import os
import sys
import traceback

_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep


class Refused(Exception):
    """This interpreter cannot train; the text says why and what to do."""


class UserFailure(Exception):
    """One line that ends with the user's file, line and text. `memory`: memory ran out, so that less may do."""

    def __init__(self, text, memory=False):
        super().__init__(text)
        self.memory = memory


def _is_foreign(name):
    """A file of PyTorch, of this package or of the interpreter."""
    torch = sys.modules.get("torch")
    folders = [_OWN, os.path.dirname(os.__file__) + os.sep]
    if torch is not None:
        folders.append(os.path.dirname(os.path.abspath(torch.__file__)) + os.sep)
    return name.startswith("<") or any(os.path.abspath(name).startswith(folder) for folder in folders)


def place_of(error):
    """File, line and text of the user's code where `error` was raised, or was called from."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}:{error.lineno}: {(error.text or '').strip()}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_foreign(frame.filename)] or list(frames)
    if not own:
        return "no line is known"
    last = own[-1]
    line = last.line or linecache.getline(last.filename, last.lineno or 0).strip()
    return f"{last.filename}:{last.lineno}: {line}"


def failed(where, error):
    """The failure to raise in place of `error`; its traceback goes to standard error."""
    if isinstance(error, UserFailure):
        return error
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    message = " ".join(str(error).split())
    torch = sys.modules.get("torch")
    out_of_memory = (MemoryError,) + ((torch.OutOfMemoryError,) if hasattr(torch, "OutOfMemoryError") else ())
    memory = isinstance(error, out_of_memory) or (isinstance(error, RuntimeError) and "can't allocate memory" in message)
    if not memory:
        traceback.print_exception(kind, error, error.__traceback__)
        sys.stderr.flush()
    return UserFailure(f"{where}: {name}: {message}; at {place_of(error)}", memory)
