"""What the benches share: running a job while adding up its memory, medians, tables."""

import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RELEASE = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]
REFERENCE = Path(__file__).parent / "reference"


def tree(pid):
    """pid and all its descendants, as far as they can be seen."""
    children = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parent = int(file.read().rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry))
            except (OSError, ValueError, IndexError):
                pass
    found, queue = [], [pid]
    while queue:
        at = queue.pop()
        found.append(at)
        queue += children.get(at, [])
    return found


def pss_bytes(pid):
    """Proportional set size of one process; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class Job:
    """Runs a command to its end; samples the sum of PSS over its processes, at most for a twentieth of the time:
    the kernel walks all page tables for it, which takes cores from what is measured."""

    def __init__(self, command, **options):
        self.peak_bytes, self.samples, self.watched = 0, [], True
        self.started = time.time()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def _watch(self):
        while self.process.poll() is None:
            if not self.watched:
                time.sleep(0.1)
                continue
            start = time.time()
            total = sum(pss_bytes(pid) for pid in tree(self.process.pid))
            self.peak_bytes = max(self.peak_bytes, total)
            self.samples.append(total)
            time.sleep(max(0.1, 19 * (time.time() - start)))

    def wait(self):
        """Standard output, after a check that all went well."""
        out, err = self.process.communicate()
        self.wall_s = time.time() - self.started
        if self.process.returncode != 0:
            sys.exit(f"{self.process.args} ended with {self.process.returncode}\n{out}\n{err}")
        self.stdout, self.stderr = out, err
        return out


def has(python, package):
    """True if an interpreter can import `package`."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{package}') is None)"
    return subprocess.run([python, "-c", look], capture_output=True).returncode == 0


def median(values):
    return statistics.median(values)


def table(head, rows):
    cells = [head] + [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for number, row in enumerate(cells):
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))))
        if number == 0:
            print("  ".join("-" * width for width in widths))


STARTED = time.time()


def say(text):
    """Shows on stderr what the bench is doing, with the seconds since its start."""
    print(f"[{time.time() - STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


class Rows:
    """A table that prints each row as soon as it is known. `first` is the width of the first column."""

    def __init__(self, head, first):
        self.widths = [first] + [max(10, len(cell)) for cell in head[1:]]
        self.add(head)
        print("  ".join("-" * width for width in self.widths), flush=True)

    def add(self, row):
        cells = zip(map(str, row), self.widths)
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(cells)), flush=True)


def sample_data(folder, layout, sessions=12, seconds=20):
    """The EMG sample data in `layout` (`contiguous` or `gzip`), made once."""
    if not folder.exists():
        say(f"making sample data in {folder}")
        subprocess.run([RELEASE / "launch", "sample-data", "--task", "emg", "--out", folder, "--layout", layout,
                        "--sessions", str(sessions), "--seconds", str(seconds)], check=True)
    return folder
