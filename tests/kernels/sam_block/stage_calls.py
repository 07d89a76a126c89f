# SPDX-License-Identifier: Apache-2.0
"""A path's element-wise stages on random rows, and stock modules with autograd beside them."""

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from budgets import keep
from draws import drawing
from torch import Tensor

from samfast.kernels._common.budget import Budget
from samfast.kernels.sam_block import costs, torch_path

EPS, SCALING = 1e-6, 0.5
GRADIENTS = ("da", "da_gelu", "db", "da_left", "db_left")  # of weights
LOW = ("h", "h2", "hg", "da_gelu", "hg_left", "da_left")  # made on the way, if at all
RESIDUALS = ("dx", "total", "y", "total_up", "y_up")


@dataclasses.dataclass(frozen=True)
class Call:
    """All stages once.

    rank: of the adapters that ride along, 0 for none
    dtype: of what products take   residual, affine: of x, and of the norm's weight and bias
    mean, spread: of x
    """

    tokens: int = 21
    columns: int = 100
    rank: int = 3
    dtype: torch.dtype = torch.float32
    residual: torch.dtype = torch.float32
    affine: torch.dtype = torch.float32
    mean: float = 0.0
    spread: float = 1.0

    @property
    def id(self):
        kinds = (str(kind)[6:] for kind in (self.dtype, self.residual, self.affine))
        return "-".join([f"{self.tokens}x{self.columns}", f"r{self.rank}", *kinds])

    @property
    def along(self) -> bool:
        """Whether dz and dB are made beside GELU's backward, where a path can."""
        return costs.along(self.tokens, 1, self.rank, self.rank, self.dtype.itemsize)

    def tensors(self) -> dict[str, Tensor]:
        draw = drawing(7, self.dtype)
        rows, single = (self.tokens, self.columns), torch.float32
        x = self.mean + self.spread * draw(*rows, dtype=torch.float64)
        made = {
            "x": x.to(self.residual),
            "residual": draw(*rows, dtype=self.residual),
            "update": draw(*rows),
            "dn": draw(*rows),
            "u": 2.0 * draw(*rows),
            "dg": draw(*rows),
            "weight": draw(self.columns, dtype=self.affine),
            "bias": draw(self.columns, dtype=self.affine),
        }
        if self.rank:
            made["a"] = draw(self.rank, self.columns, dtype=single) / self.columns**0.5
            made["dh"], made["z"] = (draw(self.tokens, self.rank) for _ in range(2))
            made["b"] = draw(self.columns, self.rank, dtype=single)
        return made

    def run(self, path, tensors=None, layout=lambda t: t, want=True) -> dict[str, Tensor]:
        """What the stages give; h and da only where the path makes them, a sum with an adapter's
        update only where it takes one."""
        t = dict(self.tensors() if tensors is None else tensors)
        matrices = ("x", "residual", "update", "dn", "u", "dg", "dh", "z")
        t |= {name: layout(t[name].clone()) for name in matrices if name in t}
        t["dg_left"] = t["dg"].clone()
        norm, a = (t["weight"], t["bias"], EPS), t.get("a")
        low = (t["dh"], a, True) if self.rank else None
        made = {}
        made["n"], made["h"] = path.norm(t["x"], *norm, self.dtype, a)
        made["total"], made["n2"], made["h2"] = path.add_norm(
            t["x"], t["update"], *norm, self.dtype, a
        )
        if self.takes_up(path):
            up = (t["z"], t["b"].t().contiguous(), SCALING)
            made["total_up"], made["n_up"], made["h_up"] = path.add_norm(
                t["x"], t["update"].clone(), *norm, self.dtype, a, up
            )
            made["y_up"] = path.add(t["x"], t["update"].clone(), up)
        made["g"], made["hg"] = path.gelu(t["u"], a)
        made["dx"], made["rows"], made["da"] = path.norm_backward(
            t["dn"], t["x"], *norm, t["residual"], low, want
        )
        back = (t["z"], t["b"], SCALING) if self.rank else None
        made["du"], made["g_again"], made["da_gelu"], along = path.gelu_backward(
            t["dg"], t["u"], low, want, back
        )
        made["dz"], made["db"] = along or (None, None)
        if self.rank:
            made["g_left"], made["hg_left"] = path.gelu(t["u"], a, back)
            made["du_left"], made["g_left_again"], made["da_left"], along = path.gelu_backward(
                t["dg_left"], t["u"], low, want, back, None, back
            )
            made["dz_left"], made["db_left"] = along or (None, None)
        made["y"] = path.add(t["x"], t["update"])
        return {name: value for name, value in made.items() if value is not None}

    @property
    def in_registers(self) -> bool:
        return costs.in_registers(self.columns, self.rank)

    def takes_up(self, path) -> bool:
        """Also torch_path, as the contract of the others, where nobody asks it to."""
        return self.rank > 0 and (path is torch_path or self.in_registers)

    def literal(self, tensors: dict[str, Tensor], exact: bool) -> dict[str, Tensor]:
        """The same by stock functions and autograd; exact: in float64."""
        wide = torch.float64 if exact else torch.float32
        dtype = torch.float64 if exact else self.dtype
        t = {name: value.to(wide) if exact else value for name, value in tensors.items()}
        alike = t["x"].dtype == t["weight"].dtype
        kind = t["x"].dtype if alike else wide

        def norm(x):
            weight, bias = t["weight"].to(kind), t["bias"].to(kind)
            return F.layer_norm(x.to(kind), (self.columns,), weight, bias, EPS).to(dtype)

        made = {"total": t["x"] + t["update"], "y": t["x"] + t["update"]}
        x, u = t["x"].clone().requires_grad_(), t["u"].clone().requires_grad_()
        whole, of_u = u, []
        if self.rank:
            of_u = [t[name].to(dtype, copy=True).requires_grad_() for name in ("z", "b")]
            update = SCALING * F.linear(*of_u)
            whole = u + (update - update.detach())  # u has the update already
        made |= {"n": norm(x), "n2": norm(made["total"]), "g": F.gelu(whole)}
        outputs, seeds = [made["n"], made["g"]], [t["dn"], t["dg"]]
        wanted = [x, u]
        if self.rank:
            factors = [t["a"].to(dtype, copy=True).requires_grad_() for _ in range(2)]
            made["h"] = F.linear(made["n"], factors[0])
            made["h2"] = F.linear(made["n2"], t["a"].to(dtype))
            update = t["update"] + SCALING * F.linear(t["z"], t["b"].to(dtype))
            made["total_up"] = made["y_up"] = t["x"] + update
            made["n_up"] = norm(made["total_up"])
            made["h_up"] = F.linear(made["n_up"], t["a"].to(dtype))
            made["hg"] = F.linear(made["g"], factors[1])
            outputs, seeds = [*outputs, made["h"], made["hg"]], [*seeds, t["dh"], t["dh"]]
            wanted += [*factors, *of_u]
            made |= self._left(t, dtype)
        dx, made["du"], *dfactors = torch.autograd.grad(outputs, wanted, seeds)
        made["dx"] = (dx + t["residual"]).to(x.dtype)
        made |= dict(zip(("da", "da_gelu", "dz", "db"), dfactors, strict=False))
        made |= {"rows": made["n"], "g_again": made["g"]}
        return {name: value.detach() for name, value in made.items()}

    def _left(self, t: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """What GELU gives that takes u's update along."""
        names = ("u", "z", "b", "a")
        u, *leaves = (t[name].to(dtype, copy=True).requires_grad_() for name in names)
        z, b, a = leaves
        g = F.gelu(u + SCALING * F.linear(z, b))
        made = {"g_left": g, "g_left_again": g, "hg_left": F.linear(g, a)}
        seeds = t["dg"], t["dh"].to(dtype)
        grads = torch.autograd.grad([g, made["hg_left"]], [u, *leaves], seeds)
        return made | dict(zip(("du_left", "dz_left", "db_left", "da_left"), grads, strict=True))

    def check(self, path, low_rank: bool) -> dict[str, Tensor]:
        """Everything in the budget; low_rank: whether the path makes what is of low rank too."""
        tensors = self.tensors()
        ours = self.run(path, tensors)
        budget = self.budget(tensors)
        made = set(LOW) if low_rank and self.rank else set()
        if made and self.in_registers:
            made |= {"h_up", "da"}
        beside = {"dz", "db", "dz_left", "db_left"}
        made |= beside if made and self.along else set()
        not_by_all = {*LOW, "h_up", "da", *beside}
        not_by_all |= set() if self.takes_up(path) else {"total_up", "n_up", "y_up"}
        assert set(ours) == (set(budget.exact) - not_by_all) | made
        for name, value in ours.items():
            kind = self.residual if name in RESIDUALS else self.dtype
            assert value.dtype == (torch.float32 if name in GRADIENTS else kind), name
        keep(budget, ours, some=True)
        return ours

    def budget(self, tensors: dict[str, Tensor]) -> Budget:
        stock, exact = (partial(self.literal, tensors, exact) for exact in (False, True))
        return Budget(stock, exact, self.dtype)
