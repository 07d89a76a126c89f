# SPDX-License-Identifier: Apache-2.0
"""Limits on machine code: what is counted, and that each limit sees the code it is for."""

import dataclasses
import json

import pytest
from offline_gate import gate

from benchmarks import machine_code, rates
from benchmarks.machine_code import Code, faults, needed_products, tables
from benchmarks.sass import Loop, loops, together

GPU = "3.6.0"  # the Triton of the counts in rates.json
PLANTED = ("--archs", "90", "--jobs", "1", "--launches", "tests.instruments.planted_code")
SASS = """
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IMAD.MOV.U32 R2, RZ, RZ, R3 ;
        /*0020*/              @!P0 BRA `(.L_x_4) ;
.L_x_2:
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R4, gdesc[UR4], R4, gsb0 ;
        /*0040*/                   HGMMA.64x8x16.F32.BF16 R8, R4, gdesc[UR4], R8, gsb0 ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R4, gdesc[UR4], R4, gsb0 ;
        /*0060*/              @P1  MUFU.EX2 R5, R5 ;
        /*0070*/              @!UP0 UIADD3 UR5, UR5, 0x1, URZ ;
        /*0080*/                   ISETP.GE.AND P2, PT, R6, c[0x0][0x10], PT ;
        /*0090*/              @P2  BRA `(.L_x_2) ;
        /*00a0*/                   HMMA.16816.F32.BF16 R4, R4, R6, R8 ;
        /*00b0*/                   WARPGROUP.ARRIVE ;
        /*00c0*/              @P3  BRA `(.L_x_2) ;
        /*00d0*/                   FADD R1, R1, R2 ;
        /*00e0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00f0*/                   EXIT ;
.L_x_5:
        /*0100*/                   BRA `(.L_x_5);
        /*0110*/                   NOP;
"""


def test_loops_of_a_disassembly():
    """The inner loop, to its last way back; neither the outer one nor the end's own jump."""
    found = Loop(10, integer=2, exponentials=1, products=(("64x32", 2), ("64x8", 1)), hmma=1)
    assert loops(SASS) == (found,)
    assert loops(SASS.replace("`(.L_x_2)", "`(.L_x_4)")) == (Loop(
        14, integer=3, exponentials=1, products=found.products, hmma=1
    ),)  # fmt: skip
    assert together([found, found]) == Loop(20, 4, 2, (("64x32", 4), ("64x8", 2)), 2)


