"""PyTorch's side of scripts/check-gpu: the same steps on the same machine; prints one line of JSON.

    gpu_torch.py emg --mode eager|ddp|graph --amp off|bf16 --batch 64 --steps 60
    gpu_torch.py net --mode plain|ddp --amp off|fp16 --width 4096 --batch 512 --layers 8 --steps 30
    gpu_torch.py serve     reads such words as lines of JSON, one list each, and answers each with a line
    gpu_torch.py replay --weights W.safetensors --batches FOLDER --steps 50 --out OUT.safetensors
"""

import argparse
import contextlib
import json
import struct
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from emg_torch import CONFIGS, EmgModel, loss_fn

GROUP = 5
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, amp):
    return contextlib.nullcontext() if amp == "off" else torch.autocast(device.type, KINDS[amp])


def timed(device, steps, step):
    """Median milliseconds of a step over groups, the device waited for around each group."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    for _ in range(GROUP):
        step()
    times = []
    for _ in range(max(1, steps // GROUP)):
        wait()
        start = time.perf_counter()
        for _ in range(GROUP):
            step()
        wait()
        times.append((time.perf_counter() - start) * 1e3 / GROUP)
    return sorted(times)[len(times) // 2]


def wrapped(model, device):
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore())
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def emg(args, device):
    torch.manual_seed(0)
    model = EmgModel(**CONFIGS["default"]).to(device)
    if args.mode == "ddp":
        model = wrapped(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01, fused=True,
                                  capturable=args.mode == "graph")
    x = torch.randn(args.batch, args.window, 16, device=device)
    y = torch.randn(args.batch, args.window, 20, device=device) * 0.3

    def step():
        optimizer.zero_grad(set_to_none=args.mode != "graph")
        with autocast(device, args.amp):
            loss = loss_fn(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    if args.mode == "graph":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return timed(device, args.steps, graph.replay)
    return timed(device, args.steps, step)


def net(args, device):
    torch.manual_seed(1)
    layers = [torch.nn.Linear(args.width, args.width, bias=False) for _ in range(args.layers)]
    model = torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.ReLU())]).to(device)
    if args.mode == "ddp":
        model = wrapped(model, device)
    x = torch.randn(args.batch, args.width, device=device)

    def step():
        with autocast(device, args.amp):
            loss = model(x).float().square().mean()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=1e-3)
                p.grad.zero_()

    return timed(device, args.steps, step)


def read_safetensors(path):
    """Without the package, which a machine may lack."""
    data = Path(path).read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    head = json.loads(data[8 : 8 + size])
    kinds = {"F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}
    tensors = {}
    for name, entry in head.items():
        if name != "__metadata__":
            first, last = (8 + size + at for at in entry["data_offsets"])
            flat = torch.frombuffer(bytearray(data[first:last]), dtype=kinds[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


def write_safetensors(tensors, path):
    head, body = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.detach().cpu().contiguous().numpy().tobytes()
        head[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    head = json.dumps(head).encode()
    Path(path).write_bytes(struct.pack("<Q", len(head)) + head + body)


def replay(args, device):
    """Trains on batches that Headroom wrote, all ranks' parts of a step as one: what DDP's mean of gradients is."""
    torch.backends.cudnn.allow_tf32 = False
    model = EmgModel(**json.loads(args.model)).to(device)
    model.load_state_dict(read_safetensors(args.weights))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    for step in range(args.steps):
        parts = [read_safetensors(path) for path in sorted(Path(args.batches).glob(f"step{step}-rank*.safetensors"))]
        x = torch.cat([part["emg"] for part in parts]).to(device)
        y = torch.cat([part["joint_angles"] for part in parts]).to(device)
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    write_safetensors(model.state_dict(), args.out)
    return 0.0


def serve():
    """One interpreter for all comparisons: starting one costs seconds, and its first use of the device as many."""
    for line in sys.stdin:
        try:
            answer = answered(json.loads(line))
        except Exception as error:  # noqa: BLE001: the next request may do better
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def main():
    if sys.argv[1:] == ["serve"]:
        return serve()
    print(json.dumps(answered(sys.argv[1:])), flush=True)


def answered(words):
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["emg", "net", "replay"])
    parser.add_argument("--mode", default="eager")
    parser.add_argument("--amp", default="off")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--window", type=int, default=500)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--weights")
    parser.add_argument("--batches")
    parser.add_argument("--model")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--out")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(words)
    device = torch.device("cpu" if args.cpu else "cuda")
    return {"ms": {"emg": emg, "net": net, "replay": replay}[args.what](args, device)}


if __name__ == "__main__":
    main()
