"""Hugging Face's Trainer with a data set whose tokens are made once per node: the line with `headroom` is what was added.

    python bert.py
    launch --gpus 2 --cache 64MiB --exec python bert.py
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import headroom_train as headroom


class Sentences(torch.utils.data.Dataset):
    """Rows of token numbers, and whether there is a 7 among them."""

    def __len__(self):
        return 256

    def __getitem__(self, index):
        ids = torch.randint(5, 30, (24,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int((ids == 7).any())}


if __name__ == "__main__":
    config = BertConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=3, per_device_train_batch_size=16, learning_rate=1e-3, report_to=[], save_strategy="no",
            dataloader_num_workers=1, use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=1,
        )
        data = headroom.cached(Sentences(), name="sentences")
        trained = Trainer(BertForSequenceClassification(config), arguments, train_dataset=data).train()
    print(f"loss {trained.training_loss:.4f}, {headroom.stats()['node_decodes']} decodes on this node", flush=True)
