# SPDX-License-Identifier: Apache-2.0
"""Whether a class is AutoGluon's ``ConvLoRALinear`` and computes Conv-LoRA, whichever its version.

Sentences are the rest of one that begins with the module: "has 1 expert, ...".
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from samfast.adapters.foreign import Foreign
from samfast.adapters.stand_in import altered
from samfast.adapters.stand_in import kind_of as phrase
from samfast.functional import conv_lora_linear
from samfast.integrations.linears import held_problem
from samfast.integrations.probe import apart, difference, shell
from samfast.integrations.read_once import read_once
from samfast.integrations.swap import foreign_method, methods_of, own_method, swapped
from samfast.kernels._common.windows import Windows
from samfast.kernels.conv_experts.op import MAX_RATIO

_LAYERS = "autogluon.multimodal.models.adaptation_layers"
_SEED = 5
_LOSS_SHARE = 1000.0  # times which the loss counts as much as the result
_GATE_PARTS: dict[
    str, tuple[type[nn.Module], dict[str, Any]]
] = {  # a child: its class and what it must have
    "gap": (nn.AdaptiveAvgPool2d, {"output_size": (1, 1)}),
    "softplus": (nn.Softplus, {"beta": 1.0, "threshold": 20.0}),
    "softmax": (nn.Softmax, {"dim": 1}),
}
_CONV = {
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}
_verdicts: dict[tuple[Any, ...], str | None] = {}


def objection(module: Foreign) -> str | None:
    """Why the module is left alone, None where it is AutoGluon's and a run gives Conv-LoRA."""
    kind = _stock(module)
    if kind.__module__ != _LAYERS or kind.__qualname__ != "ConvLoRALinear":
        return f"which is not the class of {_LAYERS}, and samfast trusts no other"
    if (reason := build_problem(module)) is not None:
        return f"which {reason}"
    parts = kind, *_helpers(module, kind)
    for part in parts:
        if not isinstance(part, type) or part.__module__ != _LAYERS:
            return "whose helper classes were replaced"
        if (method := foreign_method(part)) is not None:
            return f"whose {part.__name__}.{method} was replaced"
    if (method := own_method(module, methods_of(kind))) is not None:
        return f"whose {method} was replaced"
    code = [(name, method) for part in parts for name, method in methods_of(part).items()]
    rank, experts = module.lora_A.shape[0], len(module.upsample_ratios)
    key = *parts, *code, rank, experts
    if key not in _verdicts:
        _verdicts[key] = apart(lambda: _probed(kind, parts[1], rank, experts))
    problem = _verdicts[key]
    return None if problem is None else f"but {problem}"


def _stock(module: Foreign) -> Any:
    """The class that it has, or had before it was swapped."""
    made_of = swapped(module)
    return type(module) if made_of is None else made_of.stock


def _helpers(module: Foreign, kind: type[nn.Module]) -> tuple[Any, Any]:
    """The classes that its forward uses: of its gate, and of what sorts samples by expert."""
    forward: Any = kind.forward
    return type(module.lora_moe_gating), forward.__globals__.get("SparseDispatcher")


def build_problem(module: Foreign) -> str | None:
    """What is not as AutoGluon builds it, or has changed since, None if nothing."""
    children = ["lora_moe_gating", "lora_moe_experts"]
    dropout = getattr(module, "lora_dropout", None)
    if isinstance(dropout, nn.Module):
        children.append("lora_dropout")
    found = held_problem(module, tuple(children), ("weight", "bias", "lora_A", "lora_B"))
    return (
        found
        or _numbers_problem(module)
        or _dropout_problem(module, dropout)
        or _experts_problem(module)
        or _gate_problem(module)
    )


# What torch.compile calls while it traces, rather than trace it.
build_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it


def _numbers_problem(module: Foreign) -> str | None:
    outputs, inputs = module.weight.shape
    factors = module._parameters.get("lora_A"), module._parameters.get("lora_B")
    if factors[0] is None or factors[1] is None:
        return "has no lora_A and lora_B"
    rank = factors[0].shape[0]
    if module.fan_in_fan_out is not False:
        return "has a transposed weight (fan_in_fan_out)"
    if (factors[0].shape, factors[1].shape) != ((rank, inputs), (outputs, rank)) or rank == 0:
        return f"has factors of shapes {tuple(factors[0].shape)} and {tuple(factors[1].shape)}"
    for name, wanted in (("merged", False), ("r", rank)):
        if getattr(module, name, None) != wanted:
            return f"has {name}={getattr(module, name, None)!r}, not {wanted!r}"
    if getattr(module, "multiply_by_gates", None) is not False:
        return "weighs its experts by the gate (multiply_by_gates)"
    if isinstance(module.scaling, bool) or not isinstance(module.scaling, (int, float)):
        return f"has a scaling that is a {type(module.scaling).__name__}, not a number"
    return None


