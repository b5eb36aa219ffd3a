"""The examples of README.md run as they stand."""

import os
import re
import sys

import numpy as np

from helpers import HAS_TORCH, headroom

README = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "README.md")


class MyDataset:
    def __len__(self):
        return 200

    def __getitem__(self, index):
        return np.full(8, index, np.float32), index


def examples():
    with open(README, encoding="utf-8") as file:
        text = file.read()
    parts = re.split(r"^### (\d)\..*$", text, flags=re.MULTILINE)
    return {int(number): "\n".join(re.findall(r"```python\n(.*?)```", body.split("\n## ")[0], re.DOTALL))
            for number, body in zip(parts[1::2], parts[2::2])}


def space():
    """What the examples take for granted."""
    seen = []

    def train(x, y):
        assert (np.asarray(x)[:, 0] == np.asarray(y)).all()
        seen.extend(int(one) for one in y)
        return float(np.asarray(x).mean())

    return seen, dict(
        headroom=headroom, MyDataset=MyDataset, augment=lambda sample: sample, train=train, dataset=MyDataset(),
        decode=lambda path: np.arange(12.0),
    )


def test_every_example_runs():
    found = examples()
    assert sorted(found) == [1, 2, 3, 4, 5], sorted(found)
    seen, names = space()
    exec(found[1], names)
    assert sorted(seen) == sorted(list(range(200)) * 3)
    seen.clear()
    exec(found[2], names)
    assert sorted(seen) == sorted(list(range(200)) * 2)
    exec(found[4], names)
    assert names["view"].flags.writeable is False and names["own"].sum() == 66
    seen.clear()
    exec(found[5], names)
    assert sorted(seen) == list(range(200))
    names["loader"].close()
    if HAS_TORCH:
        seen.clear()
        exec(found[3], names)
        assert sorted(seen) == list(range(200)) and names["state"]["position"] == 200
