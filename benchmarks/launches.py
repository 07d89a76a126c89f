# SPDX-License-Identifier: Apache-2.0
"""Every Triton launch that must compile cleanly, with the sizes it is really made at.

One generator for each operation, named after it and listed in ``OPERATIONS``. ``operation(quick)``
yields (name, launches): a name such as "lora_linear bfloat16 r4", and the list that ``recording()``
filled while the operation's launchers ran on meta tensors. To add an operation, write its generator
and list it. With quick it yields a configuration or two of its usual use, otherwise every dtype,
each tile of its tiles.json, each option, and the largest size that ``supports()`` lets through.
Launches that lead to the same code cost nothing: they are compiled once.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from benchmarks.cubin import SHARED_LIMITS
from benchmarks.offline import Launch, recording
from samfast.kernels._common.windows import Windows


def lora_linear(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """A windowed qkv of ViT-H at batch 4; every padded rank, divisible by sixteen and not."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    if quick:
        full, launches = _lora_linear(4, bf16)
        yield "lora_linear bfloat16 r4", launches[:full]
        return
    for dtype, ranks in ((bf16, (1, 4, 16, 32, 64, 128)), (fp32, (4, 16, 32))):
        for rank in ranks:
            for dropout in (0.0, 0.1) if rank > 1 else (0.0,):
                name = f"lora_linear {str(dtype)[6:]} r{rank}{' dropout' if dropout else ''}"
                yield name, _lora_linear(rank, dtype, dropout)[1]
    others = {
        "bfloat16 r100 dropout": (100, bf16, 0.1),
        "float32 r24 dropout": (24, fp32, 0.1),
        "float16 r4 qv": (4, fp16, 0.0, True),
        "bfloat16 r32 dropout qv shared": (32, bf16, 0.1, True, True),
        "bfloat16 r4 vit_b": (4, bf16, 0.0, False, False, 4900, 768),
    }
    for name, arguments in others.items():
        full, launches = _lora_linear(*arguments)
        yield f"lora_linear {name}", launches[:full]
    with _tf32():
        for rank, dropout in ((4, 0.0), (32, 0.1)):
            full, launches = _lora_linear(rank, fp32, dropout)
            yield f"lora_linear tf32 r{rank}{' dropout' if dropout else ''}", launches[:full]


@contextlib.contextmanager
def _tf32():
    """As where the user lets float32 products run in TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _lora_linear(
    rank, dtype, dropout=0.0, slices=False, shared=False, tokens=4 * 4900, width=1280
) -> tuple[int, list[Launch]]:
    """The launches of a forward and backward, how many these are, and after them those of the
    backwards that make fewer gradients."""
    from samfast.kernels.lora_linear import triton_kernels as kernels
    from samfast.kernels.lora_linear.engine import Slices

    features, out = width, 3 * width

    def meta(*shape, dtype=dtype):
        return torch.empty(*shape, device="meta", dtype=dtype)

    starts = (0, 2 * features) if slices else ()
    n = max(len(starts), 1)
    own = slices and not shared
    a = meta((n if own else 1) * rank, features, dtype=torch.float32)
    b = meta(n * features if slices else out, rank, dtype=torch.float32)
    x, y, layout = meta(tokens, features), meta(tokens, out), Slices(starts, b, own)
    seed = meta(1, dtype=torch.int64) if dropout else None
    with recording() as launches:
        h = kernels.down(x, a, dropout, seed)
        kernels.up_(y, h, b, 2.0, layout)
        kernels.up_backward(y, h, b, 2.0, layout)
        kernels.down_backward_(x, h, x, a, dropout, seed)
        full = len(launches)
        kernels.up_backward(y, None, b, 2.0, layout)
        kernels.down_backward_(None, h, x, a, dropout, seed)
        kernels.down_backward_(x, h, None, a, dropout, seed)
    return full, launches


def conv_experts(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """ViT-H's windows and global maps at batch 4 with eight experts, full and depthwise."""
    from samfast.kernels.conv_experts import triton_kernels as kernels

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    windows, whole = Windows(4, 64, 64, 14, 14), Windows.whole(4, 64, 64)
    usual = _conv_experts(windows, 3, bf16)
    if quick:
        yield "conv_experts bfloat16 r3 windows", usual[:3]
        return
    yield "conv_experts bfloat16 r3 windows", usual
    yield "conv_experts bfloat16 r3 global", _conv_experts(whole, 3, bf16)
    for depthwise in (False, True):
        kind = " depthwise" if depthwise else ""
        for dtype, rank in ((bf16, 4), (fp32, 16), (fp16, 64)):
            for form, name in ((windows, "windows"), (whole, "global")):
                launches = _conv_experts(form, rank, dtype, depthwise)
                yield f"conv_experts {str(dtype)[6:]} r{rank} {name}{kind}", launches
    yield "conv_experts float32 r1 odd", _conv_experts(windows, 1, fp32, ratios=(1, 3))
    many = kernels.MAX_EXPERTS
    yield f"conv_experts float32 r3 M{many}", _conv_experts(windows, 3, fp32, ratios=(2,) * many)
    yield "conv_experts float32 r3 no gelu", _conv_experts(windows, 3, fp32, activation="none")


