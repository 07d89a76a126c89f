# SPDX-License-Identifier: Apache-2.0
"""The halves of a SAM as modules that take only tensors, for torch.export with any batch.

Each is built from an ``export_form`` in float32 or float64.
"""

from typing import Any

import torch
from torch import Tensor, nn

from samfast.models.multi_task import MultiTaskSam
from samfast.models.segment import (
    bilinear,
    encode_grid,
    encode_pixels,
    grid_layer,
    tokens_and_masks,
    upscale,
)


class ImageEncoder(nn.Module):
    """images [batch, 3, S, S], RGB 0..255 padded with the pixel mean -> [batch, 256, S/16, S/16]"""

    image_encoder: Any
    mean: Tensor
    std: Tensor

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.image_encoder = sam.image_encoder
        self.register_buffer("mean", sam.pixel_mean.clone())
        self.register_buffer("std", sam.pixel_std.clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.image_encoder((images - self.mean) / self.std)


class _Decoder(nn.Module):
    """Base class of decoders. side: side of images   cells: side of embeddings"""

    positions: Tensor
    side: int
    cells: int

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.side = sam.image_encoder.img_size
        self.cells = self.side // sam.image_encoder.patch_embed.proj.stride[0]
        positions = encode_grid(grid_layer(sam), (self.cells, self.cells))
        self.register_buffer("positions", positions.detach())


class TaskDecoder(_Decoder):
    """embeddings [batch, 256, S/16, S/16] -> logits [batch, channels, S, S] of a task's channels"""

    dense: Tensor

    def __init__(self, model: MultiTaskSam, task: str) -> None:
        super().__init__(model)
        self.mask_decoder = model.mask_decoders[task]
        self.register_buffer("dense", model.no_mask_embeds[task].detach().clone())

    def forward(self, image_embeddings: Tensor) -> Tensor:
        channels = self.dense.shape[0]
        source = image_embeddings[:, None] + self.dense[:, :, None, None]
        source = source.flatten(0, 1)  # [batch * channels, 256, n, n]
        prompts = source.new_zeros((source.shape[0], 0, source.shape[1]))
        _, masks = tokens_and_masks(self.mask_decoder, source, self.positions, prompts)
        masks = upscale(masks, (self.side, self.side), self.side)
        return masks.unflatten(0, (-1, channels))


class PromptDecoder(_Decoder):
    """The inputs and outputs of segment_anything's SamOnnxModel, for one mask of each sample.

    image_embeddings: [batch, 256, n, n], n = S/16
    point_coords: [batch, points, 2], x and y in pixels of the S x S image
    point_labels: [batch, points], 1 foreground, 0 background, 2 and 3 the upper left and lower
        right corner of a box, -1 padding. Points without a box need one padding point. No points
        mean no prompt.
    mask_input: [batch, 1, 4n, 4n], logits   has_mask_input: [1], 0 or 1
    orig_im_size: [2], height and width of the photo whose longer side was resized to S
    masks: [batch, 1, height, width]   iou_predictions: [batch, 1]
    low_res_masks: [batch, 1, 4n, 4n]

    The mask is always that of the first mask token, which ``finetune`` trains.
    """

    mask_decoder: Any
    prompt_encoder: Any
    upscaling: Tensor

    def __init__(self, sam: Any) -> None:
        super().__init__(sam)
        self.mask_decoder = sam.mask_decoder
        self.prompt_encoder = sam.prompt_encoder
        weights = bilinear(4 * self.cells, self.side, self.positions.device, self.positions.dtype)
        self.register_buffer("upscaling", weights)  # [S, 4n]

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        source = image_embeddings + self._dense(mask_input, has_mask_input)
        prompts = self._tokens(point_coords, point_labels)
        tokens, masks = tokens_and_masks(self.mask_decoder, source, self.positions, prompts)
        low_res = masks[:, None]
        quality = self.mask_decoder.iou_prediction_head(tokens[:, 0])[:, :1]
        return self._resized(low_res, orig_im_size), quality, low_res

    def _tokens(self, coords: Tensor, labels: Tensor) -> Tensor:
        encoder, labels = self.prompt_encoder, labels[..., None]
        kinds = [kind.weight for kind in encoder.point_embeddings]
        points = encode_pixels(encoder, coords)
        for number, kind in enumerate(kinds):
            points = points + torch.where(labels == number, kind, torch.zeros_like(kind))
        return torch.where(labels == -1, encoder.not_a_point_embed.weight, points)

    def _dense(self, masks: Tensor, given: Tensor) -> Tensor:
        nothing = self.prompt_encoder.no_mask_embed.weight[..., None, None]
        embedded = self.prompt_encoder.mask_downscaling(masks)
        return torch.where(given.view(1, 1, 1, 1) > 0, embedded, nothing)

    def _resized(self, masks: Tensor, size: Tensor) -> Tensor:
        """Upscale to S x S, remove the padding and resize to the photo, with two products."""
        size = size.to(masks.dtype)
        kept = torch.floor(size * (self.side / size.max()) + 0.5)  # in the S x S image
        sides: list[Any] = [n.item() for n in size.to(torch.int64).unbind()]
        rows, columns = self._weights(sides[0], kept[0]), self._weights(sides[1], kept[1])
        return rows @ masks @ columns.t()

    def _weights(self, count: int, kept: Tensor) -> Tensor:
        """Return [count, 4n]: the weights of the low-resolution mask for each of `count` lines."""
        torch._check(count > 0)
        like: dict[str, Any] = {"dtype": self.upscaling.dtype, "device": self.upscaling.device}
        at = (torch.arange(count, **like) + 0.5) * (kept / count) - 0.5
        at = torch.minimum(at.clamp(min=0), kept - 1)
        distance = at[:, None] - torch.arange(self.side, **like)
        return (1 - distance.abs()).clamp(min=0) @ self.upscaling
