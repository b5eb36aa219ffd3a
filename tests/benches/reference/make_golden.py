"""Writes tests/fixtures/emg_golden.safetensors: weights, inputs, predictions, losses and all gradients of small models.

`src/task/emg/tests.rs` holds Headroom's model to these values. Names: `<case>/param/<name>`, `<case>/grad/<name>`,
`<case>/emg`, `<case>/target`, `<case>/prediction`, `<case>/loss`.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from emg_torch import CONFIGS, EmgModel, loss_fn

# Window, batch, loss, arguments of EmgModel. Odd windows, an even kernel and few frames are there on purpose.
CASES = {
    "quick_demo": (500, 2, "mse+mae", CONFIGS["quick_demo"]),
    "velocity": (203, 3, "mae", dict(stages=[(5, 2, 2, 4, 3, 21), (3, 2, 1, 2, 5, 4)], hidden=12, layers=2,
                                     velocity=True, scale=0.1)),
    "mlp": (160, 2, "mse", dict(stages=[(4, 3, 1, 3, 2, 5)], mlp=[10, 6])),
    "unconditioned": (121, 2, "mse+mae", dict(stages=[(7, 2, 1, 2, 3, 3)], hidden=8, layers=2,
                                              state_condition=False, scale=0.5)),
}


def main():
    out = {}
    for seed, (name, (window, batch, loss_kind, arguments)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = EmgModel(dropout=0.0, **arguments)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".norm." in key:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        emg = torch.randn(batch, window, 16)
        target = torch.randn(batch, window, 20) * 0.5
        prediction = model(emg)
        loss = loss_fn(prediction, target, loss_kind)
        loss.backward()
        for key, parameter in model.named_parameters():
            out[f"{name}/param/{key}"] = parameter.detach().clone()
            out[f"{name}/grad/{key}"] = parameter.grad
        values = dict(emg=emg, target=target, prediction=prediction.detach(), loss=loss.detach())
        out.update({f"{name}/{key}": value for key, value in values.items()})
    path = Path(__file__).resolve().parents[2] / "fixtures" / "emg_golden.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in out.items()}, path)
    print(path.name, path.stat().st_size, "bytes,", len(out), "tensors")


if __name__ == "__main__":
    main()
