# SPDX-License-Identifier: Apache-2.0
"""segment_anything beside a torchvision that is broken or absent; each case in its own process."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

HIDE = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""


def run(code: str, hidden: str = "") -> str:
    if hidden:
        code = f"HIDDEN = {hidden!r}\n{HIDE}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow_on_cpu
def test_schemas_are_declared_only_where_torchvision_lacks_them():
    run("""
import sys, torch
from samfast.integrations import torchvision as ours

load = torch.ops.load_library
torch.ops.load_library = lambda path: None  # operators that load need no help
assert not ours.declare_missing_schemas()
assert not hasattr(torch.ops.torchvision, "nms")
torch.ops.load_library = load

declared = ours.declare_missing_schemas()
assert not ours.declare_missing_schemas()
assert "torchvision" not in sys.modules
import torchvision
assert declared != torchvision.extension._has_ops()
assert not ours.declare_missing_schemas()
if declared:
    boxes, scores = torch.zeros(1, 4), torch.zeros(1)
    try:
        torchvision.ops.nms(boxes, scores, 0.5)
    except RuntimeError as error:
        assert "C++ ops" in str(error), error
    else:
        raise AssertionError("nms ran without its operator")
""")


@pytest.mark.slow_on_cpu
def test_a_sam_trains_without_torchvision():
    run(
        """
import sys, torch
import numpy as np
from samfast import models

heavy = {"segment_anything", "torchvision", "transformers", "triton"}
assert not heavy & set(sys.modules), "importing samfast.models is not light"
sam = models.build_sam("vit_tiny", image_size=64, seed=0)
images = torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8)
models.segment(sam, images).square().mean().backward()
assert sam.image_encoder.blocks[0].attn.qkv.weight.grad.abs().max() > 0
assert not [name for name in sys.modules if name.split(".")[0] == "torchvision"]

import segment_anything
from samfast.integrations.segment_anything import load
assert load() is segment_anything
image = np.zeros((64, 48, 3), dtype=np.uint8)
calls = {
    "to_pil_image": lambda: segment_anything.SamPredictor(sam).set_image(image),
    "batched_nms": lambda: segment_anything.automatic_mask_generator.batched_nms(1, 2, 3, 4),
}
for name, call in calls.items():
    try:
        call()
    except ImportError as error:
        assert str(error) == (
            f"segment_anything's call of {name} needs torchvision, which is not installed: "
            "pip install torchvision"
        ), error
    else:
        raise AssertionError(f"{name} ran without torchvision")
try:
    import torchvision
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("a placeholder of torchvision was left behind")
""",
        hidden="torchvision",
    )


@pytest.mark.slow_on_cpu
def test_without_segment_anything_one_sentence_says_how_to_install_it():
    out = run(
        """
from samfast import models
try:
    models.build_sam("vit_tiny")
except ImportError as error:
    print(error)
""",
        hidden="segment_anything",
    )
    assert out == 'segment_anything is not installed: pip install "samfast[sam]"\n'