def _dropout_problem(module: Foreign, dropout: Any) -> str | None:
    if type(dropout) is nn.Dropout:
        if altered(dropout):
            return "has hooks or a forward of its own on lora_dropout"
        return f"has a dropout of {dropout.p}" if dropout.p >= 1.0 else None
    if dropout is None or dropout is not _stock(module).forward.__globals__.get("identity"):
        return "has a lora_dropout that is neither nn.Dropout nor AutoGluon's identity"
    return None


def experts_of(module: Foreign) -> list[Foreign]:
    """The convolutions of the experts."""
    experts: Foreign = module._modules["lora_moe_experts"]
    return [expert._modules["0"] for expert in experts._modules.values()]


def tensors_of(module: Foreign) -> dict[str, Tensor]:
    """What its forward reads, by name."""
    gate = module._modules["lora_moe_gating"]
    found = {name: p for name, p in module._parameters.items() if p is not None}
    found |= {"w_gate": gate.w_gate, "w_noise": gate.w_noise}
    for i, conv in enumerate(experts_of(module)):
        found |= {f"weight of expert {i}": conv.weight, f"bias of expert {i}": conv.bias}
    return found


def _experts_problem(module: Foreign) -> str | None:
    experts, ratios = module._modules["lora_moe_experts"], module.upsample_ratios
    if type(experts) is not nn.ModuleList or type(ratios) is not list:
        return "has no list of experts and of their ratios"
    count = len(experts)
    if count < 2 or count > MAX_RATIO or module.num_experts != count or len(ratios) != count:
        return f"has {count} experts, {len(ratios)} ratios and num_experts={module.num_experts!r}"
    if any(type(r) is not int or not 1 <= r <= MAX_RATIO for r in ratios):
        return f"has the ratios {ratios!r}, not whole numbers"
    for i, expert in enumerate(experts):
        if (reason := _expert_problem(module, expert)) is not None:
            return f"has {reason} in expert {i}"
    return None


def _expert_problem(module: Foreign, expert: nn.Module) -> str | None:
    kinds = [type(part) for part in expert._modules.values()]
    if type(expert) is not nn.Sequential or kinds != [nn.Conv2d, nn.GELU]:
        return "other layers than a convolution and GELU"
    if any(altered(part) for part in (expert, *expert)):
        return "hooks or a forward of its own"
    conv, act = expert
    rank = module.lora_A.shape[0]
    if act.approximate != "none":
        return f"GELU with approximate={act.approximate!r}"
    other = [name for name, value in _CONV.items() if getattr(conv, name) != value]
    if other:
        return f"a convolution with {other[0]}={getattr(conv, other[0])!r}"
    if conv.bias is None or conv.weight.shape != (rank, rank, 3, 3):
        return "a convolution of another shape, or without a bias"
    return None


def _gate_problem(module: Foreign) -> str | None:
    gate = module._modules["lora_moe_gating"]
    if type(gate).forward.__globals__.get("__name__") != _LAYERS:
        return "has a gate whose forward is not AutoGluon's"
    if altered(gate) or any(altered(part) for part in gate.children()):
        return "has hooks or a forward of its own in its gate"
    held = {name: value for name, value in gate._parameters.items() if value is not None}
    buffers = {name for name, value in gate._buffers.items() if value is not None}
    known = {*held} == {"w_gate", "w_noise"} and buffers == {"mean", "std"}
    if not known or {*gate._modules} != {*_GATE_PARTS}:
        return "has a gate with other parts than AutoGluon's"
    shape = module.lora_A.shape[0], len(module.upsample_ratios)
    if any(tuple(p.shape) != shape for p in held.values()):
        return f"has a gate whose weights are not of shape {shape}"
    if (gate.k, gate.M, gate.noisy_gating) != (1, shape[1], True):
        return f"has a gate with k={gate.k!r}, M={gate.M!r}, noisy_gating={gate.noisy_gating!r}"
    for name, (kind, wanted) in _GATE_PARTS.items():
        part = gate._modules[name]
        if type(part) is not kind or any(getattr(part, n) != v for n, v in wanted.items()):
            return f"has {phrase(part)} as {name} of its gate"
    for name, value in (("mean", 0.0), ("std", 1.0)):
        if read_once(gate._buffers[name], Tensor.tolist) not in (None, [value]):
            return f"has a gate whose noise has another {name} than {value}"
    return None


