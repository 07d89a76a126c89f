# SPDX-License-Identifier: Apache-2.0
"""Each planted bug is caught by the check that names it; a right module passes all."""

import black_box
import pytest
import torch
import torch.nn.functional as F
from black_box import Subject
from torch import nn
from torch.autograd.function import once_differentiable


class Literal(nn.Linear):
    """A frozen linear layer with a low-rank update, in plain PyTorch."""

    def __init__(self, features, out, rank):
        super().__init__(features, out, dtype=torch.float64)
        self.weight.requires_grad_(False)
        self.bias.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, features, dtype=torch.float64))
        self.lora_B = nn.Parameter(torch.randn(out, rank, dtype=torch.float64))

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


class Right(Literal):
    """The same, once more."""


class AssumesContiguity(Literal):
    def forward(self, x):
        dense = torch.as_strided(x, x.shape, x.new_empty(x.shape).stride())
        return super().forward(dense)


class MissingTerm(Literal):
    def forward(self, x):
        update = F.linear(F.linear(x.detach(), self.lora_A), self.lora_B)
        return nn.Linear.forward(self, x) + update


class WritesInput(Literal):
    def forward(self, x):
        y = super().forward(x)
        x.data.mul_(1.0 + 1e-3)
        return y


class WrongScale(Literal):
    def forward(self, x):
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return nn.Linear.forward(self, x) + 1.02 * update


class Nondeterministic(Literal):
    def forward(self, x):
        order = torch.randperm(x.shape[-1])
        weight, a = self.weight[:, order], self.lora_A[:, order]
        update = F.linear(F.linear(x[..., order], a), self.lora_B)
        return F.linear(x[..., order], weight, self.bias) + update


class TrainsFrozenWeight(Literal):
    def forward(self, x):
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(self.leak)
        return y

    def leak(self, dy):
        self.weight.grad = torch.zeros_like(self.weight)


class ForgetsEmptyBatch(Literal):
    def forward(self, x):
        return super().forward(x if len(x) else x.new_ones(1, *x.shape[1:]))


class WrongInEval(Literal):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training else 1.5 * y


class NarrowAssumesContiguity(AssumesContiguity):
    def forward(self, x):
        narrow = x.dtype in (torch.float16, torch.bfloat16)
        return super().forward(x) if narrow else Literal.forward(self, x)


class KeepsGraph(Literal):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Once(torch.autograd.Function):
    """torch's decorator refuses nothing where the incoming gradient is a constant."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b):
        ctx.save_for_backward(x, weight, a, b)
        return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, a, b = ctx.saved_tensors
        dz, z = dy @ b, x @ a.T
        da = dz.flatten(0, -2).T @ x.flatten(0, -2)
        db = dy.flatten(0, -2).T @ z.flatten(0, -2)
        return dy @ weight + dz @ a, None, None, da, db


class GivesView(Once):
    """Two results, the first of which is a view of what nobody else holds."""

    @staticmethod
    def forward(ctx, x, *tensors):
        y = Once.forward(ctx, x, *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return y.flatten(0, -2).view(y.shape), y.new_zeros(())


class LosesSecondDerivative(Literal):
    def forward(self, x):
        return Once.apply(x, self.weight, self.bias, self.lora_A, self.lora_B)


class RefusesWrites(Literal):
    def forward(self, x):
        return GivesView.apply(x, self.weight, self.bias, self.lora_A, self.lora_B)[0]


class Positive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.y = x.clamp(min=0)
        return ctx.y

    @staticmethod
    def backward(ctx, dy):
        return dy * (ctx.y > 0)


class NeedsResult(Literal):
    def forward(self, x):
        return Positive.apply(super().forward(x))


class ViewWithoutGradients(Literal):
    def forward(self, x):
        y = super().forward(x)
        return y if torch.is_grad_enabled() else y.flatten(0, -2).view(y.shape)


PLANTED = [
    (AssumesContiguity, "odd_inputs", "error .* of the budget|error nan"),
    (NarrowAssumesContiguity, "odd_inputs", "error .* of the budget|error nan"),
    (AssumesContiguity, "expanded", "of the budget|out of bounds"),
    (MissingTerm, "error_budget", "dx: .* of the budget"),
    (WritesInput, "nothing_mutated", "x was written to"),
    (WrongScale, "error_budget", "y: .* of the budget"),
    (WrongInEval, "evaluation", "y: .* of the budget"),
    (Nondeterministic, "bits_repeat", "differs in its bits"),
    (TrainsFrozenWeight, "frozen", "weight"),
    (ForgetsEmptyBatch, "empty_batch", "shape"),
    (KeepsGraph, "copies", "deepcopy"),
    (RefusesWrites, "written_in_place", "is a view and is being modified inplace"),
    (NeedsResult, "written_in_place", "dx differs in its bits"),
    (ViewWithoutGradients, "written_in_place", "stock module's result takes is refused"),
    (LosesSecondDerivative, "second_derivative", "of the budget"),
]


def subject(kind):
    torch.manual_seed(0)
    return Subject(kind(24, 40, 3), Literal(24, 40, 3), torch.randn(3, 5, 24, dtype=torch.float64))


@pytest.mark.slow_on_cpu("generated", "compiled")
@pytest.mark.parametrize("check", black_box.CHECKS, ids=lambda check: check.__name__)
def test_a_right_module_passes(check):
    check(subject(Right))


@pytest.mark.parametrize(
    ("kind", "check", "sentence"), PLANTED, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_planted_bug_is_caught(kind, check, sentence):
    planted = subject(kind)
    with pytest.raises((AssertionError, RuntimeError), match=sentence):
        getattr(black_box, check)(planted)
