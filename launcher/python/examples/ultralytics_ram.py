"""ultralytics with cache="ram", one copy of the pictures for all processes of the node: the patch is the function `patch`.

    python ultralytics_ram.py plain      # as it is: every process holds all pictures
    python ultralytics_ram.py            # patched
"""

import os
import sys
import tempfile

import numpy as np
from PIL import Image


def patch():
    """Pictures come from the node's cache, each decoded and resized once; nothing is loaded ahead."""
    from ultralytics.data.base import BaseDataset

    import headroom_train as headroom

    cache, load = headroom.Cache("pictures"), BaseDataset.load_image

    def once(self, index, rect_mode=True):
        def decode():
            made = load(self, index, rect_mode)
            self.ims[index] = None
            return made

        return cache.get_or((self.im_files[index], self.imgsz, rect_mode), decode, copy=True)

    BaseDataset.load_image, BaseDataset.cache_images = once, lambda self: None


def pictures(folder, count):
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        os.makedirs(os.path.join(folder, kind, "train"))
    for number in range(count):
        pixels = np.zeros((160, 160, 3), np.uint8)
        x, y, size = random.integers(20, 100, 3)
        pixels[y: y + size // 2, x: x + size // 2] = random.integers(80, 255, 3)
        Image.fromarray(pixels).save(os.path.join(folder, "images", "train", f"{number}.png"))
        box = [(x + size / 4) / 160, (y + size / 4) / 160, size / 320, size / 320]
        with open(os.path.join(folder, "labels", "train", f"{number}.txt"), "w") as file:
            file.write("0 " + " ".join(f"{value:.5f}" for value in box) + "\n")
    path = os.path.join(folder, "data.yaml")
    with open(path, "w") as file:
        file.write(f"path: {folder}\ntrain: images/train\nval: images/train\nnames: {{0: square}}\n")
    return path


def main(plain):
    from ultralytics import YOLO

    if not plain:
        patch()
    with tempfile.TemporaryDirectory() as folder:
        model = YOLO("yolov8n.yaml", verbose=False)
        model.train(data=pictures(folder, 32), epochs=2, imgsz=64, batch=8, cache="ram", device="cpu", workers=0, seed=3, plots=False,
                    val=False, save=False, verbose=False, amp=False, project=folder, exist_ok=True)
        losses = model.trainer.tloss
        losses = [float(value) for value in (losses.values() if isinstance(losses, dict) else losses)]
    print("losses", " ".join(f"{value:.6f}" for value in losses))
    if not plain:
        import headroom_train as headroom

        print(f"{headroom.stats()['node_decodes']} pictures decoded on this node")


if __name__ == "__main__":
    main("plain" in sys.argv[1:])
