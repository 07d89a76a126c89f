# SPDX-License-Identifier: Apache-2.0
"""Limits on what the hot loops of kernels execute on sm_90.

python -m benchmarks.machine_code          count, and compare with the limits
python -m benchmarks.machine_code --write  make today's counts the limits of this Triton

``benchmarks/offline.py`` asks ``limited`` and ``faults`` about every compile. They know the
attention kernels and a block's element-wise kernels, in bfloat16 at SAM's sizes. A tile's
exponentials and tensor core products must be those of its mathematics. Instructions and their
integer share are compared with the counts in machine_code.json, one table for each version of
Triton. A version without a table is not checked.
"""

import argparse
import collections
import dataclasses
import functools
import json
import math
import os
from pathlib import Path

from benchmarks.sass import Loop, together
from samfast.kernels.sam_block.costs import NARROW

FILE = Path(__file__).with_name("machine_code.json")
ARCH = 90
NARROWEST = 32  # columns of a WGMMA; narrower ones wait for the operand in shared memory
DEPTH, ROWS, WARPGROUP, WARP = 16, 64, 4, 32  # of one WGMMA in 16 bits; warps; threads
ATTENTION = ("forward", "dq", "dkv")
ROWS_KEPT = ("norm_row", "norm_row_backward", "add_row")  # all columns of a row are the tile's
ELEMENTWISE = ("norm", "norm_backward", *ROWS_KEPT, "gelu", "gelu_backward")
_HEADS = (64, 80)
_PLACES = {  # constants of a launch of attention
    "windows": {"ONE_HOT": True, "PADS": 2},
    "global": {"ONE_HOT": False, "PADS": 0, "FLAT": True, "FULL": True, "EVEN": True},
}
_WRITE = "python -m benchmarks.machine_code --write"
_TYPES = {"x_ptr": "*bf16", "u_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*fp32"}


@dataclasses.dataclass(frozen=True)
class Code:
    """The hot loop of a kernel that has limits; one turn of it makes one tile.

    name: as in rates.json, such as "dq windows 80"   constants: (name, value), of the launch
    once: instructions outside the loop, of a kernel that makes factors of the bias there
    """

    name: str
    warps: int
    constants: tuple[tuple[str, object], ...]
    loop: Loop
    once: int = 0

    @property
    def tile(self) -> tuple[int, int]:
        constants = dict(self.constants)
        several = constants.get("CHUNKS", 1) * constants.get("LINES", 1)
        return self["BLOCK_M"], self["BLOCK_N"] * several

    @property
    def shared_by(self) -> float:
        """Instructions an element of the tile for each instruction of a warp."""
        return WARP * self.warps / math.prod(self.tile)

    def __getitem__(self, constant: str):
        return dict(self.constants)[constant]

    def __str__(self) -> str:
        loop = self.loop
        return (
            f"{self.name:22} {self.tile[0]:4}x{self.tile[1]:<4} {self.warps} warps "
            f"{loop.instructions:5} instructions {loop.instructions * self.shared_by:5.1f} "
            f"an element {loop.integer / loop.instructions:4.0%} integer {loop.exponentials:3} EX2 "
            f"{loop.hmma:3} HMMA  {_listed(dict(loop.products))}"
            f"{f', {self.once} once' if self.once else ''}"
        )


def limited(
    source, warps: int, arch: int, found: tuple[Loop, ...], instructions: int = 0
) -> Code | None:
    """The Code of a compile, None for a kernel without limits.

    source: Triton's ASTSource   found: the loops of its machine code, which has instructions
    """
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    divisible = {names[path[0]] for path, known in source.attrs.items() if known}
    stage = source.fn.__name__.removesuffix("_kernel")
    name = None
    if arch == ARCH and stage in ATTENTION:
        name = _of_attention(stage, constants, source.signature)
    elif arch == ARCH and stage in ELEMENTWISE and "columns" in divisible:
        name = _of_rows(stage, constants, source.signature)
    if name is None:
        return None
    numbers = tuple((n, v) for n, v in constants.items() if n.isupper())
    if stage in ELEMENTWISE:
        loop = together(found)
    else:
        loop = max(found, key=lambda each: each.instructions, default=Loop(0))
    factors = stage in ("forward", "dq") and "windows" in name
    return Code(name, warps, numbers, loop, instructions - loop.instructions if factors else 0)


def _of_attention(stage, constants, types):
    if types.get("q_ptr") != "*bf16" or constants.get("HEAD") not in _HEADS:
        return None  # conv_experts has a forward_kernel too
    if constants["REL"] == 0:  # without a bias
        return None
    for place, needed in _PLACES.items():
        if all(constants[name] == value for name, value in needed.items()):
            return f"{stage} {place} {constants['HEAD']}"
    return None