def _conv_experts(
    windows, rank, dtype, depthwise=False, ratios=tuple(range(1, 9)), activation="gelu"
) -> list[Launch]:
    """The launches of a layer's forward and backward, and of the backwards that make less."""
    from samfast.kernels.conv_experts import triton_kernels as kernels

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, device="meta", dtype=dtype)

    experts = len(ratios)
    h = meta(windows.tokens, rank, dtype=dtype)
    pad = meta(windows.batch * windows.pads, rank, dtype=dtype)
    weight, bias = meta(experts, rank, 1 if depthwise else rank, 3, 3), meta(experts, rank)
    index = meta(windows.samples, dtype=torch.int64)
    inputs = (h, weight, bias, index, windows, ratios, True, activation)
    balance = (meta(), meta(windows.samples, rank), meta(2, rank, experts))
    with recording() as launches:
        kernels.forward(*inputs)
        kernels.backward(h, pad, *inputs, balance, (True, True))
        kernels.backward(h, None, *inputs, None, (True, False))
        kernels.backward(h, None, *inputs, None, (False, True))
    return launches


def expert_gate(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """The gate of ViT-H's windows at batch 4, training and not, and of the widest tiles."""
    windows, whole = Windows(4, 64, 64, 14, 14), Windows.whole(4, 64, 64)
    yield "expert_gate bfloat16 r3", _expert_gate(windows, 3, 8, torch.bfloat16)
    if quick:
        return
    for noisy, given in ((True, True), (False, False), (False, True)):
        launches = _expert_gate(whole, 4, 8, torch.float32, noisy, given)
        yield f"expert_gate float32 r4{' noise' if noisy else ''}", launches
    from samfast.kernels.expert_gate.triton_kernels import MAX_EXPERTS, MAX_RANK

    launches = _expert_gate(windows, MAX_RANK, MAX_EXPERTS, torch.float16)
    yield f"expert_gate float16 r{MAX_RANK} M{MAX_EXPERTS}", launches


def _expert_gate(windows, rank, experts, dtype, noisy=True, given=False) -> list[Launch]:
    from samfast.kernels.expert_gate import triton_kernels as kernels

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, device="meta", dtype=dtype)

    noise = meta(windows.samples, experts) if noisy else None
    index = meta(windows.samples, dtype=torch.int64) if given else None
    h, weight = meta(windows.tokens, rank, dtype=dtype), meta(rank, experts)
    with recording() as launches:
        kernels.forward(h, weight, weight, noise, index, windows, 0.01)
    return launches


