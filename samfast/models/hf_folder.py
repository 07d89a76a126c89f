# SPDX-License-Identifier: Apache-2.0
"""Make the files of a Hugging Face ``SamModel`` folder for a SAM, without transformers."""

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save
from torch import Tensor

from samfast.models.architectures import CHANNELS, PATCH, Architecture
from samfast.models.hf_names import to_hugging_face

_EPS = 1e-5  # of the decoder's norms, as in SAM's training; Hugging Face's default is 1e-6
_POINTS = 4  # embeddings of points: on and off the object, two corners of a box


def hugging_face_files(
    state: Mapping[str, Tensor], sizes: Architecture, image_size: int
) -> dict[str, bytes]:
    """Return file contents by name: configuration, processor and weights.

    state: a Sam's tensors by segment_anything's names; its mask tokens give the number of masks
    sizes: sizes of the image encoder   image_size: side of its images in pixels

    ``SamModel.from_pretrained`` and ``SamProcessor.from_pretrained`` read the folder. The decoder's
    norms get the eps that SAM was trained with, so results equal segment_anything's.
    """
    named = to_hugging_face({name: t.detach().cpu().contiguous() for name, t in state.items()})
    weights = {name: tensor.clone() for name, tensor in named.items()}  # none share memory
    return {
        "config.json": _json(_config(state, sizes, image_size)),
        "preprocessor_config.json": _json(_processor(image_size)),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _config(state: Mapping[str, Tensor], sizes: Architecture, image_size: int) -> dict[str, Any]:
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": "sam_vision_model",
            "hidden_size": sizes.width,
            "num_hidden_layers": sizes.depth,
            "num_attention_heads": sizes.heads,
            "mlp_dim": 4 * sizes.width,
            "image_size": image_size,
            "patch_size": PATCH,
            "window_size": sizes.window,
            "global_attn_indexes": list(sizes.global_blocks),
            "output_channels": CHANNELS,
            "num_pos_feats": CHANNELS // 2,
            "layer_norm_eps": 1e-6,
        },
        "prompt_encoder_config": {
            "model_type": "sam_prompt_encoder",
            "hidden_size": CHANNELS,
            "image_size": image_size,
            "image_embedding_size": image_size // PATCH,
            "patch_size": PATCH,
            "num_point_embeddings": _POINTS,
        },
        "mask_decoder_config": {
            "model_type": "sam_mask_decoder",
            "hidden_size": CHANNELS,
            "num_multimask_outputs": len(state["mask_decoder.mask_tokens.weight"]) - 1,
            "layer_norm_eps": _EPS,
        },
    }


def _processor(image_size: int) -> dict[str, Any]:
    square = {"height": image_size, "width": image_size}
    quarter = image_size // 4
    return {
        "processor_class": "SamProcessor",
        "image_processor_type": "SamImageProcessor",
        "size": {"longest_edge": image_size},
        "pad_size": square,
        "mask_size": {"longest_edge": quarter},
        "mask_pad_size": {"height": quarter, "width": quarter},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "rescale_factor": 1 / 255,
        "resample": 2,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
    }
