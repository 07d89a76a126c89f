# SPDX-License-Identifier: Apache-2.0
"""Copy a model with its adapters as plain modules, for torch.export and torch.onnx."""

import copy

from torch import nn

from samfast.adapters.adapter import Adapter, adapters
from samfast.adapters.encoder_forward import EncoderForward
from samfast.adapters.wrappers import ATTACHMENT, unwrapped
from samfast.fused.classes import is_fused
from samfast.fused.fuse import unfuse
from samfast.methods.kronecker.phm_layer import SumOfProducts
from samfast.methods.ta_lora.layer import TaskLoraLinear
from samfast.methods.ta_lora.tasks import set_task
from samfast.models.multi_task import MultiTaskSam


def export_form(model: nn.Module, *, task: int | str | None = None) -> nn.Module:
    """Copy a model so that it needs only torch's operators, for torch.export and torch.onnx.

    model: a model with samfast's adapters, such as from ``load_adapted``; it stays as it is
    task: the task of a TA-LoRA adapter (default: the one that is set); a MultiTaskSam keeps only it

    LoRA, SAM-COBOT on LoRA, TA-LoRA and Kronecker are added to the weights. AdaptFormer becomes a
    branch of plain layers. Conv-LoRA becomes ``DenseConvLora``: all experts run, and the gate picks
    one per map. Blocks are not fused. The copy is in eval mode and frozen.

        form = samfast.export_form(samfast.load_adapted("runs/cells", "sam_vit_b_01ec64.pth"))
        pixels = torch.zeros(1, 3, 1024, 1024)  # normalised as by Sam.preprocess
        program = torch.export.export(form.image_encoder, (pixels,), strict=False)

    Raises ValueError for a layer without such a form, and if several TA-LoRA tasks are set.
    """
    model = copy.deepcopy(unwrapped(model)).eval()
    if any(is_fused(module) for module in model.modules()):
        unfuse(model)
    _leave_one_task(model, task)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (Adapter, SumOfProducts)):
            try:
                plain = layer.plain()
            except ValueError as error:
                raise ValueError(f"{name or 'the model'} {error}") from None
            if not name:
                return plain
            model.set_submodule(name, plain)
    for module in model.modules():
        _remove_sharing(module)
        vars(module).pop(ATTACHMENT, None)
    return model.requires_grad_(False)


def _leave_one_task(model: nn.Module, task: int | str | None) -> None:
    """Set the task of a TA-LoRA adapter, and remove the other tasks from a MultiTaskSam."""
    layers = [m for m in adapters(model).values() if isinstance(m, TaskLoraLinear)]
    if task is not None:
        set_task(model, task)
    if not layers:
        return
    chosen = layers[0].chosen
    if len(chosen) != 1:
        raise ValueError(
            f"{len(chosen)} tasks are set, but an export form has one; pass export_form(model, "
            "task=...)"
        )
    if isinstance(model, MultiTaskSam):
        model.tasks = (model.tasks[chosen[0]],)
        name = model.tasks[0].name
        for held in (model.mask_decoders, model.no_mask_embeds):
            for other in [key for key in held if key != name]:
                del held[other]


def _remove_sharing(module: nn.Module) -> None:
    """Remove the hooks that compute what an encoder's adapters share."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), EncoderForward):
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
    posts = module._load_state_dict_post_hooks
    for key, hook in list(posts.items()):
        if isinstance(getattr(hook, "__self__", None), EncoderForward):
            del posts[key]
