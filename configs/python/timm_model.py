"""Any classifier of timm by its name, on pictures of stripes made when they are read. Needs timm."""

import timm
import torch
import torch.nn.functional as F


class Stripes(torch.utils.data.Dataset):
    """Noisy stripes u8 `[3, side, side]` in one of four directions."""

    def __init__(self, first, count, side):
        self.first, self.count, self.side = first, count, side

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(self.first + index)
        label = index % 4
        y, x = torch.meshgrid(torch.arange(self.side), torch.arange(self.side), indexing="ij")
        wave = torch.sin([x, y, x + y, x - y][label] * 0.8 + 6 * torch.rand((), generator=draw))
        picture = 128 + 60 * wave + 40 * torch.randn(3, self.side, self.side, generator=draw)
        return picture.clamp(0, 255).to(torch.uint8), label


class Net(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.body = timm.create_model(name, num_classes=4)

    def forward(self, pictures, labels):
        prediction = self.body(pictures.float() / 127.5 - 1)
        return F.cross_entropy(prediction, labels, label_smoothing=0.1), prediction


def build(name="resnet10t", side=64, samples=800):
    metrics = {"acc": lambda p, x, y: ((p.argmax(1) == y).sum(), len(y))}
    return dict(
        model=lambda: Net(name), train=Stripes(0, samples, side), val=Stripes(10**6, 200, side), metrics=metrics,
    )
