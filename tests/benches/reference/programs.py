"""Programs of PyTorch users, as they are and with the lines that bring Headroom's cache: two processes each.

    programs.py KIND plain|headroom FOLDER

KIND: ddp (torch.distributed.run starts it twice), lightning, bert (Hugging Face's Trainer, likewise), ultralytics (starts itself twice).
Samples take memory that matters. As it is, each process keeps what it has decoded, as people do: a dictionary, or `cache="ram"`.
At the end of its first epoch a process leaves FOLDER/warm-PID and waits for FOLDER/go; at its end it prints `ended KIND`.
"""

import os
import subprocess
import sys
import time

import numpy as np
import torch

KIND, HOW, FOLDER = sys.argv[1:4]
SAMPLES, EPOCHS, SIDE = 1000, 3, 320
PICTURES = 400

if HOW == "headroom":
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "..", "launcher", "python"))
    import headroom_train as headroom


class Features(torch.utils.data.Dataset):
    """256 KiB of features and a target; kept by the process where nothing else keeps them."""

    def __init__(self, shape):
        self.shape, self.kept = shape, {}

    def __len__(self):
        return SAMPLES

    def made(self, index):
        values = np.random.default_rng(index).standard_normal(self.shape, dtype=np.float32)
        return torch.from_numpy(values), torch.tensor([float(values.mean())])

    def __getitem__(self, index):
        if HOW == "headroom":
            return self.made(index)
        if index not in self.kept:
            self.kept[index] = self.made(index)
        return self.kept[index]


class Sentences(Features):
    def made(self, index):
        features, target = super().made(index)
        return {"inputs_embeds": features, "labels": (target > 0).long()[0]}


def warm():
    """Between the first epoch and the second: whoever watches makes memory short now."""
    open(os.path.join(FOLDER, f"warm-{os.getpid()}"), "w").close()
    while not os.path.exists(os.path.join(FOLDER, "go")):
        time.sleep(0.05)


def ddp():
    import torch.distributed as dist
    from torch.utils.data import DataLoader, DistributedSampler

    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(65536, 1))
    optimizer, data = torch.optim.SGD(model.parameters(), 1e-3), Features(65536)
    sampler = None
    if HOW == "headroom":
        loader = headroom.DataLoader(headroom.cached(data), batch_size=10, shuffle=True, num_workers=1)
    else:
        sampler = DistributedSampler(data, shuffle=True)
        loader = DataLoader(data, batch_size=10, sampler=sampler)
    for epoch in range(EPOCHS):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        if epoch == 0:
            warm()
    dist.destroy_process_group()


def lightning():
    import lightning as L

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            if HOW == "headroom":
                return headroom.DataLoader(headroom.cached(Features(65536)), batch_size=10, shuffle=True, num_workers=1)
            return torch.utils.data.DataLoader(Features(65536), batch_size=10, shuffle=True)

    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(65536, 1)

        def training_step(self, batch, index):
            return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                warm()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=EPOCHS, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=HOW == "plain")
    trainer.fit(Model(), datamodule=Data())


def bert():
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    class Warm(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            if round(state.epoch) == 1:
                warm()

    config = BertConfig(vocab_size=32, hidden_size=256, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    arguments = TrainingArguments(
        os.path.join(FOLDER, "bert"), num_train_epochs=EPOCHS, per_device_train_batch_size=10, report_to=[], save_strategy="no",
        use_cpu=True, ddp_backend="gloo", disable_tqdm=True, logging_strategy="no",
    )
    data = Sentences((256, 256))
    if HOW == "headroom":
        data = headroom.cached(data)
    Trainer(BertForSequenceClassification(config), arguments, train_dataset=data, callbacks=[Warm()]).train()


def pictures():
    """As many JPEG files, made once."""
    from PIL import Image

    for kind in ("images", "labels"):
        os.makedirs(os.path.join(FOLDER, kind, "train"))
    for number in range(PICTURES):
        made = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(made).resize((SIDE, SIDE)).save(os.path.join(FOLDER, "images", "train", f"{number}.jpg"), quality=90)
        with open(os.path.join(FOLDER, "labels", "train", f"{number}.txt"), "w") as file:
            file.write("0 0.5 0.5 0.3 0.3\n")
    with open(os.path.join(FOLDER, "data.yaml"), "w") as file:
        file.write(f"path: {FOLDER}\ntrain: images/train\nval: images/train\nnames: {{0: square}}\n")


def ultralytics_one():
    from ultralytics import YOLO

    if HOW == "headroom":
        sys.path.insert(0, os.path.join(os.path.dirname(headroom.__file__), "..", "examples"))
        import ultralytics_ram

        ultralytics_ram.patch()
    model = YOLO("yolov8n.yaml", verbose=False)
    model.add_callback("on_train_epoch_end", lambda trainer: warm() if trainer.epoch == 0 else None)
    model.train(data=os.path.join(FOLDER, "data.yaml"), epochs=2, imgsz=SIDE, batch=4, cache="ram", device="cpu", workers=0, seed=3,
                plots=False, val=False, save=False, verbose=False, amp=False, project=os.path.join(FOLDER, str(os.getpid())), exist_ok=True,
                optimizer="SGD", freeze=20, mosaic=0.0)


def ultralytics():
    """Two processes of the one program, each with all pictures."""
    pictures()
    ranks = [subprocess.Popen([sys.executable, __file__, "ultralytics_one", HOW, FOLDER],
                              env={**os.environ, "RANK": "-1", "HEADROOM_BENCH": str(n)}) for n in range(2)]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        sys.exit(f"processes of ultralytics ended with {codes}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"ddp": ddp, "lightning": lightning, "bert": bert, "ultralytics": ultralytics, "ultralytics_one": ultralytics_one}[KIND]()
    print(f"ended {KIND}", flush=True)
