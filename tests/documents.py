# SPDX-License-Identifier: Apache-2.0
"""README, CONTRIBUTING and docs as readers copy them, and small stand-ins for their files.

What a document says is run word for word. Only sizes are replaced: its vit_b is SMALL_VIT_B, its
checkpoint and folders hold few small files, and a machine's ceiling is that of a small product.

python tests/documents.py README.md …    runs the Python blocks as in a fresh interpreter

Documents are those of the repository, or of the folder SAMFAST_PAGES, into which
docs/check_pages.py writes what built pages show.
"""

import os
import re
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from samfast import kernels
from samfast.integrations.torchvision import declare_missing_schemas
from samfast.models import architectures, build_sam
from samfast.profiling import machine

ROOT = Path(__file__).parents[1]
PLACE = Path(os.environ.get("SAMFAST_PAGES", ROOT))
DOCUMENTS = tuple(
    str(path.relative_to(PLACE))
    for path in (
        PLACE / "README.md",
        PLACE / "CONTRIBUTING.md",
        *sorted(PLACE.rglob("docs/**/*.md")),
    )
    if path.is_file()
)
TASKS = "docs/guides/tasks.md"  # has the file of --tasks
SMALL_VIT_B = architectures.Architecture(192, 2, 3, (1,), window=7, image_size=64)
CHECKPOINT = "sam_vit_b_01ec64.pth"
SCRIPT = """
import torch
layer = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
for step in range(9):
    layer(torch.randn(4, 8)).sum().backward()
    optimizer.step()
"""
FOLDERS = {"photos": 255, "roads": 7, "camvid": 7}  # and the value of an object in their masks
KERNEL_FILE = re.compile(r"# kernels/(\w+/\w+\.py)\n")
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:samfast|make|pip|pytest|python3?) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block, or the code of an inline command, whose language is "inline"."""

    document: str
    line: int
    language: str
    source: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: str) -> list[Block]:
    """Every fenced block of a document and every command inside its text, in order."""
    parsed = Document.parse(str(PLACE / document), FencedCodeBlockLexer(r"[^\n]*"))
    found, text = [], parsed.text
    for example in parsed.examples():
        language, source = example.region.lexemes["language"], example.region.lexemes["source"]
        found.append(Block(document, example.line, language, str(source)))
        length = example.region.end - example.region.start
        blank = "".join(c if c == "\n" else " " for c in text[example.region.start :][:length])
        text = text[: example.region.start] + blank + text[example.region.end :]
    for match in INLINE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(document, line, "inline", " ".join(match[1].split())))
    return sorted(found, key=lambda block: block.line)


def is_tasks(block: Block) -> bool:
    """Whether it is the file of --tasks; other YAML is for accelerate."""
    return block.language == "yaml" and "tasks:" in block.source


def use_small_vit_b() -> None:
    architectures.ARCHITECTURES["vit_b"] = SMALL_VIT_B
    # Of what a machine's ceilings are measured, and for how long.
    machine.PRODUCTS["cpu"], machine.COPIED["cpu"], machine._TURN = ((64, 64, 64),), 2**16, 1e-4


def write_stand_ins(folder: Path) -> None:
    """The files that the documents' commands name, but for what they make themselves."""
    generator = np.random.default_rng(0)

    def picture(path: Path, height: int, width: int) -> None:
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)

    for kind in ("images", "masks"):
        (folder / "volumes" / kind).mkdir(parents=True)
        for i in range(2):
            pages = [Image.fromarray(np.eye(48, 64, j, np.uint8) * 255) for j in range(i + 1, 4)]
            path = folder / "volumes" / kind / f"{i}.tif"
            pages[0].save(path, save_all=True, append_images=pages[1:])
    for name, value in FOLDERS.items():
        for kind in ("images", "masks"):
            (folder / name / kind).mkdir(parents=True)
        for i in range(3):
            picture(folder / name / "images" / f"{i}.png", 48, 64)
            mask = np.zeros((48, 64), np.uint8)
            mask[8 * i : 8 * i + 16, 10:40] = value
            Image.fromarray(mask).save(folder / name / "masks" / f"{i}.png")
    for kind in ("images", "masks"):
        (folder / "cells" / kind).mkdir(parents=True)
    for i in range(3):
        picture(folder / "cells" / "images" / f"{i}.png", 48, 64)
        numbers = np.zeros((48, 64), np.uint16)
        numbers[4:20, 6 + i : 24], numbers[20 + i : 40, 30:60] = 1, 700
        Image.fromarray(numbers).save(folder / "cells" / "masks" / f"{i}.tif")
    picture(folder / "photo.png", 240, 330)
    (folder / "train.py").write_text(SCRIPT)
    (tasks,) = [b.source for b in blocks(TASKS) if is_tasks(b)]
    (folder / "tasks.yaml").write_text(tasks)
    torch.save(build_sam("vit_b", random_init=True, seed=0).state_dict(), folder / CHECKPOINT)
    small_tracker().save_pretrained(folder / "sam3")


def small_tracker() -> torch.nn.Module:
    """A Sam3TrackerModel of 56 pixels with random weights."""
    declare_missing_schemas()
    from transformers import Sam3TrackerConfig, Sam3TrackerModel

    vit = {"model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 64,
           "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
           "pretrain_image_size": 28, "patch_size": 14, "window_size": 2,
           "global_attn_indexes": [1]}  # fmt: skip
    config = Sam3TrackerConfig(
        vision_config={"model_type": "sam3_vision_model", "backbone_config": vit,
                       "fpn_hidden_size": 32,
                       "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
        prompt_encoder_config={"hidden_size": 32, "image_size": 56, "patch_size": 14},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 64,
                             "iou_head_hidden_dim": 32},
    )  # fmt: skip
    return Sam3TrackerModel(config)


def be_the_only_process() -> None:
    """What torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", WORLD_SIZE="1")


def run_python(document: str) -> None:
    """Every Python block in order. One that imports samfast stands by itself, others go on. One
    that begins with the name of a file in kernels/ is that file, which a later block imports."""
    parsed = Document.parse(str(PLACE / document), PythonCodeBlockParser())
    folder = tempfile.TemporaryDirectory()
    kernels.__path__.append(folder.name)
    for example in parsed.examples():
        if "import samfast\n" in example.parsed:
            parsed.namespace.clear()
        if file := KERNEL_FILE.match(example.parsed):
            path = Path(folder.name, file[1])
            path.parent.mkdir(exist_ok=True)
            path.write_text(example.parsed, encoding="utf-8")
        else:
            example.evaluate()
        if "segment_anything" in sys.modules:  # never before a document's own code imports it
            registry = sys.modules["segment_anything"].sam_model_registry
            registry["vit_b"] = lambda checkpoint: build_sam("vit_b", checkpoint)
        print(f"ran {document}:{example.line}")


if __name__ == "__main__":
    use_small_vit_b()
    be_the_only_process()
    if "README.md" not in sys.argv:  # which says what a torchvision of another torch needs
        declare_missing_schemas()
    for named in sys.argv[1:]:
        run_python(named)
