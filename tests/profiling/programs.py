# SPDX-License-Identifier: Apache-2.0
"""A small training program, as users have them, with everything that a loop may have."""

PROGRAM = """
import sys, torch
from torch.utils.checkpoint import checkpoint
mode, steps = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
    def forward(self, x):
        return self.mlp(torch.relu(self.attn(x)))
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.head = torch.nn.Linear(16, 4)
    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if mode == "checkpoint" else block(x)
        return self.head(x)
model = Model()
called = torch.compile(model) if mode == "compile" else model
parts = [model.blocks, model.head] if mode == "two" else [model]
optimizers = [torch.optim.AdamW(part.parameters()) for part in parts]
data = torch.utils.data.DataLoader(torch.rand(10_000, 16), batch_size=8)
batches = iter(data)
try:
    for step in range(steps):
        for _ in range(3 if mode == "accumulate" else 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                loss = called(next(batches)).float().square().mean()
            loss.backward()
        if mode == "fail" and step == 3:
            raise OSError("no space\\nleft")
        if mode == "exit" and step == 3:
            sys.exit("enough")
        for optimizer in optimizers if mode != "never" else ():
            optimizer.step()
            optimizer.zero_grad()
        print("step", step)
finally:
    print("cleaned up")
"""
FORWARD = 2 * 8 * 16 * 16 * 4 + 2 * 8 * 16 * 4  # FLOP of a batch
BACKWARD = 2 * FORWARD - 2 * 8 * 16 * 16  # the first layer's input needs no gradient
