# SPDX-License-Identifier: Apache-2.0
"""up_backward's partials of dz: some chunks of rows at a time, with the same bits."""

import pytest
import torch

from samfast.kernels.lora_linear import costs, engine

from .cases import runnable

if runnable("triton") or torch.cuda.is_available():
    reason = runnable("triton") or "kernels are compiled, not interpreted, beside a GPU"
    pytest.skip(reason, allow_module_level=True)

from samfast.kernels.lora_linear import triton_kernels as kernels


def draw(*shape, dtype=torch.float16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.slow_on_cpu("starts0", "starts2")
@pytest.mark.parametrize(
    ("starts", "own", "need_b"), [((), False, True), ((0, 24), True, True), ((0, 24), False, False)]
)
def test_the_same_bits(starts, own, need_b, monkeypatch, guarded_kernels):
    """Of five chunks, all at once, two at a time and one at a time; rows beside NaN."""
    lora_b = draw(48 if starts else 140, 3, dtype=torch.float32)
    slices = engine.Slices(starts, lora_b, own)
    dy = torch.full((150, 200), torch.nan, dtype=torch.float16)[:, 3:143]
    dy.copy_(draw(150, 140))
    z = draw(150, slices.width) if need_b else None
    made, one = [], 4 * 2 * 32 * 3  # bytes of a chunk: two blocks of columns, 32 rows
    for most, launches in ((2**26, 2), (2 * one, 6), (1, 10)):
        monkeypatch.setattr(engine, "MAX_PARTIALS", most)
        before = guarded_kernels.launches
        made.append(kernels.up_backward(dy, z, lora_b, 0.5, slices))
        assert guarded_kernels.launches - before == launches
    for dz, db in made[1:]:
        assert torch.equal(dz, made[0][0])
        assert db is None if z is None else torch.equal(db, made[0][1])


def test_gradients_that_wait(guarded_kernels):
    """They go with dz of the next launches, three at most, and have the same bits."""
    lora_a, lora_b = draw(3, 20, dtype=torch.float32), draw(48, 3, dtype=torch.float32)
    x, dy, z = draw(70, 20), draw(70, 48), draw(70, 3)
    slices = engine.Slices((), lora_b, False)

    def calls(sums):
        before = guarded_kernels.launches
        das = [kernels.down_backward_(None, z * n, x, lora_a, 0.0, None, sums) for n in range(5)]
        made = kernels.up_backward(dy, z, lora_b, 0.5, slices, sums)
        return [*das, *made], guarded_kernels.launches - before

    expected, launches = calls(None)
    assert launches == 5 * 2 + 2
    sums = engine.Sums()
    found, launches = calls(sums)
    assert launches == 5 + 2
    sums.finish()
    assert guarded_kernels.launches == 5 * 3 + 2 * 2 + 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not sums.take(1)


@pytest.mark.parametrize("rank", [4, 16, 64, 128])
@pytest.mark.parametrize("out", [3840, 5120])
@pytest.mark.parametrize("tokens", [4096, 4 * 4096, 8 * 96 * 96])
def test_bytes(tokens, out, rank, monkeypatch):
    """At ViT-H's widths: 64 MiB or one chunk of rows, in the launches of the design."""
    launched, parts = [], []

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def launch(*args, **constants):
                launched.append(self.name)
                if self.name == "up_backward_kernel":
                    parts.append(args[3])

            return launch

    for name in ("up_backward_kernel", "reduce_kernel"):
        monkeypatch.setattr(kernels, name, Launch(name))

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, device="meta", dtype=dtype)

    lora_b = meta(out, rank, dtype=torch.float32)
    slices = engine.Slices((), lora_b, False)
    kernels.up_backward(meta(tokens, out), meta(tokens, rank), lora_b, 1.0, slices)
    block = 128 if rank <= 64 else 64
    one = 4 * rank * (out // block) * kernels.chunk_rows(tokens, 64)
    assert max(t.untyped_storage().nbytes() for t in parts) <= max(2**26, one)
    assert sum(t.shape[1] for t in parts) == tokens
    design = {stage.name: stage for stage in costs.stages(tokens, 1280, out, rank, 2)}
    for name, stage in (
        ("up_backward_kernel", "up_backward"),
        ("reduce_kernel", "reduce dz, dB"),
    ):
        assert launched.count(name) == design[stage].launches
