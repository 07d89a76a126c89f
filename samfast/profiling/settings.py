# SPDX-License-Identifier: Apache-2.0
"""The options of ``samfast profile``. Importing this does not load torch."""

from dataclasses import dataclass
from pathlib import Path

from samfast.adapters.options import option
from samfast.training.settings import BACKENDS, MEMORY, METHODS, MODELS

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """Show where the time and the memory of a training step go.

    Either a model is built with random weights and trained on random images, or --script runs your
    own training program, unchanged: a step ends at each step of its first optimizer. What follows
    the script is for the script. The table lists each operation with its time, FLOP, bytes and the
    ceiling that binds it, then blocks and phases, and names the largest loss.
    """

    model: str | None = option(
        None,
        "Image encoder, with random weights unless --checkpoint is given",
        metavar=f"{{{','.join(MODELS)}}}",
        hint="default: vit_tiny",
    )
    checkpoint: Path | None = option(
        None,
        "Weights of the model, as for finetune; for sam3, its folder also gives the sizes",
        hint="default: random weights",
    )
    method: str = option("lora", "Train this in addition to the mask decoder", choices=METHODS)
    image_size: int | None = option(
        None,
        "Side of the images in pixels",
        hint="default: 1024; vit_tiny: 256; sam3: as in its folder",
    )
    batch: int = option(2, "Images per step", least=1)
    memory: str | None = option(
        None,
        "What the fused encoder saves for backward; as in finetune",
        choices=MEMORY,
        hint="default: fast",
    )
    device: str = option("auto", "Device to run on (auto: a GPU if there is one)", choices=DEVICES)
    dtype: str = option(
        "auto",
        "Dtype of matrix products (auto: float32 on a CPU, bfloat16 on a GPU, float16 on a GPU "
        "without bfloat16)",
        choices=DTYPES,
    )
    backend: str = option("auto", "Kernels to run", choices=BACKENDS)
    script: Path | None = option(
        None,
        "Profile this training program instead of a model; put its arguments after it",
        metavar="FILE [ARGUMENT ...]",
        hint="default: none",
    )
    steps: int = option(5, "Number of steps to time", least=1)
    skip: int = option(3, "Number of steps to run before; the last one is counted", least=2)
    compare: bool = option(
        False,
        "Also time the unfused model, segment_anything with PEFT and Hugging Face with PEFT, in "
        "turns; not with --script",
    )
    fresh_ceilings: bool = option(
        False, "Measure this machine's ceilings again instead of using saved values"
    )
    json: bool = option(False, "Print JSON to stdout")
    trace: Path | None = option(
        None, "Write a trace for chrome://tracing or Perfetto (JSON)", hint="default: none"
    )
    plot: Path | None = option(
        None, "Draw operations against their ceilings, and memory (PNG)", hint="default: none"
    )
    html: Path | None = option(
        None, "Write one page with tables and drawings", hint="default: none"
    )
    arguments: tuple[str, ...] = ()  # of the script


def split_script(argv: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The words for samfast, and those after the script, which are the script's."""
    for i, word in enumerate(argv):
        if word == "--script":
            return argv[: i + 2], tuple(argv[i + 2 :])
        if word.startswith("--script="):
            return argv[: i + 1], tuple(argv[i + 1 :])
    return argv, ()
