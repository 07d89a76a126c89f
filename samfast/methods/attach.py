# SPDX-License-Identifier: Apache-2.0
"""Attach a method to a model, and work with all its adapters at once."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeGuard

import torch
from torch import nn

from samfast.adapters.adapter import Adapter, adapters
from samfast.adapters.attachment import Attachment, attachment, remember
from samfast.adapters.base_digest import fingerprint
from samfast.adapters.finite import base_problem
from samfast.adapters.foreign import Model
from samfast.adapters.method import Method
from samfast.adapters.wrappers import (
    ENCODER_OF_HF,
    encoder_name,
    encoder_of,
    levels,
    prefix_of,
    refuse_new_parameters,
    unclear,
    unwrapped,
)
from samfast.integrations import peft_config
from samfast.integrations.libraries import call_of_owner, refuse_others
from samfast.methods.ta_lora.tasks import numbers_of, set_task
from samfast.models import hf_names
from samfast.models.heads import stock_state_dict

DECODER = ("mask_decoder",)  # trained whole in addition to the adapters
BASE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ONLY_SEGMENT_ANYTHING = (
    "samfast.models.build_sam(name, checkpoint=folder) makes segment_anything's Sam, which has "
    "them, of the folder of a SamModel"
)


def attach(
    model: Model,
    method: Method | Any,
    *,
    train: tuple[str, ...] | str | None = None,
    base_dtype: torch.dtype | None = None,
) -> Model:
    """Freeze a model, put adapters on its target layers, and un-freeze what ``train`` names.

    Works in place and returns the model. If a wrapper (torch.compile, Lightning, a module of your
    own) holds one SAM, it works on that SAM. Adapted layers share the weights they had. LoRA and
    Conv-LoRA start at zero: outputs stay the same until training moves the adapters.

    method: for example ``samfast.Lora(rank=4)``, or PEFT's ``LoraConfig`` for plain LoRA, whose
        names match as PEFT matches them. A method's ``target`` is one of these, or a tuple of them:
        a leaf name, matched in ``model.image_encoder`` (Hugging Face: ``vision_encoder``), or in
        the whole model if it has no encoder; a regular expression (anything but a plain
        identifier), matched against full module names of the whole model.
    train: names of modules or parameters to train whole, with everything below them, in addition to
        the adapters; () trains only the adapters. None is ("mask_decoder",), or modules_to_save of
        PEFT's config. A SamModel accepts segment_anything's names too.
    base_dtype: cast the frozen tensors of the image encoder (of the whole model if it has no
        encoder) to float32, bfloat16 or float16. Trained tensors keep their dtype. Adapters, prompt
        encoder and mask decoder stay float32. If ``train`` names a module inside the encoder, run
        the forward under ``torch.autocast``: its float32 weights meet activations of the base's
        dtype.

    Raises ValueError, or TypeError for an argument of the wrong type, before anything changes. This
    includes a parameter with NaN or infinity, a persistent buffer with NaN, and a layer that
    another library adapted.

    >>> import samfast
    >>> from samfast.models import build_sam
    >>> sam = samfast.attach(build_sam("vit_tiny"), samfast.Lora(rank=4), train=())
    >>> samfast.report(sam).trained_parameters
    18432
    """
    config = method if peft_config.is_config(method) else None
    if config is not None:
        peft_config.check_config(config)
    elif not isinstance(method, Method):
        raise TypeError(f"method is {method!r}, which is not one of samfast's methods")
    check_attachable(model, base_dtype)
    refuse_new_parameters(model)
    inner, prefix = unwrapped(model), prefix_of(model)
    if config is None:
        layers = find_layers(inner, method, prefix)
        train = DECODER if train is None else train
    else:
        method, layers, train = peft_config.translated(config, inner, prefix, train)
        for name, layer in layers.items():
            try:
                check_layer(method, name, layer)
            except ValueError as error:
                raise ValueError(f"{error}; exclude_modules leaves layers out") from None
    method.check_model(inner, layers)
    trained = find_trained(inner, train, prefix)
    if (problem := base_problem(inner)) is not None:
        raise ValueError(
            f"expected a base of finite numbers, but {problem}; load its weights again"
        )
    adapted = method.build(layers)
    if config is not None:
        peft_config.start(config, adapted)
    attach_to(inner, method, layers, adapted, trained, base_dtype)
    return model


def check_attachable(model: nn.Module, base_dtype: torch.dtype | None) -> None:
    """Raise TypeError or ValueError if nothing can be attached to the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, not a torch.nn.Module")
    if base_dtype is not None and base_dtype not in BASE_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in BASE_DTYPES)
        raise ValueError(f"base_dtype is {base_dtype!r}; it must be one of {known}")
    for name, module in adapters(model).items():
        raise ValueError(f"{name or 'the model'} already has an adapter, {type(module).__name__}")
    refuse_others(model)
    for level in levels(model):
        if (attached := attachment(level)) is not None:
            raise ValueError(f"{attached.method!r} is already attached to the model")


