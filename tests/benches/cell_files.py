"""Files of cells that Headroom writes, read by anndata: sample data of every layout, and files named on the command line.

    scripts/bench cell_files [FILE.h5ad ...]     such as runs/cell/sample/generated.h5ad and outputs of launch predict
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse

from common import RELEASE


def look(path):
    """One line on a file; ends the program where something is not as anndata's users expect it."""
    data = anndata.read_h5ad(path)
    x = data.X.toarray() if scipy.sparse.issparse(data.X) else data.X
    assert x.shape == data.shape and x.dtype == np.float32 and np.isfinite(x).all() and (x >= 0).all(), "X"
    assert data.obs_names.is_unique and data.var_names.is_unique, "names"
    for name in data.obs.columns:
        assert str(data.obs[name].dtype) == "category", name
    for name, values in data.obsm.items():
        assert values.shape[0] == data.n_obs, name
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.h5ad"
        data.write_h5ad(copy)
        again = anndata.read_h5ad(copy)
        assert again.shape == data.shape and again.obs.equals(data.obs), "written by anndata and read again"
    kinds = {name: data.obs[name].value_counts(dropna=False).to_dict() for name in data.obs.columns}
    print(f"{path}: {data.n_obs} x {data.n_vars}, {type(data.X).__name__}, obsm {dict((k, v.shape) for k, v in data.obsm.items())}, {kinds}")
    return data


def main():
    for path in sys.argv[1:]:
        look(path)
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for layout in ("csr", "gzip", "dense"):
            out = Path(folder) / layout
            words = ["--cells", "300", "--genes", "120", "--layout", layout, "--out", str(out)]
            subprocess.run([RELEASE / "launch", "sample-data", "--task", "cell", *words], check=True, capture_output=True)
            found.append(look(out / "cells.h5ad"))
        dense = [data.X.toarray() if scipy.sparse.issparse(data.X) else data.X for data in found]
        assert all((other == dense[0]).all() for other in dense), "layouts differ"


if __name__ == "__main__":
    main()
