"""The TDS-LSTM as a PyTorch user would write it: what `src/task/emg` must equal, and what its speed is measured against.

Names in `state_dict()` are the names of Headroom's checkpoints. Run as a program it times forward + backward:

    emg_torch.py --config default --batch 32 --steps 10
"""

import argparse
import json
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SAMPLING_RATE = 2000.0

# (conv kernel, conv stride, blocks, channels, width, time kernel) per stage; LSTM hidden, layers.
CONFIGS = {
    "default": dict(stages=[(5, 2, 2, 8, 4, 21), (5, 2, 2, 8, 8, 11)], hidden=128, layers=2),
    "high_performance": dict(
        stages=[(7, 2, 2, 8, 8, 21), (5, 2, 2, 8, 8, 11), (3, 2, 2, 8, 8, 7)], hidden=256, layers=3
    ),
    "quick_demo": dict(stages=[(5, 4, 1, 4, 4, 11)], hidden=64, layers=1),
}


class TdsConv(nn.Module):
    """Convolution over time inside each group of `width`; residual; LayerNorm. `[B, C, T]` to the same."""

    def __init__(self, channels, width, kernel):
        super().__init__()
        self.channels, self.width, self.kernel = channels, width, kernel
        self.conv = nn.Conv2d(channels, channels, (1, kernel))
        self.norm = nn.LayerNorm(channels * width)

    def forward(self, x):
        b, c, t = x.shape
        left = (self.kernel - 1) // 2
        y = F.pad(x.view(b, self.channels, self.width, t), (left, self.kernel - 1 - left))
        y = F.relu(self.conv(y)).reshape(b, c, t) + x
        return self.norm(y.transpose(1, 2)).transpose(1, 2).contiguous()


class FcBlock(nn.Module):
    """Linear, ReLU, Linear; residual; LayerNorm. `[B, C, T]` to the same."""

    def __init__(self, features):
        super().__init__()
        self.linear1 = nn.Linear(features, features)
        self.linear2 = nn.Linear(features, features)
        self.norm = nn.LayerNorm(features)

    def forward(self, x):
        x = x.transpose(1, 2)
        return self.norm(self.linear2(F.relu(self.linear1(x))) + x).transpose(1, 2).contiguous()


class Block(nn.Module):
    def __init__(self, channels, width, kernel):
        super().__init__()
        self.tds = TdsConv(channels, width, kernel)
        self.fc = FcBlock(channels * width)

    def forward(self, x):
        return self.fc(self.tds(x))


class Stage(nn.Module):
    def __init__(self, inputs, kernel, stride, blocks, channels, width, time_kernel, dropout):
        super().__init__()
        features = channels * width
        self.conv = nn.Conv1d(inputs, features, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.LayerNorm(features)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(channels, width, time_kernel) for _ in range(blocks))

    def forward(self, x):
        x = self.norm(self.conv(x).transpose(1, 2)).transpose(1, 2)
        x = self.dropout(F.relu(x)).contiguous()
        for block in self.blocks:
            x = block(x)
        return x


class Encoder(nn.Module):
    def __init__(self, inputs, stages, dropout):
        super().__init__()
        self.stages = nn.ModuleList()
        for kernel, stride, blocks, channels, width, time_kernel in stages:
            self.stages.append(Stage(inputs, kernel, stride, blocks, channels, width, time_kernel, dropout))
            inputs = channels * width
        self.features = inputs

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


class LstmDecoder(nn.Module):
    def __init__(self, inputs, outputs, hidden, layers):
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, layers, batch_first=True)
        self.activation = nn.LeakyReLU(0.1)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x, state):
        y, state = self.lstm(x.unsqueeze(1), state)
        return self.head(self.activation(y.squeeze(1))), state


class MlpDecoder(nn.Module):
    def __init__(self, inputs, outputs, hidden):
        super().__init__()
        sizes = [inputs, *hidden]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:]))
        self.activation = nn.LeakyReLU(0.1)
        self.head = nn.Linear(sizes[-1], outputs)

    def forward(self, x, state):
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.head(x), state


class EmgModel(nn.Module):
    """EMG `[B, T, 16]` to joint angles `[B, T, 20]` in radians."""

    def __init__(self, stages, hidden=128, layers=2, mlp=None, inputs=16, outputs=20, dropout=0.1,
                 state_condition=True, velocity=False, scale=1.0, rollout_freq=50.0):
        super().__init__()
        self.encoder = Encoder(inputs, stages, dropout)
        decoder_inputs = self.encoder.features + (outputs if state_condition else 0)
        if mlp is None:
            self.decoder = LstmDecoder(decoder_inputs, outputs, hidden, layers)
        else:
            self.decoder = MlpDecoder(decoder_inputs, outputs, mlp)
        self.outputs, self.state_condition = outputs, state_condition
        self.velocity, self.scale, self.rollout_freq = velocity, scale, rollout_freq

    def forward(self, emg):
        window = emg.shape[1]
        steps = max(1, round(window / SAMPLING_RATE * self.rollout_freq))
        features = self.encoder(emg.transpose(1, 2).contiguous())
        features = F.interpolate(features, size=steps, mode="linear", align_corners=True)
        pose = emg.new_zeros(emg.shape[0], self.outputs)
        state, poses = None, []
        for step in range(steps):
            x = features[:, :, step]
            if self.state_condition:
                x = torch.cat([x, pose], dim=1)
            output, state = self.decoder(x, state)
            output = output * self.scale
            pose = pose + output if self.velocity else output
            poses.append(pose)
        poses = torch.stack(poses, dim=2)
        return F.interpolate(poses, size=window, mode="linear", align_corners=True).transpose(1, 2)


def loss_fn(prediction, target, kind="mse+mae", mae_weight=0.5):
    """Mean over all elements."""
    mse, mae = F.mse_loss(prediction, target), F.l1_loss(prediction, target)
    return {"mse": mse, "mae": mae, "mse+mae": mse + mae_weight * mae}[kind]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="default", choices=CONFIGS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--window", type=int, default=500)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = EmgModel(**CONFIGS[args.config])
    emg = torch.randn(args.batch, args.window, 16)
    target = torch.randn(args.batch, args.window, 20) * 0.3
    times = []
    for _ in range(args.steps + 3):
        start = time.perf_counter()
        model.zero_grad(set_to_none=False)
        loss_fn(model(emg), target).backward()
        times.append(time.perf_counter() - start)
    median = sorted(times[3:])[args.steps // 2]
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"config": args.config, "batch": args.batch, "parameters": parameters,
                      "ms": round(median * 1e3, 3), "samples_per_s": round(args.batch / median, 1)}))


if __name__ == "__main__":
    main()
