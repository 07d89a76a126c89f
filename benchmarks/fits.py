# SPDX-License-Identifier: Apache-2.0
"""README's table of what fits: the largest batch of every model and memory mode on a GPU's memory.

    python -m benchmarks.fits                     print the table
    python -m benchmarks.fits --readme            and write it into README.md
    python -m benchmarks.fits --model vit_b       some of the rows

Counted as `samfast finetune --fit` counts, on tensors without memory: LoRA and mask decoder trained
at 1024 x 1024 pixels (SAM 3, by boxes: 1008 x 1008), base and products in bfloat16, one object per
image. Run it where no GPU is, so that the same stand-in is counted everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.options import parsed
from samfast.training.card import room
from samfast.training.plan import counted
from samfast.training.recipe import with_recipe
from samfast.training.settings import MEMORY, MODELS, FinetuneSettings

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- python -m benchmarks.fits --readme -->\n"
END = "<!-- end of what fits -->\n"
CARDS = (8, 12, 16, 24)  # GB
SIDE = 1024
OWN_SIDES = {"sam3": 1008}
NAMES = {
    "vit_tiny": "vit_tiny", "vit_b": "ViT-B", "vit_l": "ViT-L", "vit_h": "ViT-H", "sam3": "SAM 3"
}  # fmt: skip


@dataclass
class Settings:
    """Print README's table of what fits."""

    model: str | None = None
    readme: bool = False


class Peaks:
    """Bytes of tensors of one model and mode by batch size, counted when first asked for."""

    def __init__(self, model: str, memory: str):
        self.model, self.memory = model, memory
        self.known: dict[int, int] = {}

    def __call__(self, batch: int) -> int:
        if batch not in self.known:
            settings = FinetuneSettings(
                model=self.model,
                random_init=True,
                image_size=OWN_SIDES.get(self.model, SIDE),
                prompt="box" if self.model == "sam3" else "none",
                memory=self.memory,
                batch_size=batch,
            )
            worst = counted(with_recipe(settings), torch.device("cuda"))
            self.known[batch] = worst.total
        return self.known[batch]


def largest(peaks: Peaks, free: int) -> int:
    """The largest batch whose tensors take at most ``free`` bytes; 0: not one image.

    The peak is the largest of sums that each grow evenly with the batch, so it is convex: between
    two counted batches it is at most the line through them, beyond them at least that line.
    """
    if peaks(1) > free:
        return 0
    while True:
        low = max(n for n, peak in peaks.known.items() if peak <= free)
        high = min((n for n, peak in peaks.known.items() if peak > free), default=None)
        before = max((n for n in peaks.known if n < low), default=None)
        if before is None and high != low + 1:
            peaks(low + 1)
            before, low = (low, low + 1) if peaks(low + 1) <= free else (None, low)
            high = high if before else low + 1
        if high == low + 1:
            return low
        left = free - peaks(low)
        most = low + left * (low - before) // (peaks(low) - peaks(before))
        if high is None:
            if most == low:
                return low
            peaks(most)
            continue
        least = low + left * (high - low) // (peaks(high) - peaks(low))
        if least >= min(most, high - 1):
            return least
        peaks(least if least > low else (low + high) // 2)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def row(model: str, memory: str) -> str:
    peaks = Peaks(model, memory)
    most = largest(peaks, room(CARDS[-1] * 10**9))
    batches = [largest(peaks, room(card * 10**9)) for card in CARDS[:-1]] + [most]
    cells = [str(batch) if batch else "–" for batch in batches]
    return f"| {' | '.join([NAMES[model], f'`{memory}`', gigabytes(peaks(1)), *cells])} |"


def table(models: Sequence[str] = tuple(NAMES)) -> str:
    cards = " | ".join(f"{card} GB" for card in CARDS)
    lines = [
        f"| | `--memory` | tensors, batch 1 | {cards} |",
        f"|---|---|---|{'---|' * len(CARDS)}",
    ]
    lines += [row(model, memory) for model in models for memory in MEMORY]
    return "\n".join(lines) + "\n"


def readme_table(text: str) -> str:
    """The table that README's text has."""
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n") + "\n"


def main() -> int:
    options = parsed(Settings)
    if torch.cuda.is_available():
        raise SystemExit(
            "a GPU would change the counts; hide it: CUDA_VISIBLE_DEVICES= python -m "
            "benchmarks.fits")  # fmt: skip
    if options.model is not None and options.readme:
        raise SystemExit("--readme writes all rows; leave out --model")
    if options.model not in (None, *MODELS):
        raise SystemExit(f"unknown model {options.model!r}; known are {', '.join(MODELS)}")
    made = table() if options.model is None else table((options.model,))
    print(made, end="")
    if options.readme:
        text = README.read_text("utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise SystemExit(f"{README} does not have the lines {BEGIN.strip()} and {END.strip()}")
        README.write_text(f"{before}{begin}\n{made}\n{end}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