def adapt_former(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """The branch beside ViT-H's and ViT-B's MLPs at batch 4; every padded bottleneck, rows that are
    no multiple of sixteen elements, float32 rows beside narrow products."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    usual = _adapt_former(1280, 16, bf16, bf16, 0.1)
    if quick:
        yield "adapt_former bfloat16 v16", usual[:3]
        return
    yield "adapt_former bfloat16 v16", usual
    yield "adapt_former bfloat16 v8 vit_b", _adapt_former(768, 8, bf16, bf16, 0.0)
    for dtype, widest in ((bf16, 128), (fp32, 32)):
        for bottleneck in (v for v in (16, 24, 32, 64, 100, 128) if v <= widest):
            name = f"adapt_former {str(dtype)[6:]} v{bottleneck}"
            yield name, _adapt_former(1280, bottleneck, dtype, dtype, 0.1)
    yield "adapt_former float16 v16", _adapt_former(1280, 16, fp16, fp16, 0.1)
    for bottleneck in (16, 32, 64, 128):
        name = f"adapt_former bfloat16 v{bottleneck} float32 rows"
        yield name, _adapt_former(768, bottleneck, bf16, fp32, 0.1)
    with _tf32():
        for bottleneck in (16, 32):
            yield f"adapt_former tf32 v{bottleneck}", _adapt_former(1280, bottleneck, fp32, fp32)
    for bottleneck, dtype in ((1, bf16), (128, bf16), (32, fp32)):
        name = f"adapt_former {str(dtype)[6:]} v{bottleneck} odd"
        yield name, _adapt_former(100, bottleneck, dtype, dtype, 0.1, tokens=4 * 4096 - 1)
    yield "adapt_former bfloat16 v128 odd float32 rows", _adapt_former(100, 128, bf16, fp32, 0.1)


def _adapt_former(
    width, bottleneck, dtype, rows, dropout=0.0, tokens=4 * 4096, small=torch.float32
) -> list[Launch]:
    """The three launches of a forward and backward up to z, and those of backwards that make less
    or add to a gradient that is there."""
    from samfast.kernels.adapt_former import triton_kernels as kernels

    def meta(*shape, dtype=small):
        return torch.empty(*shape, device="meta", dtype=dtype)

    x, dx = meta(tokens, width, dtype=rows), meta(tokens, width, dtype=rows)
    norm = (meta(width), meta(width))
    down, down_bias = meta(bottleneck, width), meta(bottleneck)
    seed = meta(1, dtype=torch.int64) if dropout else None
    with recording() as launches:
        z = kernels.low(x, *norm, down, down_bias, 1e-5, dropout, seed, dtype)
        for onto, needs in (
            (dx, (True,) * 5),
            (None, (True,) * 5),
            (None, (True, *(False,) * 4)),
            (dx, (True, *(False,) * 4)),
            (None, (False, *(True,) * 4)),
            (None, (False, True, False, False, True)),
        ):
            kernels.low_backward(onto, z, z, x, *norm, down, 1e-5, dropout, needs)
    return launches


def cobot_fold(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """All of ViT-H's layers at once, and one alone; the widest tile."""
    yield "cobot_fold float32 v4", _cobot_fold(4, 32, 2, False)
    if quick:
        return
    yield "cobot_fold float32 v16 down", _cobot_fold(16, 32, 1, True)
    yield "cobot_fold float32 v4 alone", _cobot_fold(4, 1, 2, False)
    from samfast.kernels.cobot_fold.triton_kernels import MAX_WIDTH

    for dtype, down in ((torch.float32, False), (torch.bfloat16, True)):
        launches = _cobot_fold(MAX_WIDTH, 3, 1, down, dtype)
        yield f"cobot_fold {str(dtype)[6:]} v{MAX_WIDTH}{' down' if down else ''}", launches


def _cobot_fold(width, layers, own, down, dtype=torch.float32, rows=1280) -> list[Launch]:
    from samfast.kernels.cobot_fold import triton_kernels as kernels

    def meta(*shape):
        return torch.empty(shape, device="meta", dtype=dtype)

    slices = max(64, layers * own)
    lists = [
        [meta(own * width)] * layers,
        [meta(own, 4, width // 4, width // 4)] * layers,
        [meta(width, rows) if down else meta(own * rows, width)] * layers,
        [meta(width)] * layers if down else [],
    ]
    c, p = meta(1, width, slices), meta(slices, slices)
    with recording() as launches:
        folded, shifts = kernels.forward(c, p, *lists, 0, down)
        kernels.backward(folded, shifts if down else None, c, p, *lists, 0, down)
    return launches


def hypercomplex(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """PHM at ViT-B's lin1 and at sizes of heads, each n, and the factors of Kronecker adapters."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    usual, factors = (
        _hypercomplex(4, 4, 768, 192, bf16),
        _kronecker_factors(4, 4, 576, 192, 1, fp32),
    )
    if quick:
        yield "hypercomplex bfloat16 n4", usual[:3]
        yield "hypercomplex factors n4", factors[:2]
        return
    yield "hypercomplex bfloat16 n4", usual
    yield "hypercomplex factors n4", factors
    for n in (2, 3, 8, 16):
        yield f"hypercomplex bfloat16 n{n}", _hypercomplex(n, n, 3072 // n, 768 // n, bf16)
        yield f"hypercomplex float32 n{n}", _hypercomplex(n, n, 3072 // n, 768 // n, fp32)
    yield "hypercomplex float32 n4", _hypercomplex(4, 4, 1280, 320, fp32)
    yield "hypercomplex float16 n4", _hypercomplex(4, 4, 1280, 320, fp16)
    yield "hypercomplex float32 head of 4", _hypercomplex(4, 4, 1, 1, fp32)
    yield "hypercomplex float32 head of 16", _hypercomplex(4, 4, 4, 4, fp32)
    yield "hypercomplex bfloat16 n4 odd", _hypercomplex(4, 4, 101, 67, bf16)
    yield "hypercomplex bfloat16 base", _hypercomplex(4, 1, 960, 320, bf16, base=bf16)
    yield "hypercomplex bfloat16 float32 base", _hypercomplex(4, 1, 960, 320, bf16, base=fp32)
    yield "hypercomplex bfloat16 parameters", _hypercomplex(8, 16, 160, 160, bf16, bf16)
    for n, rank, dtype in ((2, 4, fp32), (8, 2, fp32), (4, 1, bf16), (16, 1, fp16)):
        launches = _kronecker_factors(n, n, 3840 // n, 1280 // n, rank, dtype)
        yield f"hypercomplex factors {str(dtype)[6:]} n{n} r{rank}", launches
    yield "hypercomplex factors odd", _kronecker_factors(1, 3, 101, 67, 3, fp32)


def _hypercomplex(n, terms, rows, columns, dtype, parameters=torch.float32, base=None):
    """The launches of a forward and backward, and of backwards that make less."""
    from samfast.kernels.hypercomplex import triton_kernels as kernels

    def meta(*shape, dtype=parameters):
        return torch.empty(shape, device="meta", dtype=dtype)

    rules, weights = meta(terms, n, n), meta(terms, rows, columns)
    size = n * rows, n * columns
    with recording() as launches:
        base = None if base is None else meta(*size, dtype=base)
        kernels.build(rules, weights, base, 0.5, dtype)
        grad = meta(*size, dtype=dtype)
        for needs in ((True, True), (True, False), (False, True)):
            kernels.contract(grad, rules, weights, 0.5, needs)
    return launches


def _kronecker_factors(terms, n, rows, columns, rank, dtype) -> list[Launch]:
    """The launches of a forward and backward, and of backwards that make less."""
    from samfast.kernels.hypercomplex import triton_factors as kernels

    def meta(*shape):
        return torch.empty(shape, device="meta", dtype=dtype)

    parts = meta(terms, n, n), meta(terms, rows, rank), meta(terms, columns, rank)
    with recording() as launches:
        da, db = kernels.forward(*parts, dtype)
        kernels.backward(da, db, *parts, (True, True, True))
        kernels.backward(None, db, *parts, (True, False, False))
        kernels.backward(None, db, *parts, (False, True, False))
        kernels.backward(da, None, *parts, (False, False, True))
    return launches


def task_core(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """A windowed qkv of ViT-L at batch 4 with three tasks, and the cores of all its layers."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    usual = _task_core((32, 32, 4), bf16)
    yield "task_core bfloat16 r32", usual[:4] if quick else usual
    if quick:
        return
    for dtype in (bf16, fp16, fp32):
        for rank in (4, 16, 32, 64):
            name = f"task_core {str(dtype)[6:]} r{rank}"
            yield name, _task_core((rank, rank, 4), dtype)
    yield "task_core float32 r64x5", _task_core((64, 5, 3), fp32, entries=12)
    yield "task_core bfloat16 r7x64", _task_core((7, 64, 17), bf16, tasks=2)
    yield "task_core bfloat16 r40x24", _task_core((40, 24, 4), bf16, tokens=4 * 341)
    yield "task_core bfloat16 cores", _task_core((32, 32, 4), bf16, cores=bf16)


def _task_core(
    ranks, dtype, tasks=3, entries=3, tokens=12 * 4900, cores=torch.float32
) -> list[Launch]:
    """The launches of both forwards and backwards, and of the backwards that make less."""
    from samfast.kernels.task_core import triton_kernels as kernels

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, device="meta", dtype=dtype)

    rows, _, depth = ranks
    gathered = meta(24, *ranks, dtype=cores), meta(24, tasks, depth, dtype=cores)
    with recording() as launches:
        m = kernels.fold(*gathered)[:1].expand(kernels.PARTS, -1, -1, -1)
        dm = meta(24, kernels.PARTS, *m.shape[1:], dtype=torch.float32)
        kernels.fold_backward(dm, *gathered)
        h, task = meta(tokens, rows), meta(entries, dtype=torch.int64)
        z = kernels.product(h, m, task)
        for needs in ((True, True), (True, False), (False, True)):
            kernels.product_backward(z, h, m, task, needs)
    return launches


def relpos_attention(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """ViT-H's windows and ViT-B's global maps; each width of a head, way of the bias and padding.

    Some GPUs have tiles of their own, so each call is recorded with theirs and everyone else's.
    """
    from samfast.kernels.relpos_attention.triton_kernels import FLOAT32_HEAD

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    windows, whole = Windows(4, 64, 64, 14, 14), Windows.whole(4, 64, 64)
    cut, uncut = _relpos_attention(windows, 16, 80, bf16), _relpos_attention(whole, 12, 64, bf16)
    if quick:  # the one for WGMMA, the other for HMMA
        cut, uncut = _only(90, cut), _only(86, uncut)
    yield "relpos_attention bfloat16 hd80 windows", cut
    yield "relpos_attention bfloat16 hd64 global", uncut
    if quick:
        return
    for name, form in (("windows", windows), ("global", whole)):
        for head_dim in (16, 48, 64, 80, 112, 128):
            launches = _relpos_attention(form, 16, head_dim, bf16)
            yield f"relpos_attention bfloat16 hd{head_dim} {name}", launches
        for head_dim in (48, FLOAT32_HEAD):
            launches = _relpos_attention(form, 16, head_dim, fp32)
            yield f"relpos_attention float32 hd{head_dim} {name}", launches
        yield f"relpos_attention float16 hd80 {name}", _relpos_attention(form, 16, 80, fp16)
        with _tf32():
            yield f"relpos_attention tf32 hd64 {name}", _relpos_attention(form, 12, 64, fp32)
    odd, long = Windows.whole(4, 9, 13), Windows.whole(1, 96, 160)
    yield "relpos_attention bfloat16 hd80 odd", _relpos_attention(odd, 16, 80, bf16)
    yield "relpos_attention bfloat16 hd64 long", _relpos_attention(long, 12, 64, bf16)
    lines = Windows(4, 64, 64, 20, 20)
    yield "relpos_attention bfloat16 hd80 lines", _relpos_attention(lines, 16, 80, bf16)
    for pads in ("rows", "none"):
        for wanted in (True, False):
            launches = _relpos_attention(windows, 16, 80, bf16, pads, wanted, wanted)
            yield f"relpos_attention bfloat16 pads {pads}{'' if wanted else ' fixed'}", launches
    launches = _relpos_attention(windows, 12, 64, bf16, "bias", False, False)
    yield "relpos_attention bfloat16 hd64 fixed", launches


def _only(arch: int, launches: list[Launch]) -> list[Launch]:
    chosen = [launch for launch in launches if not launch.archs or arch in launch.archs]
    return [dataclasses.replace(launch, archs=(arch,)) for launch in chosen]


def _relpos_attention(
    windows, heads, head_dim, dtype, pads="bias", want_pads=True, want_tables=True
) -> list[Launch]:
    """The launches of a forward and backward on packed qkv, with each GPU's tiles for that GPU."""
    from samfast.kernels.relpos_attention import tiling

    own = {f"sm_{arch}": (arch,) for arch in SHARED_LIMITS if f"sm_{arch}" in tiling.targets()}
    others = tuple(arch for arch in SHARED_LIMITS if f"sm_{arch}" not in own)
    launches, target = [], tiling.target
    try:
        for name, archs in (own | {"default": others}).items():
            tiling.target = lambda x, name=name: name
            for launch in _relpos_launches(
                windows, heads, head_dim, dtype, pads, want_pads, want_tables
            ):
                launches.append(dataclasses.replace(launch, archs=archs))
    finally:
        tiling.target = target
    return launches


def _relpos_launches(windows, heads, head_dim, dtype, pads, want_pads, want_tables):
    from samfast.kernels.relpos_attention import triton_kernels as kernels

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, device="meta", dtype=dtype)

    shape = (windows.batch, windows.image_height, windows.image_width)
    qkv, dqkv = (meta(*shape, 3, heads, head_dim).unbind(3) for _ in range(2))
    rows = (windows.batch, windows.pads, 3, heads, head_dim)
    pad = (None, None, None)
    if windows.pads and pads != "none":
        pad = (meta(*rows) if pads == "rows" else meta(3, heads, head_dim).expand(rows)).unbind(2)
    dpad = meta(*rows).unbind(2) if windows.pads and want_pads else (None, None, None)
    sizes = windows.height, windows.width
    tables = [meta(2 * size - 1, head_dim, dtype=torch.float32) for size in sizes]
    inputs = (*qkv, *pad[1:], *tables)
    with recording() as launches:
        out, lse = kernels.forward(*inputs, windows, 0.125)
        kernels.backward(
            meta(*shape, heads, head_dim), *inputs, out, lse, windows, 0.125, *dqkv, *dpad[1:],
            want_tables,
        )  # fmt: skip
    return launches


def sam_block(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """The element-wise stages of ViT-H and ViT-B at batch 4; every tile, of each kind of rows."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    usual = _sam_block(1280, 4, bf16, bf16)
    if quick:
        yield "sam_block bfloat16 r4", usual[:6]
        return
    yield "sam_block bfloat16 r4", usual
    yield "sam_block bfloat16 r4 float32 residual", _sam_block(768, 4, bf16, fp32)
    from samfast.kernels.sam_block.triton_kernels import MAX_RANK

    for rank in (16, 32, 64, MAX_RANK[2]):
        yield f"sam_block bfloat16 r{rank}", _sam_block(1280, rank, bf16, bf16)
    name = f"sam_block bfloat16 r{MAX_RANK[2]} float32 residual"
    yield name, _sam_block(1280, MAX_RANK[2], bf16, fp32)
    for rank in (3, MAX_RANK[4]):
        yield f"sam_block float32 r{rank}", _sam_block(1280, rank, fp32, fp32)
        with _tf32():
            yield f"sam_block tf32 r{rank}", _sam_block(1280, rank, fp32, fp32)
    yield "sam_block float16 r4 float32 residual", _sam_block(1280, 4, fp16, fp32)
    yield "sam_block float16 r4", _sam_block(1280, 4, fp16, fp16)
    odd = 4 * 4096 - 1
    yield "sam_block bfloat16 r1 odd", _sam_block(100, 1, bf16, bf16, tokens=odd)
    yield "sam_block bfloat16 r128 odd", _sam_block(100, MAX_RANK[2], bf16, fp32, tokens=odd)
    yield "sam_block float32 r32 odd", _sam_block(100, MAX_RANK[4], fp32, fp32, tokens=odd)
    yield "sam_block bfloat16 r3 bfloat16 norm", _sam_block(1024, 3, bf16, bf16, affine=bf16)


def _sam_block(width, rank, dtype, residual, tokens=4 * 4096, affine=torch.float32) -> list[Launch]:
    """The launches of the stages: the six of an adapted layer's, with more and less wanted, and
    without an adapter."""
    from samfast.kernels.sam_block import triton_kernels as kernels

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, device="meta", dtype=dtype)

    x, update = meta(tokens, width, dtype=residual), meta(tokens, width)
    norm = (meta(width, dtype=affine), meta(width, dtype=affine), 1e-6)
    u, dh = meta(tokens, 4 * width), meta(tokens, rank)
    a, wide_a = (meta(rank, n, dtype=torch.float32) for n in (width, 4 * width))
    with recording() as launches:
        for lora_a, wide in ((a, wide_a), (None, None)):
            kernels.norm(x, *norm, dtype, lora_a)
            kernels.add_norm(x, update, *norm, dtype, lora_a)
            kernels.gelu(u, wide)
            for want, need_a in ((False, True), (True, True), (False, False)):
                low = None if lora_a is None else (dh, lora_a, need_a)
                kernels.norm_backward(update, x, *norm, x, low, want)
                low = None if wide is None else (dh, wide, need_a)
                kernels.gelu_backward(u, u, low, want)
    return launches


OPERATIONS = (
    lora_linear,
    conv_experts,
    expert_gate,
    cobot_fold,
    adapt_former,
    hypercomplex,
    task_core,
    relpos_attention,
    sam_block,
)


def registered(quick: bool) -> Iterator[tuple[str, list[Launch]]]:
    """(name, launches) of every operation."""
    for operation in OPERATIONS:
        yield from operation(quick)
