# SPDX-License-Identifier: Apache-2.0
"""Predict a training step of SAM's encoder on a GPU, launch by launch, without one.

python -m benchmarks.model
python -m benchmarks.model --model vit_h --batch 4 --device H100 --block

Launches, FLOP and bytes are those of kernels/sam_block/costs.py; rates and counts of machine code
those of rates.json (benchmarks/rates.py). Encoder at 1024², bfloat16 base and residual, LoRA on all
four layers, replayed as a CUDA graph: the host costs nothing.
"""

import argparse
import dataclasses
import datetime
import itertools
import math
import re
import sys
from pathlib import Path

import torch

from benchmarks import rates as data
from benchmarks.rates import Rates
from benchmarks.shapes import ENCODERS, step_flops
from samfast.kernels._common.tiles import tile as low_rank_tile
from samfast.kernels._common.windows import Windows
from samfast.kernels.lora_linear.costs import Stage
from samfast.kernels.relpos_attention import tiling
from samfast.kernels.sam_block import costs
from samfast.kernels.sam_block.triton_kernels import TILES

DEVICES, BATCHES, MOST_RANK = ("H100", "H200"), (1, 4), 16
GEMM, ATTENTION, ROWS, ADAPTERS = PARTS = ("GEMM", "attention", "norm/GELU/sum", "adapters")
_SCHEDULERS, _WARPGROUP = 4, 4  # of a multiprocessor; warps
_TERMS = 64  # that the library's products take at a time
_KINDS = {  # a stage's name -> what bounds it in addition to bytes, and its part
    "forward": ("forward", ATTENTION),
    "dq(, factors)?(, delta)?": ("dq", ATTENTION),
    "dk, dv": ("dkv", ATTENTION),
    "factors(, delta| less lse)?": ("bytes", ATTENTION),
    "(norm1|x1 = x [+] update, norm2), h": ("norm", ROWS),
    r"norm\d backward(, rows|, dA)?": ("norm_backward", ROWS),
    "GELU, h": ("gelu", ROWS),
    "GELU backward(, dA(, dz, dB)?)?": ("gelu_backward", ROWS),
    "y = x1 [+] update": ("bytes", ROWS),
    r"\w+: (down|\[W \| s B\]|up|up_backward|down_backward|dA)": ("bytes", ADAPTERS),
    r"\w+: reduce .*|B of proj and lin2, transposed": ("reduce", ADAPTERS),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A windowed or a global block; rank 0 for a frozen one whose input wants a gradient."""

    model: str
    batch: int
    whole: bool
    rank: int

    @property
    def windows(self) -> Windows:
        size = 64 if self.whole else 14
        return Windows(self.batch, 64, 64, size, size)

    def stages(self) -> list[Stage]:
        encoder = ENCODERS[self.model]
        return costs.stages(self.windows, encoder.width, encoder.heads, self.rank, itemsize=2)


def by_depth(model: str, windowed: float, whole: float, rest: float = 0.0) -> float:
    """A step of a model's encoder from one windowed and one global block, each times its number.

    windowed, whole: ms of a block's forward and backward   rest: ms of patch embedding and neck
    Any cost that adds up goes, such as host ms or bytes. ValueError for an unknown model and for a
    number that is negative or not finite.
    """
    if model not in ENCODERS:
        raise ValueError(f"unknown model {model}; expected one of {', '.join(ENCODERS)}")
    for name, value in {"windowed": windowed, "whole": whole, "rest": rest}.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"expected milliseconds for {name}, got {value}")
    encoder = ENCODERS[model]
    windows = encoder.depth - encoder.global_blocks
    return windows * windowed + encoder.global_blocks * whole + rest


def launch(block: Block, stage: Stage, rates: Rates) -> tuple[str, float]:
    """The part that a launch belongs to, and its µs. ValueError for a stage of unknown name."""
    gap = stage.launches * rates["launch.gap"]
    if stage.product:
        time = stage.flops / 1e6 / rates[f"gemm.{block.model}.{block.batch}"]
        return GEMM, time * _padded(block, stage) + gap
    found = [named for pattern, named in _KINDS.items() if re.fullmatch(pattern, stage.name)]
    if not found:
        raise ValueError(f"unknown stage {stage.name!r} of costs.py; add it to benchmarks/model.py")
    kind, part = found[0]
    if kind in ("forward", "dq", "dkv"):
        return part, _attention(block, kind, rates) + gap
    bounds = [_moved(stage.bytes, rates)]
    if kind == "reduce":
        bounds.append(rates["launch.reduce"])
    elif kind != "bytes":
        bounds += _rows(block, kind, rates)
    return part, max(bounds) + gap


def _padded(block: Block, stage: Stage) -> float:
    """How much longer a product takes than its FLOP where its terms are not whole tiles."""
    if not stage.name.endswith(costs.JOINT):
        return 1.0
    width = ENCODERS[block.model].width
    terms = width + costs.ALIGNED
    return _TERMS * -(-terms // _TERMS) / terms


def _moved(size: float, rates: Rates) -> float:
    """µs that bytes take."""
    return size / 1e6 / rates[f"memory.{rates.device}"]


def _busy(tiles: float, count: dict, rates: Rates) -> float:
    """µs of tiles that all multiprocessors share: to issue each, and then its products."""
    issue = count["instructions"] * count["warps"] / _SCHEDULERS
    columns = sum(
        n * int(shape.removeprefix("64x")) for shape, n in count.get("products", {}).items()
    )
    cycles = issue + count["warps"] / _WARPGROUP * columns / 2
    return tiles * cycles / (rates["processor.multiprocessors"] * rates["processor.clock"])


def _attention(block: Block, kind: str, rates: Rates) -> float:
    """µs of an attention kernel, which its machine code bounds."""
    encoder, windows = ENCODERS[block.model], block.windows
    head_dim = encoder.width // encoder.heads
    place = "global" if block.whole else "windows"
    chosen = _tile_of_attention(kind, windows, head_dim)
    count = rates.count(f"{kind} {place} {head_dim}", *chosen)
    (m, n), taken = count["tile"], tiling.pitch if tiling.one_hot(windows) else int
    lines = [min(windows.height, 64 - y) for y in range(0, 64, windows.height)]
    queries = [a * taken(b) for a in lines for b in lines]  # of each window, without its padding
    keys = windows.height * taken(windows.width)
    tiles = sum(-(-q // m) for q in queries) * encoder.heads * block.batch
    attained = f"attention.{kind}.{place}" + ("" if block.whole else f".{head_dim}")
    more = _busy(tiles, {"instructions": count.get("more", 0), "warps": count["warps"]}, rates)
    return (more + _busy(tiles * -(-keys // n), count, rates)) / rates[attained]


def _rows(block: Block, kind: str, rates: Rates) -> list[float]:
    """µs that bound a norm's or GELU's kernel: latency tile by tile of columns, and issue."""
    width = ENCODERS[block.model].width
    of = "adapter" if block.rank else "frozen"
    gelu, tokens = kind.startswith("gelu"), block.batch * 64 * 64
    tile, warps = _tile_of_rows(kind, width, block.rank)
    if tile[1] == costs.NARROW:
        of = f"narrow {of}"
    count = rates.count(f"{kind} {of}", tile, warps)
    m, n = count["tile"]
    columns = 4 * width if gelu else width
    bounds = []
    if n in (costs.WIDEST, costs.NARROW):  # a row at once
        turns = 1
        if kind == "norm_backward":  # a program's rows one after another
            turns = costs.walked_rows(tokens, width, block.rank > 0) / m
        bounds.append(turns * rates[f"trip.{kind}"])
    elif kind != "gelu_backward":
        bounds.append(columns / n * rates[f"trip.{kind}"])
    if "instructions" in count:
        tiles = tokens / m * columns / n
        bounds.append(_busy(tiles, count, rates) / rates["processor.issue"])
    return bounds


def _tile_of_rows(kind, width, rank):
    """(BLOCK_M, columns at once) and warps. Counts of rows kept are those of the widest ones.

    A norm's backward has others for narrow rows.
    """
    rows = torch.empty(1, width, dtype=torch.bfloat16, device="meta")
    kept = kind.startswith("norm") and costs.in_registers(width, rank)
    low = {"norm": "_down", "gelu": "_down"}.get(kind, "_low")
    stage = kind.replace("norm", "norm_row") if kept else kind + (low if rank else "")
    chosen = low_rank_tile(TILES, stage, max(rank, 1), rows)
    if not kept:
        return (chosen["BLOCK_M"], chosen["BLOCK_N"]), chosen["num_warps"]
    if kind == "norm_backward":
        widest = costs.NARROW if width <= costs.NARROW else costs.WIDEST
        return (costs.rows_at_once(width), widest), chosen["num_warps"]
    return (chosen["BLOCK_M"], costs.WIDEST), chosen["num_warps"]


def _tile_of_attention(stage, windows, head_dim):
    """(BLOCK_M, BLOCK_N) and warps on sm_90."""
    target, tiling.target = tiling.target, lambda x: "sm_90"
    try:
        head = torch.empty(head_dim, dtype=torch.bfloat16, device="meta")
        chosen = tiling.blocks(stage, head, windows)
    finally:
        tiling.target = target
    tile = chosen["BLOCK_M"], chosen["BLOCK_N"] * chosen.get("LINES", 1)
    return tile, chosen["num_warps"]


def block_parts(block: Block, rates: Rates, stages: list[Stage] | None = None) -> dict[str, float]:
    """ms of a block's forward and backward by part; stages: other launches than costs.py has."""
    parts = dict.fromkeys(PARTS, 0.0)
    for stage in block.stages() if stages is None else stages:
        part, time = launch(block, stage, rates)
        parts[part] += time / 1e3
    return parts


def outside(model: str, batch: int, rates: Rates) -> float:
    """ms of patch embedding, forwards, and of the neck, both ways."""
    width, tokens = ENCODERS[model].width, batch * 64 * 64
    flops = 2 * tokens * 768 * width + 2 * (2 * tokens * (width * 256 + 9 * 256**2))
    size = 3 * tokens * 2 * (3 * 256 + width + 6 * 256)
    time = flops / 1e6 / rates["outside.gemm"] + _moved(size, rates) + rates["outside.launches"]
    return time / 1e3


def step(model: str, batch: int, rank: int, rates: Rates) -> dict[str, float]:
    """ms of a step: "step", each part, "rest", "floor"; "P1 windows" and "P1 global", which are
    ratios of a block to the same one frozen; "of windows" and "of map", µs of a block's attention.
    """
    blocks = {whole: Block(model, batch, whole, rank) for whole in (False, True)}
    times = {whole: block_parts(block, rates) for whole, block in blocks.items()}
    rest = outside(model, batch, rates)
    total = by_depth(model, sum(times[False].values()), sum(times[True].values()), rest)
    row = {part: by_depth(model, times[False][part], times[True][part]) for part in PARTS}
    row = {"step": total, **row, "rest": rest, "floor": floor(model, batch, rates)}
    for whole, name in ((False, "P1 windows"), (True, "P1 global")):
        frozen = block_parts(dataclasses.replace(blocks[whole], rank=0), rates)
        row[name] = sum(times[whole].values()) / sum(frozen.values())
    for whole, name in ((False, "of windows"), (True, "of map")):
        row[name] = 1e3 * times[whole][ATTENTION]
    return row


def floor(model: str, batch: int, rates: Rates) -> float:
    """ms of a step's FLOP at the rate of a large product."""
    encoder = ENCODERS[model]
    keys = [encoder.tokens] * encoder.global_blocks
    keys += [14 * 14] * (encoder.depth - encoder.global_blocks)
    return step_flops(encoder.width, keys, batch, encoder.tokens) / 1e9 / rates["floor.gemm"]


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="predict a training step on a GPU")
    add = parser.add_argument
    add("--model", choices=ENCODERS, help="[all]")
    add("--batch", type=int, choices=BATCHES, help="images [1 and 4]")
    add("--device", choices=DEVICES, help="[both]")
    add("--adapter", type=int, default=4, metavar="RANK", help="LoRA's rank, 0 for none [4]")
    add("--block", action="store_true", help="print every launch of the blocks")
    add("--counts", metavar="COMMIT", help="use the machine code of this commit [today's]")
    add("--rates", type=Path, default=data.FILE, help="[%(default)s]")
    add("--measured", nargs="+", default=[], metavar="NAME=VALUE",
        help="write rates measured on --device today to the file --rates")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        if not 0 <= options.adapter <= MOST_RANK:
            raise ValueError(
                f"expected a rank from 0 to {MOST_RANK}, whose machine code was counted, "
                f"got {options.adapter}"
            )
        known = _measured(data.load(options.rates), options)
        print("\n".join(report(known, options)))
        if options.measured:
            data.save(known, options.rates)
    except (ValueError, OSError) as error:
        print(f"benchmarks.model: {error}", file=sys.stderr)
        return 2
    return 0