def find_layers(model: nn.Module, method: Method, prefix: str = "") -> dict[str, nn.Module]:
    """Find and check the layers that the method's target matches, by full name.

    prefix: what a wrapper puts before the names; a regular expression may include or omit it
    """
    targets = (method.target,) if isinstance(method.target, str) else method.target
    candidates = {n: m for n, m in model.named_modules() if isinstance(m, method.replaces) and n}
    encoder = encoder_name(model)
    scope = f"{encoder}." if encoder else ""
    chosen = set()
    for target in targets:
        if target.isidentifier():
            matched = [
                name
                for name in candidates
                if name.startswith(scope) and name.rpartition(".")[2] == target
            ]
        else:
            matched = [
                name
                for name in candidates
                if re.fullmatch(target, name) or re.fullmatch(target, prefix + name)
            ]
        if not matched:
            raise ValueError(_no_match(target, candidates, scope, method.replaces))
        chosen.update(matched)
    layers = {name: module for name, module in candidates.items() if name in chosen}
    for name, layer in layers.items():
        check_layer(method, name, layer)
    return layers


def check_layer(method: Method, name: str, layer: nn.Module) -> None:
    """Raise ValueError, naming the layer, if the method cannot replace it."""
    if type(layer) is not method.replaces:
        raise ValueError(
            f"expected a plain {method.replaces.__name__}, but {name} is a {type(layer).__name__}, "
            f"whose forward {method.name} would lose; leave it out of target"
        )
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        raise ValueError(f"{name} has hooks, which would be lost; remove them before attaching")
    try:
        method.check(layer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _no_match(
    target: str, candidates: dict[str, nn.Module], scope: str, kind: type[nn.Module]
) -> str:
    what = "linear layer" if kind is nn.Linear else kind.__name__
    examples: dict[str, str] = {}
    for name in candidates:
        if name.startswith(scope) or not target.isidentifier():
            examples.setdefault(name.rpartition(".")[2], name)
    where = f" in {scope[:-1]}" if scope and target.isidentifier() else ""
    if not examples:
        nothing = f"target {target!r} matches no layer{where}, which has no {what} at all"
        foreign = scope == f"{ENCODER_OF_HF}." and kind is not nn.Linear
        return f"{nothing}; {_ONLY_SEGMENT_ANYTHING}" if foreign else nothing
    some = ", ".join(list(examples.values())[:4])
    return f"target {target!r} matches no layer{where}; {what}s there are {some}"


def find_trained(model: nn.Module, train: tuple[str, ...] | str, prefix: str = "") -> set[str]:
    """Return full names of the parameters that ``train`` names, with or without the prefix."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    spelled = hf_names.spellings(names) if encoder_name(model) == ENCODER_OF_HF else {}
    trained = set()
    for entry in (train,) if isinstance(train, str) else tuple(train):
        if not isinstance(entry, str) or not entry:
            raise ValueError(f"train has {entry!r}, which is not the name of a module or parameter")
        inner = entry.removeprefix(prefix)
        matched = [name for name in names if f"{name}.".startswith(f"{inner}.")]
        matched = matched or [
            name for name, other in spelled.items() if f"{other}.".startswith(f"{inner}.")
        ]
        if not matched:
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(
                f"train names {entry!r}, which has no parameters in this model; its parts are "
                f"{parts}; train=() trains only the adapters"
            )
        trained.update(matched)
    return trained


def attach_to(
    model: Model,
    method: Method,
    layers: dict[str, nn.Module],
    adapted: Mapping[str, Adapter],
    trained: set[str],
    base_dtype: torch.dtype | None,
) -> Model:
    """Put ``adapted`` in place of ``layers``, once everything is found, checked and built."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    for name in trained:
        parameters[name].requires_grad_(True)
    unfrozen = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    fingerprints = {} if base_dtype is None else _cast_frozen(model, base_dtype)
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    for name, module in adapted.items():
        if base_dtype is not None:  # adapters of a base that was float64 before the cast
            for _, parameter in module.adapter_parameters():
                parameter.data = parameter.data.float()
        for place in places[id(layers[name])]:
            parent, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
    method.attached(model, adapted)
    remember(model, Attachment(method, tuple(layers), unfrozen, base_dtype, fingerprints))
    return model


def _cast_frozen(model: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """Cast the encoder's frozen floating tensors; return fingerprints that the cast changes."""
    prefix = f"{encoder_name(model)}." if encoder_name(model) else ""
    encoder = encoder_of(model)
    before = {}

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if dtype == torch.float16:  # rounding twice can differ from rounding once to bfloat16
            before[prefix + name] = fingerprint(tensor)
        return tensor.to(dtype)

    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = cast(name, parameter.data)
    for path, module in encoder.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            continue  # a trained norm keeps its statistics with its weights
        for leaf, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                module._buffers[leaf] = cast(f"{path}.{leaf}" if path else leaf, buffer)
    return before


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (full name, parameter) for all that require a gradient, shared ones once."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    relation_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Make groups for an optimizer: weight decay on matrices and convolutions, none on vectors.

    Biases, norms and other one-dimensional parameters get no decay. Adapters are matrices and get
    it. Groups without parameters are left out.

    relation_lr: learning rate of what ``Adapter.relation_parameters`` yields, such as SAM-COBOT's
        relation, coefficients and heads. One of its authors' scripts trains them at 100 times the
        rate of the rest. They get groups of their own, after the others. None: ``lr``, in the same
        groups as the rest

    Raises ValueError if ``relation_lr`` is not a rate, or if no adapter has a relation.
    """
    if relation_lr is not None and not _is_rate(relation_lr):
        raise ValueError(f"relation_lr is {relation_lr!r}; it must be a finite number, 0 or above")
    layers = adapters(model).values()
    biases = {id(bias) for layer in layers for bias in layer.biases()}
    related = {id(p) for layer in layers for p in layer.relation_parameters()}
    if relation_lr is not None and not related:
        raise ValueError(f"relation_lr is {relation_lr}, but no adapter here has a relation")
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (relation, vector): [] for relation in (False, True) for vector in (False, True)
    }
    for _, parameter in trainable_parameters(model):
        relation = relation_lr is not None and id(parameter) in related
        vector = parameter.ndim < 2 or id(parameter) in biases
        kinds[relation, vector].append(parameter)
    return [
        {
            "params": parameters,
            "lr": relation_lr if relation else lr,
            "weight_decay": 0.0 if vector else weight_decay,
        }
        for (relation, vector), parameters in kinds.items()
        if parameters
    ]


def _is_rate(value: float) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < float("inf")


def merge(model: Model, *, task: int | str | None = None) -> Model:
    """Fold every adapter into its layer's weight, in place. Adapters then cost no time.

    A merged model can only predict. ``unmerge`` restores the weights, bit for bit. state_dict and
    ``save_adapter`` give the same tensors in both states. Merging again folds the adapters'
    present values.

    task: the task to fold, of an adapter for several tasks; None is the task that is set.
        Raises ValueError if several are set, or if the adapter has no tasks.
    """
    layers = _mergeable(model).values()
    if task is not None:
        numbers_of(model, task)  # raises before anything changes
        unmerge(model)
        set_task(model, task)
    for layer in layers:
        layer.merge()
    return model


def unmerge(model: Model) -> Model:
    """Undo ``merge``; leave layers that are not merged as they are."""
    for layer in _mergeable(model).values():
        layer.unmerge()
    return model


class Mergeable(Protocol):
    """What ``merge`` and ``unmerge`` need from an adapter."""

    weight: torch.Tensor

    @property
    def merged(self) -> bool: ...

    def merge(self) -> None: ...

    def unmerge(self) -> None: ...

    def adapter_state(self) -> Iterator[tuple[str, torch.Tensor]]: ...


def _has_merge(layer: Adapter) -> TypeGuard[Mergeable]:
    return hasattr(layer, "merge")


def _mergeable(model: nn.Module) -> dict[str, Mergeable]:
    found = adapters(unwrapped(model))
    if not found:
        nothing = f"this {type(unwrapped(model)).__name__} has no adapter{unclear(model)}"
        raise ValueError(call_of_owner(unwrapped(model), "merge") or nothing)
    layers: dict[str, Mergeable] = {}
    for name, layer in found.items():
        if not _has_merge(layer):
            raise ValueError(f"{name} is a {type(layer).__name__}, {layer.unmergeable}")
        layers[name] = layer
    return layers


def merged_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the plain model's state dict with all adapters folded in; leave the model as it is.

    Names are those of the model before ``attach``, so a stock model loads it. A binary head is
    written back into SAM's decoder, as ``samfast.models.stock_state_dict`` does.
    """
    model = unwrapped(model)
    layers = _mergeable(model)
    was_merged = [layer.merged for layer in layers.values()]
    state = model.state_dict()
    for name, layer in layers.items():
        for added, _ in layer.adapter_state():
            state.pop(f"{name}.{added}" if name else added)
        layer.merge()
        state[f"{name}.weight" if name else "weight"] = layer.weight.detach()
    for layer, merged in zip(layers.values(), was_merged, strict=True):
        if not merged:
            layer.unmerge()
    return stock_state_dict(model, state)
