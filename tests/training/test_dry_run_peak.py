# SPDX-License-Identifier: Apache-2.0
"""finetune --dry-run's peak against the allocations of a real step, within a tenth."""

import dataclasses
import gc

import pytest
import torch
from measured_step import Allocations, MeasuredStep, storage_bytes

from samfast.models.architectures import ARCHITECTURES
from samfast.training.callbacks import Callback
from samfast.training.dry_run import dry_run
from samfast.training.loop import finetune
from samfast.training.settings import MEMORY, METHODS, FinetuneSettings

WITHIN = 0.1
TASKS = """
tasks:
  - {name: classes, kind: semantic, channels: 3}
  - {name: edges, derive: boundary, from: classes, weight: 0.5}
  - {name: slopes, kind: regression, channels: 3, loss: cosine, folder: slopes}
"""
ALL = ("qkv", "proj", "lin1", "lin2")
QUICK = {
    "minimal": {"memory": "minimal", "precision": "bf16", "prompt": "box", "accumulate": 2},
    "chunk": {"batch_size": 2, "decoder_chunk": 1, "image_size": 112, "target": ALL},
}
BOTH = {  # of vit_tiny and of vit_b at 512 pixels
    "lora": {},
    "balanced": {"memory": "balanced", "target": ALL},
    "minimal": {"memory": "minimal", "target": ALL},
    "stock": {"fuse": False},
    "box": {"prompt": "box"},
    "accumulate": {"accumulate": 3, "memory": "minimal"},
    "chunk": {"batch_size": 2, "decoder_chunk": 1, "memory": "balanced"},
    "bf16": {"precision": "bf16"},
    "bf16-base": {"precision": "bf16", "base_dtype": "bfloat16", "memory": "minimal"},
    "base": {"base_dtype": "bfloat16"},
    "torch": {"backend": "torch"},
    "structure": {"loss": "structure"},
    "decoder": {"method": "decoder"},
    "conv-lora": {"method": "conv-lora"},
    "conv-lora-minimal": {"method": "conv-lora", "memory": "minimal"},
    "cobot-lora": {"method": "cobot-lora", "prompt": "box"},
    "adaptformer": {"method": "adaptformer"},
    "cobot-adaptformer": {"method": "cobot-adaptformer", "memory": "balanced"},
    "kronecker": {"method": "kronecker"},
    "ta-lora": {"tasks": TASKS, "method": "ta-lora"},
    "tasks-lora": {"tasks": TASKS, "memory": "minimal", "decoder_chunk": 2},
}
GRID = {  # every method in every mode, in 16 bits
    f"{method}-{memory}": {
        "method": method,
        "memory": memory,
        "precision": "bf16",
        "base_dtype": "bfloat16",
        "image_size": 128,
        **({"tasks": TASKS} if method == "ta-lora" else {"prompt": "box"}),
    }
    for method in METHODS
    for memory in MEMORY
}
VIT_B = {"model": "vit_b", "random_init": True, "image_size": 512}
CASES = [pytest.param({"depth": 2, "image_size": 64, **o}, id=name) for name, o in QUICK.items()]
CASES += [pytest.param(o, id=name, marks=pytest.mark.slow) for name, o in GRID.items()]
CASES += [
    pytest.param({**model, **options}, id=f"{name}-{model['model']}", marks=pytest.mark.slow)
    for model in ({"model": "vit_tiny"}, VIT_B)
    for name, options in BOTH.items()
]


@pytest.mark.slow_on_cpu("minimal", "chunk")
@pytest.mark.parametrize("options", CASES)
def test_peak_of_a_step(options, tmp_path, monkeypatch):
    options = {"model": "vit_tiny", "batch_size": 1, **options}
    if depth := options.pop("depth", None):
        small = dataclasses.replace(ARCHITECTURES["vit_tiny"], depth=depth, global_blocks=(1,))
        monkeypatch.setitem(ARCHITECTURES, "vit_tiny", small)
    if "tasks" in options:
        options["tasks"] = tmp_path / "tasks.yaml"
        options["tasks"].write_text(TASKS)
    settings = FinetuneSettings(**options, dry_run=True)
    told = dry_run(settings)["peak_bytes"]["total"]
    if "backend" in options:
        monkeypatch.setenv("SAMFAST_BACKEND", options["backend"])
    measured = MeasuredStep(settings).peak()
    assert abs(told - measured) <= WITHIN * measured, f"told {told:,}, measured {measured:,}"


class Watch(Callback):
    """Measures the third step of a run; earlier: what was alive before the run."""

    def __init__(self):
        self.earlier = self.alive()
        self.peak = None

    def alive(self) -> dict[int, torch.Tensor]:
        gc.collect()
        found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        return {t.untyped_storage()._cdata: t for t in found}

    def on_step(self, run, loss):
        if run.step == 2:
            own = {key: t for key, t in self.alive().items() if key not in self.earlier}
            self.before = storage_bytes(own.values())
            self.allocations = Allocations().__enter__()
        elif run.step == 3:
            self.allocations.__exit__(None, None, None)
            self.peak = self.before + self.allocations.most


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=pytest.mark.slow_on_cpu),
        pytest.param({"method": "decoder", "flips": False}, marks=pytest.mark.slow),
        pytest.param({"accumulate": 2, "prompt": "box"}, marks=pytest.mark.slow),
    ],
    ids=["lora", "kept-embeddings", "accumulate"],
)
def test_peak_of_a_run(shared_data, tmp_path, more):
    """Of finetune itself, with its loader, from one optimizer step to the next."""
    common = {"data": shared_data, "model": "vit_tiny", "image_size": 128, "epochs": 1}
    settings = FinetuneSettings(**common, repeats=8, overlays=0, output=tmp_path / "run", **more)
    told = dry_run(settings)["peak_bytes"]["total"]
    watch = Watch()
    finetune(settings, callbacks=[watch])
    assert abs(told - watch.peak) <= WITHIN * watch.peak
