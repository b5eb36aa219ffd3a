"""A small BERT of Hugging Face that learns whether a sentence praises: sentences made on the spot. Needs transformers."""

import random

import torch
from transformers import BertConfig, BertForSequenceClassification

WORDS = {
    "thing": ["film", "book", "meal", "song", "game", "room"],
    "good": ["fine", "great", "lovely", "clever", "warm"],
    "bad": ["dull", "poor", "awful", "clumsy", "cold"],
    "very": ["very", "rather", "truly", "so"],
}
SPELLED = ["[pad]", "[cls]", "the", "was", "not", "and"] + [word for words in WORDS.values() for word in words]
NUMBERS = {word: number for number, word in enumerate(SPELLED)}
LENGTH = 16


def sentence(seed):
    """Words, and 1 where they praise: "not" turns a word round."""
    chance = random.Random(seed)
    praise = chance.random() < 0.5
    words = ["the", chance.choice(WORDS["thing"]), "was"]
    for _ in range(chance.randrange(1, 3)):
        turned = chance.random() < 0.4
        words += (["not"] if turned else []) + [chance.choice(WORDS["very"])]
        words += [chance.choice(WORDS["good" if praise != turned else "bad"]), "and"]
    return words[:-1], int(praise)


class Sentences(torch.utils.data.Dataset):
    def __init__(self, first, count):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        words, praise = sentence(self.first + index)
        ids = [NUMBERS["[cls]"]] + [NUMBERS[word] for word in words]
        ids = (ids + [0] * LENGTH)[:LENGTH]
        text = torch.tensor(ids)
        return {"input_ids": text, "attention_mask": (text > 0).long(), "labels": praise}


def accuracy(logits, fields):
    return (logits.argmax(1) == fields["labels"]).sum(), len(logits)


def build(layers=2, width=64, sentences=2000):
    config = BertConfig(
        vocab_size=len(SPELLED), hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * width, max_position_embeddings=LENGTH, num_labels=2,
    )
    return dict(
        model=lambda: BertForSequenceClassification(config), metrics={"acc": accuracy},
        train=Sentences(0, sentences), val=Sentences(10**6, 200),
    )
