# SPDX-License-Identifier: Apache-2.0
"""What the loops of a kernel execute, counted in its disassembly."""

import collections
import dataclasses
import re
from collections.abc import Iterable

LEAST = 8  # instructions of a loop; shorter ones pad the end of a kernel
_INTEGER = re.compile(  # addresses and masks: on integers, and all of the uniform unit's arithmetic
    r"(IMAD|ISETP|IADD3|IABS|LEA|SEL|VIADD|SHF|P?LOP3|[IV]MNMX|VIMNMX|I2F|F2I|I2I"
    r"|U(IADD3|IMAD|IABS|VIMNMX|VIADD|MOV|LEA|SHF|SGXT|P?LOP3|SEL|ISETP|PRMT|BMSK|FLO|POPC))"
)
_LINE = re.compile(r"^\s*(?:(\.L\w+):|/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Loop:
    """What one warp executes in one turn of an innermost loop.

    products: ("64xN", how many) for every shape of WGMMA   hmma: of the older tensor core product
    """

    instructions: int
    integer: int = 0
    exponentials: int = 0
    products: tuple[tuple[str, int], ...] = ()
    hmma: int = 0


def instructions(text: str) -> int:
    """Of one kernel, as nvdisasm prints it, without those that fill up its end."""
    return sum(name != "NOP" for name in (line.split()[0] for line in _code(text)[0]))


def _code(text: str) -> tuple[list[str], dict[str, int]]:
    """The instructions without their predicates, and where labels are."""
    code, labels = [], {}
    for label, instruction in _LINE.findall(text):
        if label:
            labels[label] = len(code)
        else:
            code.append(re.sub(r"^@!?U?P\w+\s+", "", instruction))
    return code, labels


def loops(text: str) -> tuple[Loop, ...]:
    """The innermost loops of one kernel, as nvdisasm prints it, in order; of one without any, all
    of its code."""
    code, labels = _code(text)
    ends: dict[int, int] = {}
    for i, instruction in enumerate(code):
        target = re.match(r"BRA\b.*?(\.L\w+)", instruction)
        if target and labels.get(target[1], i + 1) <= i:
            ends[labels[target[1]]] = i  # the last of several ways back to one start
    spans = [
        (start, end)
        for start, end in sorted(ends.items())
        if not any(start < other <= end and ends[other] <= end for other in ends)
    ]
    found = tuple(_count(code[a : b + 1]) for a, b in spans if b + 1 - a >= LEAST)
    ends = [i for i, instruction in enumerate(code) if instruction.startswith("EXIT")]
    return found or (_count(code[: ends[-1] + 1]),) if ends else found


def _count(body: list[str]) -> Loop:
    names = [instruction.split()[0] for instruction in body]
    shapes = [found[1] for name in names if (found := re.match(r"HGMMA\.(64x\d+)x\d+", name))]
    return Loop(
        instructions=len(body),
        integer=sum(_INTEGER.fullmatch(name.split(".")[0]) is not None for name in names),
        exponentials=sum(name.startswith("MUFU.EX2") for name in names),
        products=tuple(sorted(collections.Counter(shapes).items())),
        hmma=sum(name.startswith("HMMA.") for name in names),
    )


def together(found: Iterable[Loop]) -> Loop:
    """Several loops, such as two walks over the same rows, as one."""
    found = list(found)
    products = collections.Counter()
    for loop in found:
        products.update(dict(loop.products))
    return Loop(
        instructions=sum(loop.instructions for loop in found),
        integer=sum(loop.integer for loop in found),
        exponentials=sum(loop.exponentials for loop in found),
        products=tuple(sorted(products.items())),
        hmma=sum(loop.hmma for loop in found),
    )