def _of_rows(stage, constants, types):
    for name, kind in _TYPES.items():
        if types.get(name, kind) != kind:
            return None
    if stage in ROWS_KEPT:
        return _of_rows_kept(stage, constants)
    adapter = constants["DOWN"] if "DOWN" in constants else constants["LOW"]
    # As a block asks for them: a norm also gives its output, which dA is made of.
    usual = constants.get("WANT", False) == (adapter and stage == "norm_backward")
    if constants["BLOCK_R"] != DEPTH or not usual or constants.get("NEED_DA", adapter) != adapter:
        return None
    if stage.startswith("gelu") and constants["LEFT"] != 4 * adapter:
        return None
    if stage == "gelu_backward" and not _as_counted(constants, adapter):
        return None
    kind = "adapter" if adapter else "frozen"
    if stage.startswith("norm"):
        kind = f"wide {kind}"  # of ranks, or columns, whose rows are not kept
    return f"{'add_' if constants.get('ADD') else ''}{stage} {kind}"


def _of_rows_kept(stage, constants):
    """As a block asks for them: with an adapter of rank 4 on each layer, or none."""
    ranks = constants.get("RANKS", constants.get("UP"))
    usual = constants["FULL"] and ranks in (0, 4) and not constants.get("WANT")
    usual = usual and constants.get("NEED_DA", ranks > 0) == (ranks > 0)
    if constants.get("ADD"):
        usual = usual and constants["UP"] == ranks
    if not usual:
        return None
    name, kind = stage.replace("_row", ""), "adapter" if ranks else "frozen"
    if constants["BLOCK_N"] < constants.get("CHUNKS", 1) * constants["BLOCK_N"] <= NARROW:
        kind = f"narrow {kind}"
    return f"{'add_' if constants.get('ADD') else ''}{name} {kind}"


def _as_counted(constants, adapter: bool) -> bool:
    """Whether GELU's backward makes all that a block asks for, of four columns of dh at most."""
    few = constants["RANKS"] in range(1, 5) if adapter else True
    return few and constants["UP"] == constants["NEED_DB"] == adapter


def faults(code: Code | None, version: str) -> tuple[str, ...]:
    """What is wrong with a kernel's code under a version of Triton, a sentence each."""
    if code is None or version not in tables():
        return ()
    if not code.loop.instructions:
        return (f"{code.name}: no loop found in its machine code",)
    attention = code.name.split()[0] in ATTENTION
    found = [_twice(code), _products(code), _narrow(code)] if attention else [_cores(code)]
    if row := tables()[version].get(code.name):
        found += [check(code, row, version) for check in (_instructions, _once, _integer)]
    else:
        found.append(f"no counts under Triton {version}; run {_WRITE}")
    return tuple(f"{code.name}: {sentence}" for sentence in found if sentence)


