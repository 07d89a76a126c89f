# SPDX-License-Identifier: Apache-2.0
"""What 0.1.0 promised: its pickled models, import paths and operator schemas stay as they were."""

import functools
import importlib
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import samfast
from samfast.modules import PHMLinear, QuaternionLinear

GOLDEN = Path(__file__).parent / "golden"
NAMES = json.loads((GOLDEN / "names-0.1.0.json").read_text())
PICKLES = zipfile.ZipFile(GOLDEN / "models-0.1.0.zip")
METHODS = {
    "lora": samfast.Lora(rank=2, alpha=4.0, dropout=0.1, target=("qkv", "lin1")),
    "lora-slices": samfast.Lora(rank=2, slices=("q", "v")),
    "conv-lora": samfast.ConvLora(rank=3, experts=3),
    "conv-lora-proj": samfast.ConvLora(2, experts=2, depthwise=True, target=("qkv", "proj")),
    "conv-lora-paper": samfast.ConvLora(rank=3, experts=3, top_k=2, formula="paper"),
    "cobot-lora": samfast.CobotLora(rank=4),
    "adaptformer": samfast.AdaptFormer(bottleneck=4),
    "cobot-adaptformer": samfast.AdaptFormer(bottleneck=4, cobot=True),
    "kronecker": samfast.Kronecker(n=4, rank=1),
    "ta-lora": samfast.TaLora(tasks=("road", "roof"), ranks=(4, 4, 2), orthogonality=0.1),
    "decoder": samfast.DecoderOnly(),
}


def encoder():
    """The stock encoder that the pickled models were made of; its weights come from them."""
    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=1,
        mlp_ratio=2.0,
        out_chans=4,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )


def build(name):
    """Today's model in place of the pickled one, with random weights."""
    if name in ("PHMLinear", "QuaternionLinear"):
        return PHMLinear(8, 12, 4) if name == "PHMLinear" else QuaternionLinear(8, 12)
    model = encoder()
    samfast.attach(model, METHODS[name.removesuffix("-fused")], train=("neck.0",))
    if name.endswith("-fused"):
        samfast.fuse(model)
    if name.startswith("ta-lora"):
        samfast.set_task(model, "roof")
    return model


@pytest.mark.parametrize("name", [entry.removesuffix(".pt") for entry in PICKLES.namelist()])
def test_a_pickled_model_loads_and_runs_as_before(name, monkeypatch):
    monkeypatch.setenv("SAMFAST_BACKEND", "reference" if "paper" in name else "torch")
    kept = torch.load(io.BytesIO(PICKLES.read(f"{name}.pt")), weights_only=False)
    model, x, before = kept["model"], kept["x"], kept["y"]
    fresh = build(name).eval()
    fresh.load_state_dict(model.state_dict())
    for own, other in zip(fresh.parameters(), model.parameters(), strict=True):
        assert own.requires_grad == other.requires_grad
        own.data = other.data.clone()  # in its layout too, on which a product's last bits depend
    with torch.no_grad():
        out = model(x)
        assert torch.equal(out, fresh(x))  # the bits of another processor may differ
    assert (out - before).abs().max() <= 1e-5 * before.abs().max()
    assert repr(model) == repr(fresh)
    if hasattr(model, "blocks"):
        assert str(samfast.report(model)) == str(samfast.report(fresh))


def test_a_pickled_model_trains_and_is_saved(tmp_path):
    kept = torch.load(io.BytesIO(PICKLES.read("conv-lora-fused.pt")), weights_only=False)
    model = kept["model"].train()
    (model(kept["x"]).square().mean() + samfast.aux_loss(model)).backward()
    assert all(p.grad is not None for _, p in samfast.trainable_parameters(model))
    samfast.save_adapter(model, tmp_path / "adapter")
    assert samfast.read_adapter_config(tmp_path / "adapter")


@pytest.mark.parametrize("module", NAMES)
def test_a_path_of_before_imports(module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []


def test_operator_schemas_are_unchanged():
    for operation in ("task_core.cores", "hypercomplex.factors"):
        importlib.import_module(f"samfast.kernels.{operation}")
    for folder in (Path(__file__).parents[1] / "kernels").glob("*/op.py"):
        importlib.import_module(f"samfast.kernels.{folder.parent.name}.op")
    known = (GOLDEN / "schemas-0.1.0.txt").read_text().splitlines()
    schemas = {str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("samfast::")}
    assert [schema for schema in known if schema not in schemas] == []
