"""The Python package's wheel in fresh environments: seconds from `pip install` to a protected run of 3 ranks, and its own tests.

usage: scripts/bench wheel [--pythons python3.9,python3.13] [--numpy "numpy<2"] [--torch] [--tests] [--wheel FILE]
"""

import argparse
import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PACKAGE = os.path.join(ROOT, "launcher", "python")

TRAIN = """
import sys
import numpy as np
import headroom_train as headroom
class Data:
    def __len__(self): return 300
    def __getitem__(self, i): return np.full(16384, i, np.float32), i
loader = headroom.DataLoader(headroom.cached(Data()), batch_size=10, shuffle=True, seed=1, num_workers=1)
for epoch in range(2):
    for step, (x, y) in enumerate(loader):
        headroom.report(epoch * 10 + step, loss=0.5, samples=30)
loader.close()
print("rank", loader.rank, "of", loader.world_size, "decoded", loader.decodes, "hosts", headroom.stats()["hosts"])
"""


def pythons(wanted):
    """Interpreters by name: of this system, or of pyenv."""
    for name in wanted:
        found = shutil.which(name)
        version = name.replace("python", "")
        of_pyenv = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))
        path = of_pyenv[-1] if of_pyenv else found
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            yield name, path
        else:
            print(f"{name}: not here")


def one(name, python, wheel, args):
    with tempfile.TemporaryDirectory() as folder:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HEADROOM"))}
        subprocess.run([python, "-m", "venv", "venv"], cwd=folder, check=True)
        own = os.path.join(folder, "venv", "bin")
        with open(os.path.join(folder, "train.py"), "w") as file:
            file.write(TRAIN)
        began = time.perf_counter()
        pip = [os.path.join(own, "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, wheel, args.numpy], check=True, env=env)
        installed = time.perf_counter()
        line = [os.path.join(own, "launch"), "--gpus", "3", "--cache", "64MiB", "--exec", os.path.join(own, "python"), "train.py"]
        ran = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)
        done = time.perf_counter()
        decoded = sum(int(words.split("decoded ")[1].split()[0]) for words in ran.stdout.splitlines() if "decoded " in words)
        good = ran.returncode == 0 and decoded == 300
        version = subprocess.run([os.path.join(own, "python"), "-c", "import numpy; print(numpy.__version__)"], env=env,
                                 capture_output=True, text=True).stdout.strip()
        print(f"{name}, numpy {version}: pip install {installed - began:.1f} s, 3 ranks {done - installed:.1f} s, together "
              f"{done - began:.1f} s: {'good' if good else ran.stdout + ran.stderr}", flush=True)
        if args.torch:
            subprocess.run([*pip, "torch"], check=True, env=env)
            version = subprocess.run([os.path.join(own, "python"), "-c", "import torch; print(torch.__version__)"], env=env,
                                     capture_output=True, text=True).stdout.strip()
            print(f"{name}: torch {version}", flush=True)
        if args.tests:
            subprocess.run([*pip, "h5py", "pillow"], check=True, env=env)
            for part in ("tests", "examples"):
                shutil.copytree(os.path.join(PACKAGE, part), os.path.join(folder, part))
            shutil.copy(os.path.join(PACKAGE, "README.md"), folder)
            run = subprocess.run([os.path.join(own, "python"), "tests/run.py"], cwd=folder, env=env, capture_output=True, text=True)
            failed = [text for text in run.stdout.splitlines() if text.startswith("FAILED")]
            print(f"{name}: {run.stdout.splitlines()[-1]} {' '.join(failed)}", flush=True)
            good = good and run.returncode == 0
        return good


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pythons", default="python3.9,python3.11,python3.13")
    parser.add_argument("--numpy", default="numpy", help="as pip takes it, such as numpy<2")
    parser.add_argument("--torch", action="store_true", help="with the newest PyTorch (GB)")
    parser.add_argument("--tests", action="store_true", help="run the package's tests as well")
    parser.add_argument("--wheel", help="this one, instead of building it")
    args = parser.parse_args()
    wheel = args.wheel
    if wheel is None:
        built = subprocess.run([os.path.join(ROOT, "scripts", "package")], stdout=subprocess.PIPE, text=True, check=True)
        wheel = os.path.join(ROOT, built.stdout.splitlines()[-1])
    print(f"{os.path.basename(wheel)}: {os.path.getsize(wheel) / 1e6:.1f} MB")
    outcomes = [one(name, path, wheel, args) for name, path in pythons(args.pythons.split(","))]
    return 0 if outcomes and all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
