# SPDX-License-Identifier: Apache-2.0
"""Check that an adapter fits a model: its layers, tensors, head and base."""

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from samfast.adapters.adapter import Adapter, adapter_state
from samfast.adapters.attachment import Attachment, attachment
from samfast.adapters.base_digest import digest_of, fingerprints, identity_of
from samfast.adapters.finite import base_problem
from samfast.adapters.wrappers import encoder_name, encoder_of, levels
from samfast.files.format import AdapterFile, dtype_name
from samfast.files.spelling import base_identity
from samfast.methods.attach import check_layer
from samfast.models.heads import HEADS, head_of


def level_of(model: nn.Module, adapter: AdapterFile) -> nn.Module:
    """Return the model inside its wrappers, or the wrapper that the adapter's names fit."""
    inside = levels(model)
    for level in inside[:-1]:
        modules = dict(level.named_modules())
        if adapter.layers and all(name in modules for name in adapter.layers):
            return level
    return inside[-1]


def image_size_of(model: nn.Module) -> int | None:
    """Return the side in pixels of the encoder's images; None for other models."""
    if not encoder_name(model):
        return None
    encoder = encoder_of(model)  # segment_anything's, or Hugging Face's
    size = getattr(encoder, "img_size", None) or getattr(encoder, "image_size", None)
    config = getattr(getattr(encoder, "backbone", None), "config", None)  # SAM 3's
    return size if size is not None else getattr(config, "image_size", None)


def _sizes(model: nn.Module, adapter: AdapterFile) -> str | None:
    """Return a phrase with both image sizes; None if they agree."""
    theirs, mine = adapter.record.get("image_size"), image_size_of(model)
    if theirs is None or mine is None or theirs == mine:
        return None
    return f"was trained at image size {theirs}, but the model has image size {mine}"


def find_layers_of(model: nn.Module, adapter: AdapterFile) -> dict[str, nn.Module]:
    """Find and check the stock model's layers that the adapter belongs on."""
    modules = dict(model.named_modules())
    layers = {}
    for name in adapter.layers:
        layer = modules.get(name)
        if not isinstance(layer, adapter.method.replaces):
            kind = adapter.method.replaces.__name__
            if layer is not None and "format" not in adapter.record:  # PEFT's
                raise ValueError(
                    f"adapter {adapter.folder} adapts {name}, a {type(layer).__name__}, but "
                    f"samfast adapts only nn.{kind}; load it with PEFT's "
                    "PeftModel.from_pretrained, then call samfast.fuse"
                )
            found = "nothing with that name" if layer is None else f"a {type(layer).__name__}"
            raise ValueError(
                f"adapter {adapter.folder} belongs on a {kind} {name}, but the model has {found}"
            )
        check_layer(adapter.method, name, layer)
        layers[name] = layer
    return layers


def head_for(model: nn.Module, adapter: AdapterFile) -> str:
    """Return the head that the adapter needs; PEFT's adapters do not name one."""
    mine, wanted = head_of(model), adapter.record.get("head")
    if wanted not in tuple(HEADS) or wanted == mine:
        return mine
    if mine != "sam" or attachment(model) is not None:
        raise ValueError(
            f"adapter {adapter.folder} was trained with head {wanted!r}, but the model has {mine!r}"
        )
    return wanted


def check_same(attached: Attachment, adapter: AdapterFile) -> None:
    """Raise ValueError if the adapter's method or layers differ from the model's."""
    if not attached.method.same_update(adapter.method):
        raise ValueError(
            f"adapter {adapter.folder} is {adapter.method!r}, but the model has {attached.method!r}"
        )
    different = set(attached.layers) ^ set(adapter.layers)
    if different:
        name = sorted(different)[0]
        has, lacks = "the model", f"adapter {adapter.folder}"
        if name in adapter.layers:
            has, lacks = lacks, has
        raise ValueError(f"{has} adapts {name}, but {lacks} does not")


def check_same_dtype(attached: Attachment, base_dtype: torch.dtype | None) -> None:
    """Raise ValueError if the model was attached with another base dtype."""
    if base_dtype not in (None, attached.base_dtype):
        raise ValueError(
            f"base_dtype is {dtype_name(base_dtype)}, but the model was attached with "
            f"{dtype_name(attached.base_dtype)}"
        )


def check_finite_base(model: nn.Module, adapter: AdapterFile) -> None:
    """Raise ValueError if the base has NaN or infinity."""
    if (problem := base_problem(model, adapter.tensors.keys())) is not None:
        raise ValueError(
            f"adapter {adapter.folder} expects a base of finite numbers, but the model's "
            f"{problem}; load its weights again"
        )


def check_tensors(model: nn.Module, adapter: AdapterFile, adapted: Mapping[str, Adapter]) -> None:
    """Raise ValueError unless the file's tensors and the model's places match one to one."""
    wanted, sizes = adapter_state(adapted), _sizes(model, adapter)
    for name in wanted:
        if name not in adapter.tensors:
            raise ValueError(f"adapter {adapter.folder} has no tensor {name}")
    for layer, module in adapted.items():
        inside = f"{layer}." if layer else ""
        state = {n[len(inside) :]: t for n, t in adapter.tensors.items() if n.startswith(inside)}
        if (problem := module.state_problem(state)) is not None:
            raise ValueError(f"adapter {adapter.folder} cannot be used in {layer}: {problem}")
    places = {**model.state_dict(keep_vars=True), **wanted}
    for name, tensor in adapter.tensors.items():
        if name not in places:
            raise ValueError(
                f"adapter {adapter.folder} has a tensor {name}, which the model does not have"
            )
        if tensor.shape != places[name].shape:
            raise ValueError(
                f"adapter {adapter.folder} has {name} of shape {tuple(tensor.shape)}, but in the "
                f"model it is {tuple(places[name].shape)}{'; it ' + sizes if sizes else ''}"
            )
        if _kind(tensor) != _kind(places[name]):
            raise ValueError(
                f"adapter {adapter.folder} has {name} as {tensor.dtype}, but in the model it is "
                f"{places[name].dtype}"
            )


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def check_base_of(model: nn.Module, adapter: AdapterFile) -> None:
    """Raise ValueError for another base; warn if only the image size differs."""
    stored, identity = adapter.record["base_digest"], adapter.record.get("base_identity")
    if stored is None:  # PEFT's
        return
    prints, sizes = fingerprints(model, adapter.tensors.keys()), _sizes(model, adapter)
    digest = digest_of(prints) if identity is None else base_identity(prints)
    # samfast 0.1.0 computed the identity of a SamModel from Hugging Face's names.
    if digest == (identity or stored) or identity_of(prints) == identity:
        if sizes is not None:
            warnings.warn(f"adapter {adapter.folder} {sizes}", stacklevel=3)
        return
    if sizes is not None and identity is None:
        raise ValueError(
            f"adapter {adapter.folder} {sizes}, and samfast 0.1.0 wrote its digest, which holds at "
            "one image size only; build the model at that size, or pass check_base=False"
        )
    base = getattr(model, "samfast_base", None)
    mine = base.get("name") if isinstance(base, dict) else base
    theirs = adapter.record["base"].get("name")
    raise ValueError(
        f"adapter {adapter.folder} {f'{sizes}, and ' if sizes else ''}was trained on another base: "
        f"{theirs or 'unnamed'} with digest {(identity or stored)[:12]}, while this model is "
        f"{mine or 'unnamed'} with digest {digest[:12]}; pass check_base=False to load it anyway"
    )
