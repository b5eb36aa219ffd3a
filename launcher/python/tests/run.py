"""Runs the package's tests: python tests/run.py [MODULE or MODULE.TEST]...

Every test is a function `test_*` of a module `check_*.py` here, and runs in a process of its own, because each has a cache of its own.
"""

import concurrent.futures
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
# Far beyond what any of them takes; only a hang reaches it.
HANG_S = 120
# Tests wait more than they compute.
AT_ONCE = 3


def names(wanted):
    for file in sorted(os.listdir(HERE)):
        if not (file.startswith("check_") and file.endswith(".py")):
            continue
        module = importlib.import_module(file[:-3])
        for name in vars(module):
            full = f"{file[6:-3]}.{name[5:]}"
            if name.startswith("test_") and (not wanted or any(full == word or full.split(".")[0] == word for word in wanted)):
                yield full


def run_one(full):
    module, name = full.split(".")
    getattr(importlib.import_module(f"check_{module}"), f"test_{name}")()


def start(full):
    return subprocess.Popen(
        [sys.executable, os.path.join(HERE, "run.py"), "--one", full], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )


def outcome(full):
    """Runs one test: its name, whether it passed, seconds, output."""
    at, child = time.time(), start(full)
    try:
        output, _ = child.communicate(timeout=HANG_S)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        output += f"\nhangs: killed after {HANG_S} s"
    return full, child.returncode == 0, time.time() - at, output


def main(words):
    sys.path.insert(0, HERE)
    if words[:1] == ["--one"]:
        try:
            run_one(words[1])
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
            sys.exit(1)
        return 0
    failed, count, began = 0, 0, time.time()
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for full, good, took, output in pool.map(outcome, list(names(words))):
            count, failed = count + 1, failed + (not good)
            print(f"{'ok    ' if good else 'FAILED'} {full} ({took:.1f} s)", flush=True)
            if not good:
                print("    " + output.replace("\n", "\n    "), flush=True)
    print(f"{count - failed} passed, {failed} failed in {time.time() - began:.1f} s")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
