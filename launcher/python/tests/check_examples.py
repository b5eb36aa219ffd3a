"""The examples as whole programs, each where the packages are installed that it wants."""

import os
import re
import subprocess
import sys
import tempfile

import helpers
from helpers import HERE

EXAMPLES = os.path.join(HERE, "..", "examples")


def has(*names):
    return all(map(helpers.has, names))


def output(*words):
    """What an example prints; the last word names its file, or is its argument. It must end well."""
    words = [os.path.join(EXAMPLES, word) if word.endswith(".py") else word for word in words]
    with tempfile.TemporaryDirectory() as folder:
        env = dict(os.environ, PYTHONPATH=os.path.abspath(os.path.join(HERE, "..")), OMP_NUM_THREADS="1", YOLO_OFFLINE="true",
                   YOLO_AUTOINSTALL="false", YOLO_CONFIG_DIR=folder)
        ran = subprocess.run([sys.executable, *words], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             timeout=100)
        assert ran.returncode == 0, ran.stdout
        return ran.stdout


def decodes(text):
    return {int(number) for number in re.findall(r"(\d+) (?:decodes|pictures decoded) on this node", text)}


def test_ddp_under_torchrun():
    if has("torch"):
        text = output("-m", "torch.distributed.run", "--nproc-per-node", "2", "ddp.py")
        losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
        assert decodes(text) == {512} and len(losses) == 2 and max(losses) < 0.5, text


def test_lightning_with_two_processes():
    if has("lightning"):
        text = output("lightning_module.py")
        assert decodes(text) == {256} and "rank 1: 24 steps" in text, text


def test_a_trainer_of_hugging_face():
    if has("transformers", "accelerate"):
        assert decodes(output("bert.py")) == {256}


def test_ultralytics_learns_the_same_from_the_nodes_pictures():
    if has("ultralytics"):
        losses = lambda text: re.findall(r"losses (.*)", text)
        patched, plain = output("ultralytics_ram.py"), output("ultralytics_ram.py", "plain")
        assert decodes(patched) == {32} and losses(patched) == losses(plain) != [], (patched, plain)