@functools.cache
def _equals(experts: int, device: torch.device) -> int:
    with torch.inference_mode(False), torch.no_grad():
        return int(torch.zeros(1, experts, device=device).topk(2, dim=1).indices[0, 0])


def first_of_equals(experts: int, device: torch.device) -> list[int]:
    """The experts' numbers, first the one that AutoGluon's topk takes where all are equal.

    samfast's gate takes the first of equals. A gate that was not trained makes all equal.
    """
    first = _equals(experts, device)
    return [first, *(i for i in range(experts) if i != first)]


first_of_equals._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it


class _Joined(nn.Module):
    """Result and loss of a layer as one tensor, with seeded noise."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(_SEED)
        return _joined(*self.layer(x))


def _joined(y: Tensor, loss: Tensor) -> Tensor:
    return torch.cat([y.flatten(), _LOSS_SHARE * loss.reshape(1)])


def _probed(kind: type[nn.Module], gate: type[nn.Module], rank: int, experts: int) -> str | None:
    """What differs from the formula in a layer of that class with tensors of its own."""
    torch.manual_seed(_SEED)
    module = _Joined(_stand_in(kind, gate, rank, experts))
    samples = 4 * experts
    for shape in ((samples, 4, 5, 6), (samples, 9, 6)):
        x = torch.randn(shape)
        for training in (True, False):
            formula = functools.partial(_formula, training=training)
            # AutoGluon makes zeros that require a gradient, so its graph ends in these too.
            problem = difference(module, formula, x, (training,), others=True)
            if problem is not None:
                return problem
    return None


def _stand_in(kind: type[nn.Module], gate: type[nn.Module], rank: int, experts: int) -> nn.Module:
    parts: dict[str, nn.Module | nn.Parameter] = {
        "w_gate": nn.Parameter(torch.randn(rank, experts)),
        "w_noise": nn.Parameter(torch.randn(rank, experts)),
        "gap": nn.AdaptiveAvgPool2d((1, 1)),
        "softplus": nn.Softplus(),
        "softmax": nn.Softmax(1),
    }
    moe = shell(gate, {"M": experts, "k": 1, "noisy_gating": True}, **parts)
    for name, value in (("mean", 0.0), ("std", 1.0)):
        moe.register_buffer(name, torch.tensor([value]))
    layers = [nn.Sequential(nn.Conv2d(rank, rank, 3, padding=1), nn.GELU()) for _ in range(experts)]
    values: dict[str, object] = {
        "in_features": 6,
        "out_features": 5,
        "r": rank,
        "scaling": 0.75,
        "lora_alpha": 1,
    }
    values |= {"fan_in_fan_out": False, "merged": False, "merge_weights": False}
    values |= {"num_experts": experts, "multiply_by_gates": False}
    values |= {"upsample_ratios": list(range(1, experts + 1)), "lora_dropout": nn.Identity()}
    return shell(
        kind,
        values,
        weight=nn.Parameter(torch.randn(5, 6)),
        bias=nn.Parameter(torch.randn(5)),
        lora_A=nn.Parameter(torch.randn(rank, 6)),
        lora_B=nn.Parameter(torch.randn(5, rank)),
        lora_moe_gating=moe,
        lora_moe_experts=nn.ModuleList(layers),
    )


def _formula(x: Tensor, given: Mapping[str, Tensor], training: bool) -> Tensor:
    given = {name.removeprefix("layer."): tensor for name, tensor in given.items()}
    w_gate, w_noise = (given[f"lora_moe_gating.{name}"] for name in ("w_gate", "w_noise"))
    experts = w_gate.shape[1]
    weights, biases = (
        torch.stack([given[f"lora_moe_experts.{i}.0.{name}"] for i in range(experts)])
        for name in ("weight", "bias")
    )
    sides = x.shape[1:3] if x.dim() == 4 else (3, 3)
    torch.manual_seed(_SEED)
    noise = torch.randn(x.shape[0], experts) if training else None
    w, b, lora_a, lora_b = (given[name] for name in ("weight", "bias", "lora_A", "lora_B"))
    y, loss = conv_lora_linear(
        x, w, b, lora_a, lora_b, weights, biases, w_gate, w_noise, 0.75,
        tuple(range(1, experts + 1)), windows=Windows.whole(x.shape[0], *sides), noise=noise,
        backend="reference",
    )  # fmt: skip
    return _joined(y, loss)
