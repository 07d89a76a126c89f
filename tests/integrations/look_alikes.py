# SPDX-License-Identifier: Apache-2.0
"""Classes that bear a wrapper's name and compute something else, as other programs have them.

``FORWARDS`` differ in what they compute, ``BUILDS`` in what they are made of. Each has the reason.
"""

import torch
from literal_wrappers import _LoRA_qkv, linear
from torch import nn
from wrapped_models import RANK, WIDTH, wrapper

FLAG = [1.0]


def named(forward, **names):
    """A class of the name with another forward."""
    names = {"forward": forward, "__module__": __name__, **names}
    return type("_LoRA_qkv", (_LoRA_qkv,), names)


def scaled_by_rank(self, x):
    """As in a wrapper of MONAI's Swin transformer."""
    packed, scale = self.qkv(x), self.alpha / self.r
    packed[:, :, :, : self.dim] += scale * self.linear_b_q(self.linear_a_q(x))
    packed[:, :, :, -self.dim :] += scale * self.linear_b_v(self.linear_a_v(x))
    return packed


def on_rows(self, x):
    """As in a wrapper of DINO, whose x has three dimensions."""
    packed = self.qkv(x)
    packed[:, :, : self.dim] += self.linear_b_q(self.linear_a_q(x))
    packed[:, :, -self.dim :] += self.linear_b_v(self.linear_a_v(x))
    return packed


def halved(self, x):
    packed = self.qkv(x)
    packed[:, :, :, : self.dim] += 0.5 * self.linear_b_q(self.linear_a_q(x))
    packed[:, :, :, -self.dim :] += 0.5 * self.linear_b_v(self.linear_a_v(x))
    return packed


def on_keys(self, x):
    packed = self.qkv(x)
    packed[:, :, :, : self.dim] += self.linear_b_q(self.linear_a_q(x))
    packed[:, :, :, self.dim : -self.dim] += self.linear_b_v(self.linear_a_v(x))
    return packed


def wide_only(self, x):
    """Right at the small sizes of a first look."""
    packed = self.qkv(x)
    q, v = self.linear_b_q(self.linear_a_q(x)), self.linear_b_v(self.linear_a_v(x))
    packed[:, :, :, : self.dim] += q
    packed[:, :, :, -self.dim :] += v * (2 if self.dim > 20 else 1)
    return packed


def on_small_maps(self, x):
    """Where a run would have to be made on larger maps."""
    packed = self.qkv(x)
    if x.shape[1] > 8:
        return packed
    packed[:, :, :, : self.dim] += self.linear_b_q(self.linear_a_q(x))
    packed[:, :, :, -self.dim :] += self.linear_b_v(self.linear_a_v(x))
    return packed


def by_the_batch(self, x):
    packed, share = self.qkv(x), 1 / max(1, x.shape[0] - 1)
    packed[:, :, :, : self.dim] += share * self.linear_b_q(self.linear_a_q(x))
    packed[:, :, :, -self.dim :] += share * self.linear_b_v(self.linear_a_v(x))
    return packed


def of_a_task(self, x, task=0):
    return _LoRA_qkv.forward(self, x)


def by_a_flag(self, x):
    packed = self.qkv(x)
    packed[:, :, :, : self.dim] += FLAG[0] * self.linear_b_q(self.linear_a_q(x))
    packed[:, :, :, -self.dim :] += FLAG[0] * self.linear_b_v(self.linear_a_v(x))
    return packed


def in_training(self, x):
    return self.qkv(x) if self.training else 2 * self.qkv(x)


def where_asked(self, x):
    return 2 * self.qkv(x) if hasattr(self, "doubled") else self.qkv(x)


def into_its_input(self, x):
    x[:, :, :, :1] += 1
    return self.qkv(x)


_CODE = "has code that a run may not tell all of: the forward of _LoRA_qkv uses "
_RUN = "is not what its name says: its forward "
FORWARDS = {
    scaled_by_rank: f"{_CODE}alpha",
    on_rows: f"{_RUN}fails alone: RuntimeError",
    halved: f"{_RUN}gives another output",
    on_keys: f"{_RUN}gives another output",
    wide_only: f"{_CODE}the number 20",
    on_small_maps: f"{_CODE}the number 8",
    by_the_batch: f"{_RUN}gives another output",
    of_a_task: "has a forward that takes (self, x, task=0), not (self, x)",
    by_a_flag: f"{_CODE}FLAG, a list",
    in_training: f"{_CODE}training",
    where_asked: f"{_CODE}hasattr, and 'doubled'",
    into_its_input: f"{_RUN}fails alone: RuntimeError",
}


def other(forward):
    module = wrapper(named(forward))
    module.r, module.alpha = RANK, 6
    return module


def of_another_stage():
    """As in wrappers of SAM 2's encoder, at a change of width."""
    return wrapper(outputs=4 * WIDTH)


def with_a_norm():
    def forward(self, x):
        packed = self.qkv(x)
        packed[:, :, :, : self.dim] += self.linear_b_q(self.norm1(self.linear_a_q(x)))
        packed[:, :, :, -self.dim :] += self.linear_b_v(self.norm1(self.linear_a_v(x)))
        return packed

    module = wrapper(named(forward))
    module.norm1 = nn.LayerNorm(RANK)
    return module


def of_six():
    def forward(self, x):
        packed = _LoRA_qkv.forward(self, x)
        packed[:, :, :, : self.dim] += self.linear_b_q2(self.linear_a_q2(x))
        return packed

    module = wrapper(named(forward))
    module.linear_a_q2, module.linear_b_q2 = linear(WIDTH, RANK), linear(RANK, WIDTH)
    return module


def with_a_gate():
    module = wrapper(named(lambda self, x: self.gate * _LoRA_qkv.forward(self, x)))
    module.gate = nn.Parameter(torch.tensor(0.5))
    return module


def biased():
    module = wrapper()
    module.linear_b_q = nn.Linear(RANK, WIDTH)
    return module


def of_two_ranks():
    module = wrapper()
    module.linear_a_v, module.linear_b_v = linear(WIDTH, 5), linear(5, WIDTH)
    return module


def of_another_layer():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module = wrapper()
    module.qkv.__class__ = Doubled
    return module


def of_another_dim():
    module = wrapper()
    module.dim = 16
    module.linear_b_q, module.linear_b_v = linear(RANK, 16), linear(RANK, 16)
    return module


def without_v():
    module = wrapper(named(lambda self, x: self.qkv(x)))
    del module.linear_a_v, module.linear_b_v
    return module


BUILDS = {
    of_another_stage: "is over a layer of 32 features that gives 128, not 96",
    with_a_norm: "has a child norm1, which would be left out",
    of_six: "has a child linear_a_q2, which would be left out",
    with_a_gate: "has a parameter gate, which would be left out",
    biased: "has a bias in its update of q",
    of_two_ranks: "has updates of ranks 3 and 5, not of one",
    of_another_layer: "has look_alikes' Doubled as qkv, not a plain nn.Linear",
    of_another_dim: (
        "has an update of q of shapes (3, 32) and (16, 3), which does not take 32 features to 32"
    ),
    without_v: "has no linear_a_v",
}
