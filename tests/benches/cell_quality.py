"""Quality of generated cells: the demonstration on several seeds, with an untrained network and plain noise beside it.

usage: scripts/bench cell_quality [--seeds 1,2,3] [--runs DIR]

Each seed trains all stages of configs/cell.yaml on sample data. The untrained network is one step old; plain noise is decoded as it
is. MMD is computed here once more, from generated.h5ad, by another program than the one that wrote metrics.json: with kernels as wide
as the real cells ask for, and as wide as both sets together do, as published scripts take it. The autoencoder's error on all cells, and
on the validation cells alone, stands beside what predicting each cell's type by its mean would leave of the same cells.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import load_file

from common import REFERENCE, RELEASE, ROOT

sys.path.insert(0, str(REFERENCE))
from cell import Autoencoder  # noqa: E402

LAUNCH = RELEASE / "launch"
HIDDEN, LATENT = [128, 128, 128], 16


def launch(runs, name, seed, data, *words):
    command = [LAUNCH, "--config", ROOT / "configs/cell.yaml", "--device", "cpu", "--name", name, "--set", f"seed={seed}",
               "--set", f"log.runs_dir={runs}", "--set", f"data.dataset_path={data}", *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return runs / name


def matrix(path):
    """Cells of a CSR matrix, dense."""
    with h5py.File(path) as file:
        group = file["X"]
        out = np.zeros(group.attrs["shape"], dtype=np.float32)
        pointers, indices, data = (group[name][:] for name in ("indptr", "indices", "data"))
        for cell in range(len(out)):
            part = slice(pointers[cell], pointers[cell + 1])
            out[cell, indices[part]] = data[part]
        names = [name.decode() for name in file["var/_index"][:]]
        codes = file["obs/celltype/codes"][:]
    return out, names, codes


def real_cells(data, genes):
    """Expression of the cells that pass the filter, their types, and their rows in the file."""
    counts, names, types = matrix(next(Path(data).glob("*.h5ad")))
    counts = counts[:, [names.index(gene) for gene in genes]]
    kept = (counts > 0).sum(1) >= 10
    counts = counts[kept]
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4), types[kept], np.flatnonzero(kept)


def mmd(real, generated):
    """Squared MMD, by widths of the real cells and by those of both sets."""
    n = min(len(real), len(generated))
    pick = lambda cells: cells[[i * len(cells) // n for i in range(n)]]
    both = np.concatenate([pick(real), pick(generated)]).astype(np.float64)
    both -= both.mean(0)
    u, s, _ = np.linalg.svd(both, full_matrices=False)
    points = (u * s)[:, :50]
    squares = (points**2).sum(1)
    d = np.maximum(squares[:, None] + squares[None] - 2 * points @ points.T, 0)
    found = []
    for of in (d[:n, :n], d):
        width = of.sum() / (len(of) * (len(of) - 1)) / 4
        k = sum(np.exp(-d / (width * 2**i)) for i in range(5))
        found.append(k[:n, :n].mean() + k[n:, n:].mean() - k[:n, n:].mean() - k[n:, :n].mean())
    return found


def trained(run, genes):
    """The autoencoder of a run, and its last checkpoint."""
    last = max((run / "autoencoder/checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    model = Autoencoder(len(genes), LATENT, HIDDEN)
    model.load_state_dict(load_file(last / "model.safetensors"))
    return model.eval(), last


def is_validation(checkpoint, rows):
    """Which rows of the file a run validated on: the draw of src/task/cell/data/members.rs."""
    split = json.loads((checkpoint / "split.json").read_text())["units"][0]["rows"]
    whole = (1 << 64) - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & whole
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & whole
        return x ^ (x >> 31)

    draws = [mix(split["key"] ^ mix(split["seed"] ^ mix(row + 1))) for row in rows.tolist()]
    return np.array([split["train_below"] <= draw < split["val_below"] for draw in draws])


def autoencoder(run, genes, real, types, rows):
    """Mean squared error of the autoencoder, and what is left when each cell is its type's mean: of all cells, of validation cells."""
    model, checkpoint = trained(run, genes)
    x = torch.from_numpy(real.astype("f4"))
    with torch.no_grad():
        errors = ((model(x) - x) ** 2).mean(1).numpy()
    means = np.stack([real[types == kind].mean(0) for kind in range(types.max() + 1)])
    within = ((real - means[types]) ** 2).mean(1)
    val = is_validation(checkpoint, rows)
    return [[errors.mean(), within.mean()], [errors[val].mean(), within[val].mean()]]


def noise(run, genes, count, seed):
    """Unit noise through the trained decoder."""
    model, _ = trained(run, genes)
    torch.manual_seed(seed)
    with torch.no_grad():
        return model.decoder(torch.randn(count, LATENT)).relu().numpy()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--runs", type=Path)
    args = parser.parse_args()
    folder = args.runs or Path(tempfile.mkdtemp(prefix="cell-quality-"))
    worst = 0.0
    for seed in map(int, args.seeds.split(",")):
        data, runs = folder / f"data{seed}", folder / "runs"
        if not data.exists():
            subprocess.run([LAUNCH, "sample-data", "--task", "cell", "--seed", str(seed), "--out", data], check=True, capture_output=True)
        run = launch(runs, f"seed{seed}", seed, data)
        untrained = launch(runs, f"untrained{seed}", seed, data, "--set", "stages.diffusion.train.max_steps=1", "--set",
                           "cell.sample.per_class=0")
        metrics, before = (json.loads((path / "sample/metrics.json").read_text()) for path in (run, untrained))
        generated, genes, codes = matrix(run / "sample/generated.h5ad")
        real, types, rows = real_cells(data, genes)
        garbage, noised = matrix(untrained / "sample/generated.h5ad")[0], noise(run, genes, 500, seed)
        last = json.loads((run / "autoencoder/metrics.jsonl").read_text().splitlines()[-1])
        of_all, of_val = autoencoder(run, genes, real, types, rows)
        ratios = [metrics["type_share"][name] / share for name, share in metrics["type_share_real"].items()]
        row = {
            "seed": seed,
            "mmd": [metrics["mmd"], metrics["mmd_joint"]],
            "mmd_again": mmd(real, generated[codes < 0]),
            "mmd_noise": mmd(real, noised),
            "mmd_untrained": mmd(real, garbage),
            "autoencoder_mse_and_within_types": of_all,
            "validation": of_val,
            "val.loss": last["val.loss"],
            "share_ratio": [min(ratios), max(ratios)],
            "guided_share": metrics["guided_share"],
            "spearman": [metrics["gene_mean_spearman"], before["gene_mean_spearman"]],
        }
        row["passes"] = bool(
            row["mmd"][0] < 0.35 and row["mmd_noise"][0] > 0.8 and row["mmd_untrained"][0] > 1.4
            and of_all[0] <= of_all[1] and of_val[0] <= of_val[1]
            and 0.4 <= min(ratios) and max(ratios) <= 2 and row["guided_share"] > 0.8
        )
        worst = max(worst, row["mmd"][0])
        print(json.dumps({key: np.round(value, 3).tolist() if key != "passes" else value for key, value in row.items()}), flush=True)
    print(f"worst MMD {worst:.3f}; criteria: below .35 against more than .8 for noise and 1.4 untrained")


if __name__ == "__main__":
    main()
