"""A LightningDataModule whose samples are decoded once per node: the two lines with `headroom` are what was added.

    python lightning_module.py
    launch --cache 64MiB --exec python lightning_module.py
"""

import lightning
import torch

import headroom_train as headroom


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 256

    def __getitem__(self, index):
        x = torch.linspace(0, 1, 16) * (index % 16)
        return x, (x * x).mean().reshape(1)


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        data = headroom.cached(Squares())
        return headroom.DataLoader(data, batch_size=16, shuffle=True, seed=1, num_workers=1)


class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.mse_loss(self.layers(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


if __name__ == "__main__":
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, use_distributed_sampler=False,
    )
    trainer.fit(Model(), datamodule=Data())
    print(f"rank {trainer.global_rank}: {trainer.global_step} steps, {headroom.stats()['node_decodes']} decodes on this node", flush=True)
