# SPDX-License-Identifier: Apache-2.0
"""Give Hugging Face's Sam3TrackerModel segment_anything's names, for ``segment``.

The tracker is the part of SAM 3 that takes boxes and points. Nothing is copied: the parts are the
model's own modules, so adapters and fused layers run.

The mask is that of the first mask token, with boxes and with points, as in the model's training. In
eval mode the model's own forward may choose another of its four masks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samfast.adapters.foreign import Foreign
from samfast.models.hugging_face import Positions, is_a, of_channels
from samfast.models.objects import of_each_object

TRACKER = "transformers.models.sam3_tracker.modeling_sam3_tracker.Sam3TrackerModel"
HALF = (127.5, 127.5, 127.5)  # mean and deviation of pixels in the image processor
# What one mask reads in the decoder.
TRAINED_DECODER = tuple(
    f"mask_decoder.{part}"
    for part in (
        *("transformer", "obj_score_token", "iou_token", "mask_tokens", "conv_s0", "conv_s1"),
        *("upscale_conv1", "upscale_layer_norm", "upscale_conv2", "output_hypernetworks_mlps.0"),
    )
)


def is_tracker(model: nn.Module) -> bool:
    """True for a Sam3TrackerModel, or a class derived from it."""
    return is_a(model, TRACKER)


def unread_maps(model: Foreign) -> list[str]:
    """Return prefixes of parameters that compute maps which the tracker does not use."""
    count = len(model.vision_encoder.neck.fpn_layers)
    if count == 3:
        return []
    layers = [f"vision_encoder.neck.fpn_layers.{i}." for i in range(3, count)]
    return ["no_memory_embedding", *layers]


class TrackerSam:
    """A Sam3TrackerModel as ``segment`` sees it."""

    def __init__(self, model: Foreign):
        encoder, decoder = model.vision_encoder, model.mask_decoder
        size = encoder.backbone.config.image_size
        if isinstance(size, (list, tuple)):
            if size[0] != size[1]:
                raise ValueError(f"expected a square image size, but this model has {tuple(size)}")
            size = size[0]
        if model.prompt_encoder.input_image_size != size:
            raise ValueError(
                f"expected one image size, but this {type(model).__name__}'s vision encoder has "
                f"{size} and its prompt encoder {model.prompt_encoder.input_image_size}; set "
                "image_size in both configurations"
            )
        self.image_encoder = _Encoder(model, size)
        self.prompt_encoder = _PromptEncoder(model.prompt_encoder)
        self.mask_decoder = _Decoder(decoder, self.image_encoder.more)
        self.pe_layer = Positions(model.shared_image_embedding)
        weight = encoder.backbone.embeddings.patch_embeddings.projection.weight
        self.pixel_mean = self.pixel_std = of_channels(HALF, weight)


class _Patches:
    def __init__(self, embeddings: Foreign):
        self.proj = embeddings.patch_embeddings.projection


class _Encoder:
    """Encodes pixels [B, 3, H, W] to embeddings [B, C, n, n], with two finer maps appended.

    The finer maps are folded to n × n: 4 × 4 cells of the first, 2 × 2 of the second.

    more: channels of the two maps
    """

    def __init__(self, model: Foreign, size: int):
        self.model, self.img_size = model, size
        self.patch_embed = _Patches(model.vision_encoder.backbone.embeddings)
        decoder = model.mask_decoder
        self.more = decoder.conv_s0.out_channels, decoder.conv_s1.out_channels
        self.more_channels = 16 * self.more[0] + 4 * self.more[1]

    def __call__(self, pixels: Tensor) -> Tensor:
        model, decoder = self.model, self.model.mask_decoder
        found = model.vision_encoder(pixels, return_dict=True).fpn_hidden_states
        fine, middle, *coarse = found
        last = coarse[0]
        if len(coarse) == 1:  # with more, the model adds this to a map that it does not use
            last = last + model.no_memory_embedding.transpose(1, 2)[..., None]
        dtype = decoder.conv_s0.weight.dtype  # even if the encoder is in 16 bits
        fine, middle = decoder.conv_s0(fine.to(dtype)), decoder.conv_s1(middle.to(dtype))
        return torch.cat([last, F.pixel_unshuffle(fine, 4), F.pixel_unshuffle(middle, 2)], 1)


class _PromptEncoder:
    """Encodes prompts: a padding point follows boxes and points; two stand for no prompt."""

    pads_always = True

    def __init__(self, encoder: Foreign):
        self.pe_layer = Positions(encoder.shared_embedding)
        self.input_image_size = (encoder.input_image_size, encoder.input_image_size)
        self.point_embeddings = encoder.point_embed.weight.split(1)
        self.not_a_point_embed = encoder.not_a_point_embed
        self.no_mask_embed = encoder.no_mask_embed


class _Decoder:
    """Adds the two finer maps to those that it upscales."""

    def __init__(self, decoder: Foreign, more: tuple[int, int]):
        self.decoder, self.more = decoder, more
        self.mask_tokens = decoder.mask_tokens

    def modules(self) -> Iterator[nn.Module]:
        return self.decoder.modules()

    def predict(
        self, embeddings: Tensor, positions: Tensor, prompts: Tensor, dense: Tensor, first: int,
        count: int,
    ) -> Tensor:  # fmt: skip
        """Decode the objects from `first` on, `count` per image, as ``decode_objects`` does."""
        decoder, channels = self.decoder, positions.shape[1]
        dtype = decoder.mask_tokens.weight.dtype
        each = of_each_object(embeddings.to(dtype), first, len(prompts), count)
        source, fine, middle = each.split([channels, 16 * self.more[0], 4 * self.more[1]], 1)
        dense = dense.to(dtype)[..., None, None]
        if len(dense) > 1:
            rows = dense.expand(len(embeddings), *dense.shape).flatten(0, 1)
            dense = rows[first : first + len(prompts)]
        parts = (decoder.obj_score_token, decoder.iou_token, decoder.mask_tokens)
        own = torch.cat([part.weight for part in parts])
        tokens = torch.cat([own.expand(len(prompts), -1, -1), prompts.to(dtype)], 1)
        tokens, source = decoder.transformer(
            point_embeddings=tokens[:, None],
            image_embeddings=source + dense,
            image_positional_embeddings=positions.to(dtype).expand(len(source), -1, -1, -1),
            attention_similarity=None,
        )
        source = source[:, 0].transpose(1, 2).unflatten(2, embeddings.shape[2:])
        up = decoder.upscale_conv1(source) + F.pixel_shuffle(middle, 2)
        up = decoder.activation(decoder.upscale_layer_norm(up))
        up = decoder.activation(decoder.upscale_conv2(up) + F.pixel_shuffle(fine, 4))
        weights = decoder.output_hypernetworks_mlps[0](tokens[:, 0, 2])
        masks = weights[:, None] @ up.flatten(2)
        return masks.view(len(masks), *up.shape[2:])