def sound(name, version=GPU):
    """Code with a row's counts."""
    row = tables()[version][name]
    m, n = row["tile"]
    head = int(name.split()[-1]) if name.split()[-1].isdigit() else 0
    lines = 2 if name.startswith("forward global") else 1
    constants = {"BLOCK_M": m, "BLOCK_N": n // lines, "LINES": lines}
    constants |= {"ONE_HOT": "windows" in name, "REL": 16}
    constants |= {"HEAD_A": 64, "HEAD_B": 16 if head == 80 else 0}
    products = tuple(row.get("products", {}).items())
    exponentials = m * n // (32 * row["warps"]) + 2 * name.startswith("forward")
    loop = Loop(row["instructions"], row["integer"], exponentials, products, 0)
    if not head:
        loop = dataclasses.replace(loop, hmma=1)
    return Code(name, row["warps"], tuple(constants.items()), loop, row.get("once", 0))


def planted(code, **changes):
    return faults(dataclasses.replace(code, loop=dataclasses.replace(code.loop, **changes)), GPU)


@pytest.mark.parametrize("version", tables())
def test_every_table_is_whole_and_without_faults(version):
    assert list(tables()[version]) == list(tables()[GPU])
    assert len(tables()[GPU]) == 3 * 2 * 2 + 5 * 2 + 4 + 6  # a sum, rows not kept, and narrow ones
    for name in tables()[version]:
        assert faults(sound(name, version), version) == ()


def test_the_triton_at_hand_has_limits():
    triton = pytest.importorskip("triton")
    assert triton.__version__ in tables(), "run python -m benchmarks.machine_code --write"
    assert machine_code.note(triton.__version__) == ""
    assert machine_code.note("0.1").startswith(", whose machine code has no limits; run python -m")
    assert faults(sound("gelu adapter"), "0.1") == ()


def test_the_model_of_a_step_has_the_same_counts():
    newest = {}
    for row in rates.load()["counts"]:
        if row["commit"] != rates.PROPOSED and row["triton"] == GPU:
            newest[row["kernel"]] = row
    assert newest.keys() <= tables()[GPU].keys()
    for name, row in newest.items():
        ours = tables()[GPU][name]
        shared = [key for key in ("tile", "warps", "instructions", "products") if key in row]
        assert {key: row[key] for key in shared} == {key: ours.get(key) for key in shared}, name


def test_products_are_those_of_the_mathematics():
    """One by one: S and dP of 80 terms, the bias's 32; dq and its rest; both factors' gradients."""
    assert needed_products(sound("dq windows 80")) == {
        "64x16": 2 + 4, "64x32": 5 + 5 + 2, "64x64": 2,
    }  # fmt: skip


def test_each_limit_on_attention():
    code = sound("dq windows 80")
    (sentence,) = planted(code, exponentials=17)
    assert sentence == (
        "dq windows 80: 17 exponentials a thread and tile, expected at most 16; weights are "
        "computed more than once"
    )
    (sentence,) = planted(sound("forward global 64"), exponentials=67)
    assert "67 exponentials a thread and tile, expected at most 66" in sentence
    less = (("64x16", 6), ("64x32", 11), ("64x64", 2))
    (sentence,) = planted(code, products=less)
    assert sentence.startswith(
        "dq windows 80: makes 6 of 64x16, 11 of 64x32, 2 of 64x64, expected 6 of 64x16, 12 of 64x32"
    )
    (sentence,) = planted(code, products=(), hmma=9)
    assert sentence.startswith("dq windows 80: makes no WGMMA and 9 HMMA, expected 6 of 64x16, 12")
    (sentence,) = planted(code, hmma=1)
    assert "2 of 64x64 and 1 HMMA, expected" in sentence
    _, narrow = planted(code, products=(("64x8", 4), *code.loop.products))
    assert narrow == (
        "dq windows 80: makes 4 of 64x8, expected none narrower than 64x32; change the tile"
    )
    assert planted(code, instructions=0) == (
        "dq windows 80: no loop found in its machine code",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dkv global 64", "gelu_backward adapter"])
def test_limits_from_counts(name):
    code = sound(name)
    most = int(code.loop.instructions * 1.05)
    assert planted(code, instructions=most) == ()
    (sentence,) = planted(code, instructions=most + 1)
    assert sentence.startswith(f"{name}: {(most + 1) * code.shared_by:.1f} instructions an element")
    assert sentence.endswith("mend the kernel or run python -m benchmarks.machine_code --write")
    (sentence,) = planted(code, integer=int(code.loop.integer * 1.25) + 1)
    assert "of the instructions integer, expected at most" in sentence
    # a larger share of as much integer work
    assert planted(code, instructions=code.loop.instructions // 2) == ()
    unknown = dataclasses.replace(code, name=name.replace("64", "80x").replace("gelu", "elu"))
    (sentence,) = faults(unknown, GPU)
    assert "no counts under Triton 3.6.0; run python -m benchmarks.machine_code" in sentence


def test_element_wise_products_need_tensor_cores():
    assert planted(sound("gelu adapter"), hmma=0, products=()) == (
        "gelu adapter: no product on tensor cores, expected the adapter's there; use tl.dot in 16 "
        "bits",
    )
    assert planted(sound("gelu frozen"), hmma=0) == ()


def test_the_table_of_a_version_is_replaced(tmp_path, monkeypatch):
    before = machine_code.FILE.read_text(encoding="utf-8")
    monkeypatch.setattr(machine_code, "FILE", tmp_path / "machine_code.json")
    machine_code.FILE.write_text(before)
    machine_code._file.cache_clear()
    try:
        machine_code.write(GPU, tables()[GPU])
        assert machine_code.FILE.read_text(encoding="utf-8") == before
        machine_code.write("9.9.9", {"gelu adapter": machine_code.counts(sound("gelu adapter"))})
        data = json.loads(machine_code.FILE.read_text(encoding="utf-8"))
        assert data["triton"].pop("9.9.9") == {"gelu adapter": tables()[GPU]["gelu adapter"]}
        assert data == json.loads(before)
        assert [path.name for path in tmp_path.iterdir()] == ["machine_code.json"]
    finally:
        machine_code._file.cache_clear()


@pytest.mark.slow
def test_a_needless_erf_is_seen():
    code, text = gate(*PLANTED, "--quick")
    assert code == 1, text
    assert "gelu_kernel" in text and "NOT CLEAN" in text
    assert "instructions an element, expected at most 32.1 + 5%" in text


@pytest.mark.slow
def test_planted_kernels_are_seen():
    code, text = gate(*PLANTED)
    assert code == 1 and "8 compiles of 8 launches, 8 wrong" in text, text
    found = {name: text.split(f"\n{name} ")[1].split(" sm_90 ")[1] for name in SEEN}
    for name, sentences in SEEN.items():
        for sentence in sentences:
            assert sentence in found[name], (name, sentence, text)


SEEN = {
    "needless erf": ["instructions an element, expected"],
    "a product of rows by FMA": ["no product on tensor cores"],
    "needless division": ["of the instructions integer, expected"],
    "dq by columns": [
        "16 exponentials a thread and tile, expected at most 8",
        "makes 24 of 64x16, 2 of 64x32, 6 of 64x8, expected 6 of 64x16, 12 of 64x32, 2 of 64x64",
        "makes 6 of 64x8, expected none narrower than 64x32",
        "instructions an element, expected",
    ],
    "dkv by columns": [
        "32 exponentials a thread and tile, expected at most 16",
        "makes 8 of 64x8, expected none narrower",
    ],
    "dkv by HMMA": ["makes no WGMMA and "],
    "a product of attention by FMA": ["makes 6 of 64x64, expected 10 of 64x64"],
    "two loads of few elements": ["instructions an element, expected"],
}


@pytest.mark.slow
def test_all_limited_kernels_are_within_their_limits():
    """Each name is found among the launches."""
    code, text = gate(module="benchmarks.machine_code")
    assert code == 0 and text.rstrip().endswith("within the limits"), text
    for name in tables()[GPU]:
        assert f"\n{name} " in text, name