def _twice(code):
    """One for each element; the forward has one more for each of a thread's rows."""
    most = math.prod(code.tile) // (WARP * code.warps)
    if code.name.startswith("forward"):
        most += 2 * max(1, code["BLOCK_M"] // (ROWS * code.warps // WARPGROUP))
    if code.loop.exponentials > most:
        return (
            f"{code.loop.exponentials} exponentials a thread and tile, expected at most {most}; "
            "weights are computed more than once"
        )
    return None


def needed_products(code: Code) -> dict[str, int]:
    """The WGMMA of a warp for one tile where warpgroups share its rows and none is made twice."""
    stage = code.name.split()[0]
    rows, columns = code["BLOCK_M"], code["BLOCK_N"]
    if stage == "dkv":
        rows, columns = columns, rows
    turns = max(1, rows // (ROWS * code.warps // WARPGROUP))
    turns *= math.prod(code.tile) // (rows * columns)
    head = (code["HEAD_A"] + code["HEAD_B"]) // DEPTH
    hot = 2 * code["REL"] // DEPTH if code["ONE_HOT"] else 0  # rel_h and rel_w
    found = collections.Counter()
    found[columns] += (1 if stage == "forward" else 2) * head + hot
    for width in filter(None, (code["HEAD_A"], code["HEAD_B"])):
        found[width] += (2 if stage == "dkv" else 1) * columns // DEPTH
    if stage == "dq" and code["ONE_HOT"]:
        found[code["REL"]] += 2 * columns // DEPTH
    return {f"{ROWS}x{width}": turns * number for width, number in sorted(found.items())}


def _products(code):
    made, needed = dict(code.loop.products), needed_products(code)
    if code.loop.hmma or made != needed:
        older = f" and {code.loop.hmma} HMMA" if code.loop.hmma else ""
        return (
            f"makes {_listed(made) or 'no WGMMA'}{older}, expected {_listed(needed)}; a product is "
            "made twice, by columns or without WGMMA"
        )
    return None


def _narrow(code):
    """The rest of a head and a factor of the bias are as narrow as they are."""
    usual = (code["HEAD_B"], code["REL"])
    narrow = {
        shape: number
        for shape, number in code.loop.products
        if (width := int(shape.split("x")[1])) < NARROWEST and width not in usual
    }
    if narrow:
        return (
            f"makes {_listed(narrow)}, expected none narrower than {ROWS}x{NARROWEST}; "
            "change the tile"
        )
    return None


def _cores(code):
    constants = dict(code.constants)  # of so few ranks that no core is asked
    by_threads = max(constants.get("RANKS", 0), constants.get("UP", 0)) > 0
    cores = by_threads or code.loop.hmma or code.loop.products
    if code.name.endswith("adapter") and not cores:
        return "no product on tensor cores, expected the adapter's there; use tl.dot in 16 bits"
    return None


def _instructions(code, row, version):
    before = _as_code(code, row)
    now, then = (c.loop.instructions * c.shared_by for c in (code, before))
    if now > then * (1 + slack()["instructions"]):
        return (
            f"{now:.1f} instructions an element, expected at most {then:.1f} + "
            f"{slack()['instructions']:.0%} (Triton {version}); mend the kernel or run {_WRITE}"
        )
    return None


def _once(code, row, version):
    if code.once > row.get("once", 0) * (1 + slack()["instructions"]):
        return (
            f"{code.once} instructions outside the loop, expected at most {row.get('once', 0)} + "
            f"{slack()['instructions']:.0%} (Triton {version}); mend the kernel or run {_WRITE}"
        )
    return None


def _integer(code, row, version):
    """A larger share of as much integer work is no fault."""
    before, points = _as_code(code, row), slack()["integer"]
    now, then = (c.loop.integer * c.shared_by for c in (code, before))
    if now <= then * (1 + slack()["instructions"]):
        return None
    now, then = (c.loop.integer / c.loop.instructions for c in (code, before))
    if now > then + points:
        return (
            f"{now:.0%} of the instructions integer, expected at most {then:.0%} + "
            f"{points:.0%} (Triton {version}); mend the kernel or run {_WRITE}"
        )
    return None


def _as_code(code, row):
    tile = dict(zip(("BLOCK_M", "BLOCK_N"), row["tile"], strict=True))
    constants = dict(code.constants) | tile | {"CHUNKS": 1, "LINES": 1}
    return Code(
        code.name,
        row["warps"],
        tuple(constants.items()),
        Loop(row["instructions"], row["integer"]),
    )


def _listed(products: dict[str, int]) -> str:
    return ", ".join(f"{number} of {shape}" for shape, number in products.items())


@functools.cache
def _file() -> dict:
    return json.loads(FILE.read_text(encoding="utf-8"))


def tables() -> dict[str, dict]:
    """Version of Triton -> name -> "tile", "warps", "instructions", "integer", "products"."""
    return _file()["triton"]


def slack() -> dict[str, float]:
    """By what share instructions may grow, and by how much their integer share."""
    return _file()["slack"]


def note(version: str) -> str:
    """What to say beside a version of Triton that is not checked."""
    return "" if version in tables() else f", whose machine code has no limits; run {_WRITE}"


def counts(code: Code) -> dict:
    """The row of a table."""
    row = {"tile": list(code.tile), "warps": code.warps}
    row |= {"instructions": code.loop.instructions, "integer": code.loop.integer}
    products = dict(code.loop.products)
    row |= {"once": code.once} if code.once else {}
    return row | ({"products": products} if products else {})


def write(version: str, rows: dict[str, dict]) -> None:
    """Replace the table of one version, a row a line; the others stay."""
    data = {"slack": slack(), "triton": dict(sorted((tables() | {version: rows}).items()))}
    tables_text = ",\n".join(
        f"{json.dumps(of)}: {{\n"
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in table.items())
        + "\n}"
        for of, table in data["triton"].items()
    )
    new = FILE.with_name(f"{FILE.name}.tmp")
    text = f'{{\n"slack": {json.dumps(data["slack"])},\n"triton": {{\n{tables_text}\n}}\n}}\n'
    new.write_text(text, encoding="utf-8")
    os.replace(new, FILE)
    _file.cache_clear()


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description="count the machine code of the limited kernels")
    parser.add_argument("--write", action="store_true", help="make the counts this Triton's limits")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, but interpreted kernels cannot be compiled")
    import triton

    from benchmarks import launches, offline

    named = [*launches.of("relpos_attention")(False), *launches.of("sam_block")(False)]
    first: dict[str, object] = {}
    for job in offline.distinct(named, [ARCH]):
        code = limited(job.source(), 1, ARCH, ())
        if code is not None:
            first.setdefault(code.name, job)
    print(f"triton {triton.__version__}")
    codes, wrong = [], []
    jobs = list(first.values())
    for result in offline.in_processes(offline.compile_one, jobs, options.jobs):
        if isinstance(result, str):
            wrong.append(result)
        else:
            codes.append(result.code)
            print(result.code, flush=True)
    if options.write and not wrong:
        write(triton.__version__, {code.name: counts(code) for code in codes})
    wrong += [sentence for code in codes for sentence in faults(code, triton.__version__)]
    print("\n".join(wrong) or "within the limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