def _measured(known: dict, options) -> dict:
    if options.measured and not options.device:
        raise ValueError("--measured needs the GPU that was measured; pass --device H100 or H200")
    for given in options.measured:
        name, _, value = given.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"expected NAME=VALUE for --measured, got {given}") from None
        today = datetime.date.today().isoformat()
        known = data.measure(known, name, number, f"NVIDIA {options.device}", today)
    return known


def report(known: dict, options) -> list[str]:
    """The lines that the command prints."""
    models = [options.model] if options.model else list(ENCODERS)
    batches = [options.batch] if options.batch else BATCHES
    every = [Rates(known, d, options.counts) for d in DEVICES if options.device in (None, d)]
    names = ("step", "ratio", *PARTS, "rest", "P1 windows", "P1 global", "of windows", "of map")
    code = options.counts or "today's tiles"
    lines = [
        f"ms of a step with LoRA of rank {options.adapter} on all four layers; ratio to its floor; "
        f"machine code of {code}; µs of attention, forward and backward, in a block of windows and "
        "of the whole map (which is P2's)"
    ]
    lines.append(f"{'':19}" + "".join(f"{name:>{max(len(name), 6) + 2}}" for name in names))
    for model, batch, rates in itertools.product(models, batches, every):
        row = step(model, batch, options.adapter, rates)
        row["ratio"] = row["step"] / row["floor"]
        digits = {"ratio": 2, "P1 windows": 3, "P1 global": 3, "of windows": 0, "of map": 0}
        cells = (f"{row[n]:{max(len(n), 6) + 2}.{digits.get(n, 1)}f}" for n in names)
        lines.append(f"{model} batch {batch} {rates.device}" + "".join(cells))
    if options.block:
        for model, batch, rates in itertools.product(models, batches, every):
            for whole in (False, True):
                lines += ["", *_launches(Block(model, batch, whole, options.adapter), rates)]
    return [*lines, "", *(note for rates in every for note in rates.notes())]


def _launches(block: Block, rates: Rates) -> list[str]:
    place = "global" if block.whole else "windowed"
    lines, total = [], 0.0
    for stage in block.stages():
        part, time = launch(block, stage, rates)
        total += time
        lines.append(
            f"{stage.name:28}{stage.flops / 1e9:8.1f}{stage.bytes / 1e6:7.0f}{time:8.0f}  {part}"
        )
    head = (
        f"{block.model} batch {block.batch} {rates.device}, a {place} block: {total / 1e3:.2f} ms"
    )
    return [head, f"{'launch':28}{'GFLOP':>8}{'MB':>7}{'µs':>8}  part", *lines]


if __name__ == "__main__":
    raise SystemExit(main())
