# SPDX-License-Identifier: Apache-2.0
"""Prove that a class is AutoGluon's ``ConvLoRALinear`` and computes Conv-LoRA, in any version.

Sentences are the rest of one that begins with the module: "has 1 expert, ...".
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from samfast.adapters.foreign import Foreign
from samfast.functional import conv_lora_linear
from samfast.integrations.code_watch import CodeWatch
from samfast.integrations.linears import (
    dropout_problem,
    held_problem,
    hook_problem,
    kind_problem,
    number_problem,
    shape_problem,
    value_problem,
)
from samfast.integrations.probe import apart, difference, shell
from samfast.integrations.read_once import read_once
from samfast.integrations.swap import methods_of, own_method, swapped
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
_CONV: dict[str, Any] = {
    "kernel_size": (3, 3),
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}
_TORCHS = (nn.AdaptiveAvgPool2d, nn.Softplus, nn.Softmax, nn.Conv2d, nn.GELU, nn.Dropout)
_watches: dict[tuple[Any, Any], CodeWatch] = {}
_verdicts: dict[tuple[Any, ...], tuple[CodeWatch, str | None]] = {}


def objection(module: Foreign) -> str | None:
    """Say why the module is left alone; None if it is AutoGluon's and a run gives Conv-LoRA."""
    kind = _stock(module)
    if kind.__module__ != _LAYERS or kind.__qualname__ != "ConvLoRALinear":
        return f"which is not the class of {_LAYERS}, and samfast trusts no other"
    if (reason := build_problem(module)) is not None:
        return f"which {reason}"
    watch = _watch(*_kinds(module))
    method = own_method(module, methods_of(kind)) or _replaced(module, watch)
    if method is not None:
        return f"whose {method} was replaced"
    problem = _run_problem(module, watch)
    return None if problem is None else f"but {problem}"


def code_problem(module: Foreign) -> str | None:
    """Say what is wrong now with the code of a layer that is fused; None if nothing."""
    watch = _watch(*_kinds(module))
    if (part := _replaced(module, watch)) is not None:
        return f"has another {part} than AutoGluon's; undo that to fuse it"
    problem = _run_problem(module, watch)
    return None if problem is None else f"is not what its name says: {problem}"


# torch.compile calls this while tracing, and does not trace it.
code_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it


def _run_problem(module: Foreign, watch: CodeWatch) -> str | None:
    """Say what a run with the code of now finds; it is remembered while the code is the same."""
    kind, gate = _kinds(module)
    rank, experts = module.lora_A.shape[0], len(module.upsample_ratios)
    key = kind, gate, watch.key, rank, experts
    if key not in _verdicts:
        _verdicts[key] = watch, apart(lambda: _probed(kind, gate, rank, experts))
    return _verdicts[key][1]


def _kinds(module: Foreign) -> tuple[Any, Any]:
    """Return the classes of the layer and of its gate."""
    return _stock(module), type(module._modules["lora_moe_gating"])


def _watch(kind: Any, gate: Any) -> CodeWatch:
    """Return the watch over these classes and all that they use, made anew after a change."""
    watch = _watches.get((kind, gate))
    if watch is None or not watch.unchanged():
        sorts = kind.forward.__globals__.get("SparseDispatcher")
        watch = _watches[kind, gate] = CodeWatch((kind, gate, sorts), _TORCHS)
    return watch


def _stock(module: Foreign) -> Any:
    """Return the class that it has, or had before the swap."""
    made_of = swapped(module)
    return type(module) if made_of is None else made_of.stock


def _replaced(module: Foreign, watch: CodeWatch) -> str | None:
    """Return the name of a class, method or function that is not AutoGluon's or torch's."""
    own = vars(module._modules["lora_moe_gating"])
    if not watch.methods.isdisjoint(own):
        return f"lora_moe_gating.{sorted(watch.methods & own.keys())[0]}"
    return watch.replaced


def build_problem(module: Foreign) -> str | None:
    """Say what is not as AutoGluon builds it, now or since a change; None if nothing."""
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
    lora_a, lora_b = module._parameters.get("lora_A"), module._parameters.get("lora_B")
    if module.fan_in_fan_out is not False:
        return "has a transposed weight (fan_in_fan_out)"
    rank = 0 if lora_a is None else lora_a.shape[0]
    shapes = {"lora_A": (lora_a, (rank, inputs)), "lora_B": (lora_b, (outputs, rank))}
    values = {"merged": False, "r": rank, "multiply_by_gates": False}
    return (
        shape_problem(shapes)
        or value_problem(module, values)
        or number_problem("scaling", module.scaling)
    )


def _dropout_problem(module: Foreign, dropout: Any) -> str | None:
    identity = _stock(module).forward.__globals__.get("identity")
    idle = dropout is not None and dropout is identity
    parts = {"lora_dropout": dropout} if isinstance(dropout, nn.Module) else {}
    return dropout_problem("lora_dropout", dropout, idle) or hook_problem(parts)


