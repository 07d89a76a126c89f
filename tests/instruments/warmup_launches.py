# SPDX-License-Identifier: Apache-2.0
"""The kernels that ``samfast warmup`` finds, next to those that ``samfast finetune`` launches.

    python -m tests.instruments.warmup_launches FOLDER METHOD ...

Both run as if a GPU were here, and compile nothing. FOLDER holds a data folder, ``data``, and
gets the runs. A method may name tasks, as METHOD:FILE. Prints JSON, by method. A program of its
own, because tests import kernels for the interpreter.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

from benchmarks import stand_in_cuda
from samfast import cli
from samfast.training.loop import finetune
from samfast.training.recipe import with_recipe
from samfast.training.warmup import Steps

OPTIONS = "--model vit_tiny --image-size 64 --random-init --precision bf16 --base-dtype bfloat16"
RUN = "--epochs 1 --repeats 1 --keep 0 --overlays 0 --overwrite"


def compared(folder: Path, method: str) -> dict:
    """Forms of kernels: launched by a run, noted by the warm-up, and those it lacks."""
    name, _, tasks = method.partition(":")
    words = ["finetune", *OPTIONS.split(), *RUN.split(), "--method", name]
    words += ["--tasks", tasks] if tasks else []
    words += ["--data", folder / "data", "--output", folder / "run"]
    settings = cli._parsed(list(map(str, words)))
    with stand_in_cuda.standing_in(compiles=False) as run, contextlib.redirect_stdout(sys.stderr):
        finetune(settings)
    with stand_in_cuda.standing_in() as noted:
        forms = Steps(with_recipe(settings), torch.device("cuda")).forms()
    return {
        "launched": len(run.jobs),
        "noted": len(forms),
        "launches": len(noted.launches),
        "lacks": sorted(run.jobs[form].kernel for form in run.jobs.keys() - noted.jobs.keys()),
        "same": len(forms) == len(noted.jobs),
    }


if __name__ == "__main__":
    told = {method: compared(Path(sys.argv[1]), method) for method in sys.argv[2:]}
    print(json.dumps(told))
