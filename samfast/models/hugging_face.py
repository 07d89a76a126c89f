# SPDX-License-Identifier: Apache-2.0
"""Give Hugging Face's SamModel and SamHQModel segment_anything's names, for ``segment``.

Nothing is copied: the parts are the model's own modules, so hooks, adapters and fused layers run.
The norms of the decoder keep their own eps (see ``samfast.models.hf_names``).

A SamHQModel's masks are those of its own forward. In transformers 5.23 they differ from SAM-HQ's:
its decoder upscales the encoder's embeddings with height and width exchanged. SAM-HQ and earlier
versions of transformers upscale the output of the decoder's transformer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from samfast.adapters.foreign import Foreign
from samfast.models.objects import of_each_object

SAM = "transformers.models.sam.modeling_sam.SamModel"
SAM_HQ = "transformers.models.sam_hq.modeling_sam_hq.SamHQModel"
# The image processor's numbers, equal to those of segment_anything's Sam.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def is_hugging_face(model: nn.Module) -> bool:
    """True for either of the two classes, or one derived from them."""
    return is_a(model, SAM) or is_a(model, SAM_HQ)


def is_high_quality(model: nn.Module) -> bool:
    """True for a SamHQModel, whose decoder adds another token's mask to the first."""
    return is_a(model, SAM_HQ)


def is_a(model: nn.Module, name: str) -> bool:
    """True if its class, or a base class, is the one of that name."""
    return any(f"{kind.__module__}.{kind.__qualname__}" == name for kind in type(model).__mro__)


class HuggingFaceSam:
    """A SamModel or SamHQModel as ``segment`` sees it.

    pe_layer: positions of the embedding's cells. Prompts use the prompt encoder's, which is the
        same Parameter unless a wrapper copied one of them.
    Raises ValueError if the parts' configurations have different image sizes.
    """

    def __init__(self, model: Foreign):
        high_quality = is_high_quality(model)
        encoder, prompts = model.vision_encoder, model.prompt_encoder
        if prompts.input_image_size != encoder.image_size:
            raise ValueError(
                f"expected one image size, but this {type(model).__name__}'s vision encoder has "
                f"{encoder.image_size} and its prompt encoder {prompts.input_image_size}; set "
                "image_size in both configurations"
            )
        self.image_encoder: _Encoder = _EncoderHQ(encoder) if high_quality else _Encoder(encoder)
        self.prompt_encoder = _PromptEncoder(prompts)
        decoder = model.mask_decoder
        self.mask_decoder: _Decoder = _DecoderHQ(decoder) if high_quality else _Decoder(decoder)
        self.pe_layer = Positions(model.shared_image_embedding)
        weight = encoder.patch_embed.projection.weight
        self.pixel_mean = of_channels(PIXEL_MEAN, weight)
        self.pixel_std = of_channels(PIXEL_STD, weight)


def of_channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Fill a float32 tensor [3, 1, 1] on a device; a copy would wait, filling does not."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    device = like.device
    parts = [torch.full((1, 1, 1), v, dtype=torch.float32, device=device) for v in values]
    return torch.cat(parts).to(dtype)


class Positions:
    """The Fourier features of prompts and cells, under segment_anything's name."""

    def __init__(self, layer: Foreign):
        self.positional_encoding_gaussian_matrix = layer.positional_embedding


class _Patches:
    def __init__(self, patches: Foreign):
        self.proj = patches.projection


class _Encoder:
    """Encode pixels [B, 3, H, W] to embeddings [B, 256, n, n]."""

    more_channels = 0

    def __init__(self, encoder: Foreign):
        self.encoder = encoder
        self.img_size = encoder.image_size
        self.patch_embed = _Patches(encoder.patch_embed)

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels, return_dict=True).last_hidden_state


class _EncoderHQ(_Encoder):
    """Append the channels of the first global block's output to the embeddings' 256."""

    def __init__(self, encoder: Foreign):
        super().__init__(encoder)
        if all(layer.window_size > 0 for layer in encoder.layers):
            raise ValueError(
                "expected a global block, whose output the decoder reads, but this SamHQModel "
                "has none"
            )
        self.more_channels = len(encoder.patch_embed.projection.weight)

    def __call__(self, pixels: Tensor) -> Tensor:
        found = self.encoder(pixels, return_dict=True)
        block = found.intermediate_embeddings[0].permute(0, 3, 1, 2)
        return torch.cat([found.last_hidden_state, block], dim=1)


class _PromptEncoder:
    def __init__(self, encoder: Foreign):
        self.pe_layer = Positions(encoder.shared_embedding)
        self.input_image_size = (encoder.input_image_size, encoder.input_image_size)
        self.point_embeddings = encoder.point_embed
        self.not_a_point_embed = encoder.not_a_point_embed
        self.no_mask_embed = encoder.no_mask_embed


class _Decoder:
    """Its transformer has an extra axis for prompts, here always of size one."""

    def __init__(self, decoder: Foreign):
        self.decoder = decoder
        self.iou_token, self.mask_tokens = decoder.iou_token, decoder.mask_tokens
        self.output_hypernetworks_mlps = decoder.output_hypernetworks_mlps

    def modules(self) -> Iterator[nn.Module]:
        return self.decoder.modules()

    def transformer(
        self, source: Tensor, positions: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        tokens, source = self.decoder.transformer(
            point_embeddings=tokens[:, None],
            image_embeddings=source,
            image_positional_embeddings=positions,
            attention_similarity=None,
        )
        return tokens[:, 0], source[:, 0]

    def output_upscaling(self, source: Tensor) -> Tensor:
        decoder = self.decoder
        features = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(source)))
        return decoder.activation(decoder.upscale_conv2(features))


class _DecoderHQ(_Decoder):
    """Runs its own forward, which adds another token's mask and reads more of the encoder."""

    def predict(
        self,
        embeddings: Tensor,
        positions: Tensor,
        prompts: Tensor,
        dense: Tensor,
        first: int,
        count: int,
    ) -> Tensor:
        """Decode the objects from `first` on, `count` per image, as ``decode_objects`` does."""
        dtype, channels = self.mask_tokens.weight.dtype, positions.shape[1]
        if len(prompts) == len(embeddings) * count:
            prompts = prompts.unflatten(0, (len(embeddings), count))
        else:
            embeddings = of_each_object(embeddings, first, len(prompts), count)
            prompts = prompts[:, None]
        embeddings = embeddings.to(dtype)
        masks = self.decoder(
            image_embeddings=embeddings[:, :channels],
            image_positional_embeddings=positions.to(dtype).expand(len(embeddings), -1, -1, -1),
            sparse_prompt_embeddings=prompts.to(dtype),
            dense_prompt_embeddings=dense.to(dtype)[..., None, None],
            multimask_output=False,
            hq_token_only=False,
            intermediate_embeddings=[embeddings[:, channels:].permute(0, 2, 3, 1)],
        )[0]
        return masks.flatten(0, 1)[:, 0]