def experts_of(module: Foreign) -> list[Foreign]:
    """Return the convolutions of the experts."""
    experts: Foreign = module._modules["lora_moe_experts"]
    return [expert._modules["0"] for expert in experts._modules.values()]


def tensors_of(module: Foreign) -> dict[str, Tensor]:
    """Return the tensors that its forward reads, by name."""
    gate = module._modules["lora_moe_gating"]
    found = {name: p for name, p in module._parameters.items() if p is not None}
    found |= {"w_gate": gate.w_gate, "w_noise": gate.w_noise}
    for i, conv in enumerate(experts_of(module)):
        found |= {f"weight of expert {i}": conv.weight, f"bias of expert {i}": conv.bias}
    return found


def _experts_problem(module: Foreign) -> str | None:
    experts = module._modules["lora_moe_experts"]
    if type(experts) is not nn.ModuleList:
        return kind_problem("lora_moe_experts", experts, "nn.ModuleList")
    if not 2 <= len(experts) <= MAX_RATIO:
        return f"has {len(experts)} experts, not from 2 to {MAX_RATIO}"
    values = {"num_experts": len(experts), "upsample_ratios": list(range(1, len(experts) + 1))}
    named = {f"lora_moe_experts.{i}": part for i, part in enumerate(experts)}
    problems = (_expert_problem(name, module, part) for name, part in named.items())
    return value_problem(module, values) or next((p for p in problems if p is not None), None)


def _expert_problem(name: str, module: Foreign, expert: Foreign) -> str | None:
    if type(expert) is not nn.Sequential or len(expert) != 2:
        return kind_problem(name, expert, "nn.Sequential")
    parts: dict[str, Foreign] = {f"{name}.{i}": part for i, part in enumerate(expert)}
    for (path, part), kind in zip(parts.items(), (nn.Conv2d, nn.GELU), strict=True):
        if type(part) is not kind:
            return kind_problem(path, part, f"nn.{kind.__name__}")
    conv, act = parts.values()
    rank = module.lora_A.shape[0]
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        f"{name}.0.weight": (conv.weight, (rank, rank, 3, 3)),
        f"{name}.0.bias": (conv.bias, (rank,)),
    }
    return (
        hook_problem({name: expert, **parts})
        or value_problem(conv, _CONV)
        or value_problem(act, {"approximate": "none"})
        or shape_problem(shapes)
    )


def _gate_problem(module: Foreign) -> str | None:
    gate = module._modules["lora_moe_gating"]
    if type(gate).forward.__globals__.get("__name__") != _LAYERS:
        return "has a gate whose forward is not AutoGluon's"
    for store, known in (
        (gate._parameters, ("w_gate", "w_noise")),
        (gate._buffers, ("mean", "std")),
        (gate._modules, tuple(_GATE_PARTS)),
    ):
        if {name for name, value in store.items() if value is not None} != {*known}:
            return "has a gate with other parts than AutoGluon's"
    shape = module.lora_A.shape[0], len(module.upsample_ratios)
    parts = {f"lora_moe_gating.{name}": part for name, part in gate.named_children()}
    return (
        hook_problem({"lora_moe_gating": gate, **parts})
        or shape_problem({name: (p, shape) for name, p in gate._parameters.items()})
        or value_problem(gate, {"k": 1, "M": shape[1], "noisy_gating": True})
        or _gate_parts_problem(gate)
    )


def _gate_parts_problem(gate: Foreign) -> str | None:
    for name, (kind, wanted) in _GATE_PARTS.items():
        part = gate._modules[name]
        if type(part) is not kind:
            return kind_problem(name, part, f"nn.{kind.__name__}")
        if (reason := value_problem(part, wanted)) is not None:
            return reason
    for name, value in (("mean", [0.0]), ("std", [1.0])):
        found = read_once(gate._buffers[name], Tensor.tolist)
        if found not in (None, value):
            return f"has {name}={found!r}, not {value!r}"
    return None


@functools.cache
def _first(experts: int, device: torch.device) -> int:
    with torch.inference_mode(False), torch.no_grad():
        return int(torch.zeros(1, experts, device=device).topk(2, dim=1).indices[0, 0])


def first_of_equals(experts: int, device: torch.device) -> int:
    """Return the expert that AutoGluon's topk takes if all logits are equal.

    An untrained gate makes them so. samfast's gate takes the first of equals, so the layer gives
    it this expert first.
    """
    return _first(experts, device)


first_of_equals._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch reads it


class _Joined(nn.Module):
    """Gives result and loss of a layer as one tensor, with seeded noise."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(_SEED)
        return _joined(*self.layer(x))


def _joined(y: Tensor, loss: Tensor) -> Tensor:
    return torch.cat([y.flatten(), _LOSS_SHARE * loss.reshape(1)])


def _probed(kind: type[nn.Module], gate: type[nn.Module], rank: int, experts: int) -> str | None:
    """Say what differs from the formula in a layer of that class with tensors of its own."""
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
