# SPDX-License-Identifier: Apache-2.0
"""Predict mask logits from images and prompts: batched, differentiable, without device waits.

``Sam.forward`` runs without gradients, one image at a time, and its mask decoder repeats one
image's embedding for all prompts. Here every prompt carries its own image, so a batch is one call.
Results equal segment_anything's loop over images with ``multimask_output=False``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from samfast.adapters.foreign import Foreign
from samfast.models.objects import of_each_object
from samfast.models.prompts import Boxes, Points, check_prompts, padded_boxes
from samfast.models.reading import check_all_read, sam_within

_DRAW_NOTHING = ("torch", "segment_anything", "transformers")  # apart from dropout


@overload
def segment(
    sam: nn.Module,
    images: Tensor,
    boxes: Tensor | None = None,
    points: Points | None = None,
    *,
    decoder_chunk: int | None = None,
) -> Tensor: ...


@overload
def segment(
    sam: nn.Module,
    images: Tensor,
    boxes: Sequence[Tensor],
    points: Points | None = None,
    *,
    decoder_chunk: int | None = None,
) -> list[Tensor]: ...


def segment(
    sam: nn.Module,
    images: Tensor,
    boxes: Boxes | None = None,
    points: Points | None = None,
    *,
    decoder_chunk: int | None = None,
) -> Tensor | list[Tensor]:
    """Predict mask logits of N objects per image.

    sam: segment_anything's Sam, Hugging Face's SamModel, SamHQModel or Sam3TrackerModel, or a
        wrapper of one, whose own forward is not called. Masks are those of
        ``multimask_output=False``; a Sam3TrackerModel gives that of its first mask token.
    images: [B, 3, H, W] RGB values 0..255, uint8 or float, H and W at most sam's image size
    boxes: [B, N, 4], or [B, 4] for N = 1; corners x, y, x, y in pixels of `images`, upper left
        first; or a list of B tensors [N_i, 4], with any number of boxes per image
    points: (coords [B, N, P, 2], labels [B, N, P]), or without N for N = 1; coords x, y in pixels,
        labels 1 foreground, 0 background, -1 padding
    decoder_chunk: number of the B * N objects that the mask decoder takes at a time; None: all
    out: [B, N, H, W], float32, or float64 if sam is; N = 1 without prompts; for a list of boxes, a
        list of B tensors [N_i, H, W]

    The decoder keeps about 100 MB (float32, 1024 x 1024) per object for the backward. In chunks it
    keeps nothing and recomputes each chunk in the backward. Masks and gradients then agree up to
    rounding. Lists of boxes are padded to the longest.

    Results have the same bits in every run: nothing here adds with atomics. Labels, NaN and
    exchanged corners are checked only on the CPU, since reading them elsewhere would wait for the
    device. Raises ValueError if an input does not fit, and TypeError for a wrong dtype or model.
    Raises RuntimeError in DistributedDataParallel's forward if trained parameters are not read.

    >>> import torch
    >>> from samfast.models import build_sam, segment
    >>> images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    >>> segment(build_sam("vit_tiny", image_size=64), images).shape
    torch.Size([2, 1, 64, 64])
    """
    check_all_read(sam)
    model = sam_within(sam)
    size = _check_images(model, images)
    check_prompts(images, boxes, points)  # before the encoder runs
    check_decoder_chunk(decoder_chunk)
    return decode(model, encode(model, images), size, boxes, points, decoder_chunk=decoder_chunk)


def encode(sam: nn.Module, images: Tensor) -> Tensor:
    """Encode images [B, 3, H, W] to embeddings [B, 256, n, n], n = sam's image size / 16.

    Images are normalised in at least float32, padded with zeros at the right and bottom, then cast
    to the dtype of the encoder's patch embedding. A SamHQModel gives [B, 256 + D, n, n]: its
    decoder also reads the D channels of the encoder's first global block.
    """
    model = sam_within(sam, ("image_encoder",))
    height, width = _check_images(model, images)
    mean, std = model.pixel_mean, model.pixel_std
    dtype = torch.promote_types(mean.dtype, torch.float32)
    pixels = (images.to(dtype) - mean.to(dtype)) / std.to(dtype)
    size = model.image_encoder.img_size
    pixels = F.pad(pixels, (0, size - width, 0, size - height))
    pixels = pixels.to(model.image_encoder.patch_embed.proj.weight.dtype).contiguous()
    if len(pixels) == 0:  # segment_anything's windows refuse an empty batch
        return pixels.new_zeros((0, *_embedding_shape(model)))
    return model.image_encoder(pixels)


@overload
def decode(
    sam: nn.Module,
    embeddings: Tensor,
    size: tuple[int, int],
    boxes: Tensor | None = None,
    points: Points | None = None,
    *,
    decoder_chunk: int | None = None,
) -> Tensor: ...


@overload
def decode(
    sam: nn.Module,
    embeddings: Tensor,
    size: tuple[int, int],
    boxes: Sequence[Tensor],
    points: Points | None = None,
    *,
    decoder_chunk: int | None = None,
) -> list[Tensor]: ...


def decode(
    sam: nn.Module,
    embeddings: Tensor,
    size: tuple[int, int],
    boxes: Boxes | None = None,
    points: Points | None = None,
    *,
    decoder_chunk: int | None = None,
) -> Tensor | list[Tensor]:
    """Decode ``encode``'s embeddings of images of `size` (H, W) to logits [B, N, H, W].

    Prompts, chunks and result are as in segment.
    """
    model = sam_within(sam)
    shape = tuple(embeddings.shape)
    if len(shape) != 4 or shape[1:] != _embedding_shape(model):
        wanted = ", ".join(map(str, _embedding_shape(model)))
        raise ValueError(f"image embeddings have shape {shape}, not (batch, {wanted})")
    _check_size(model, size)
    count = check_prompts(embeddings, boxes, points)
    check_decoder_chunk(decoder_chunk)
    padded, counts = padded_boxes(boxes, count)
    encoder = model.prompt_encoder
    tokens = _prompt_tokens(encoder, shape[0] * count, padded, points)
    positions = encode_grid(grid_layer(model), (shape[2], shape[3]))
    dense = encoder.no_mask_embed.weight
    masks = decode_objects(
        model.mask_decoder, embeddings, positions, tokens, dense, count, decoder_chunk
    )
    masks = upscale(masks, size, model.image_encoder.img_size)
    masks = masks.view(shape[0], count, *size)
    return masks if counts is None else [m[:n] for m, n in zip(masks, counts, strict=True)]


def decode_objects(
    decoder: Foreign,
    embeddings: Tensor,
    positions: Tensor,
    prompts: Tensor,
    dense: Tensor,
    count: int,
    chunk: int | None = None,
) -> Tensor:
    """Decode logits [B * count, 4n, 4n] of the first mask token, the one for single masks.

    embeddings: [B, 256, n, n]   positions: [1, 256, n, n]
    prompts: [B * count, T, 256], in sequence per image
    dense: added to each cell of the embeddings, [1, 256], or [count, 256] per object
    chunk: as decoder_chunk in segment
    """
    if chunk is None or len(prompts) <= chunk:
        return _predict_masks(decoder, embeddings, positions, prompts, dense, 0, count)
    return _in_chunks(decoder, embeddings, positions, prompts, dense, count, chunk)


def check_decoder_chunk(chunk: int | None) -> None:
    """Raise TypeError or ValueError unless this is None or a number of objects."""
    if chunk is None:
        return
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise TypeError(f"decoder_chunk is {chunk!r}, not a whole number")
    if chunk < 1:
        raise ValueError(f"decoder_chunk is {chunk}; it must be at least 1")


def _embedding_shape(sam: Foreign) -> tuple[int, int, int]:
    encoder = sam.image_encoder
    patches = encoder.patch_embed.proj
    patches = getattr(patches, "base_layer", patches)  # inside PEFT's layer
    side = encoder.img_size // patches.stride[0]
    # Not from the neck, which another library may have wrapped.
    channels = 2 * grid_layer(sam).positional_encoding_gaussian_matrix.shape[1]
    return (channels + getattr(encoder, "more_channels", 0), side, side)


def grid_layer(sam: Foreign) -> Foreign:
    """Return the positional encoding of the embedding's cells."""
    return getattr(sam, "pe_layer", None) or sam.prompt_encoder.pe_layer


def _check_images(sam: Foreign, images: Tensor) -> tuple[int, int]:
    """Check `images`; return their height and width."""
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"images have shape {shape}, not (batch, 3, height, width)")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}, not uint8 or floating point")
    size = shape[2], shape[3]
    _check_size(sam, size)
    if images.device != sam.pixel_mean.device:
        raise ValueError(f"images are on {images.device}, the model on {sam.pixel_mean.device}")
    return size


def _check_size(sam: Foreign, size: tuple[int, int]) -> None:
    limit = sam.image_encoder.img_size
    if not all(0 < side <= limit for side in size):
        raise ValueError(
            f"images are {size[0]} x {size[1]} pixels, but the model takes 1 to {limit}"
        )


def _encode_positions(layer: Foreign, x: Tensor, y: Tensor) -> Tensor:
    """Compute random Fourier features [..., 256] of x and y [...], fractions of the side.

    It uses at least float32, even under autocast: a bfloat16 product of the coordinates would
    misplace a point by pixels.
    """
    matrix = layer.positional_encoding_gaussian_matrix
    dtype = _position_dtype(layer)
    with torch.autocast(matrix.device.type, enabled=False):
        angles = (2 * torch.pi) * ((2 * torch.stack([x, y], dim=-1) - 1) @ matrix.to(dtype))
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _position_dtype(layer: Foreign) -> torch.dtype:
    return torch.promote_types(layer.positional_encoding_gaussian_matrix.dtype, torch.float32)


def encode_pixels(encoder: Foreign, coords: Tensor) -> Tensor:
    """Compute features [..., 256] of the centres of pixels x, y [..., 2]."""
    layer = encoder.pe_layer
    x, y = (coords.to(_position_dtype(layer)) + 0.5).unbind(-1)
    height, width = encoder.input_image_size
    return _encode_positions(layer, x / width, y / height)


def encode_grid(layer: Foreign, size: tuple[int, int]) -> Tensor:
    """Compute features [1, 256, n, n] of the centres of the embedding's cells, size = (n, n).

    layer: the prompt encoder's positional encoding
    """
    height, width = size
    device = layer.positional_encoding_gaussian_matrix.device
    dtype = _position_dtype(layer)
    y = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height
    x = (torch.arange(width, device=device, dtype=dtype) + 0.5) / width
    y, x = torch.meshgrid(y, x, indexing="ij")
    return _encode_positions(layer, x, y).permute(2, 0, 1)[None]


def _prompt_tokens(
    encoder: Foreign, total: int, boxes: Tensor | None, points: Points | None
) -> Tensor:
    """Encode prompt tokens [B*N, T, 256]: points, a padding point if there is no box, two corners.

    SAM 3 pads boxes too, and takes two padding points if there is no prompt.
    """
    background, foreground, first, second = (
        getattr(e, "weight", e) for e in encoder.point_embeddings
    )
    nothing = encoder.not_a_point_embed.weight  # each [1, 256]
    pads = getattr(encoder, "pads_always", False)  # of SAM 3
    tokens = [nothing.new_empty((total, 0, nothing.shape[1]))]
    if points is not None:
        coords, labels = points
        features = encode_pixels(encoder, coords.reshape(total, coords.shape[-2], 2))
        labels = labels.reshape(total, labels.shape[-1], 1)
        kind = torch.where(labels == 1, foreground, background)
        tokens.append(torch.where(labels == -1, nothing, features + kind))
        if boxes is None:
            tokens.append(nothing.expand(total, 1, -1))
    if boxes is not None:
        corners = encode_pixels(encoder, boxes.reshape(total, 2, 2))
        tokens.append(corners + torch.cat([first, second]))
        if pads:
            tokens.append(nothing.expand(total, 1, -1))
    if points is None and boxes is None and pads:  # two padding points
        tokens.append(nothing.expand(total, 2, -1))
    return torch.cat(tokens, dim=1)


def _in_chunks(
    decoder: Foreign,
    embeddings: Tensor,
    positions: Tensor,
    prompts: Tensor,
    dense: Tensor,
    count: int,
    chunk: int,
) -> Tensor:
    """Decode `chunk` objects at a time; checkpoint each chunk if autograd records.

    Random numbers are restored for the recomputation only if a module of the decoder may draw some.
    SAM's own modules draw none, so a CUDA graph can capture them.
    """
    predict = partial(_predict_masks, decoder)
    if torch.is_grad_enabled():
        draws = any(may_draw(module) for module in decoder.modules())
        predict = partial(checkpoint, predict, use_reentrant=False, preserve_rng_state=draws)
    masks = []
    for first in range(0, len(prompts), chunk):
        some = prompts[first : first + chunk]
        image = first // count
        own = embeddings[image : (first + len(some) - 1) // count + 1]
        masks.append(predict(own, positions, some, dense, first - image * count, count))
    return torch.cat(masks)


def may_draw(module: nn.Module) -> bool:
    """True if a training forward may draw random numbers: dropout, or unknown code."""
    known = type(module).__module__.partition(".")[0] in _DRAW_NOTHING
    return module.training and (not known or getattr(module, "p", 0) > 0)


def _predict_masks(
    decoder: Foreign,
    embeddings: Tensor,
    positions: Tensor,
    prompts: Tensor,
    dense: Tensor,
    first: int,
    count: int,
) -> Tensor:
    """Decode the objects from `first` on, `count` per image in sequence.

    Those of the last image may end early. prompts: [M, T, 256], of these objects
    """
    if hasattr(decoder, "predict"):  # Hugging Face's SAM-HQ and SAM 3
        return decoder.predict(embeddings, positions, prompts, dense, first, count)
    dtype = decoder.mask_tokens.weight.dtype
    embeddings, dense = embeddings.to(dtype), dense.to(dtype)[..., None, None]
    if len(dense) == 1:
        source = of_each_object(embeddings + dense, first, len(prompts), count)
    else:
        rows = dense.expand(len(embeddings), *dense.shape).flatten(0, 1)
        source = of_each_object(embeddings, first, len(prompts), count)
        source = source + rows[first : first + len(prompts)]
    return masks_of_sources(decoder, source, positions, prompts)


def masks_of_sources(
    decoder: Foreign, source: Tensor, positions: Tensor, prompts: Tensor
) -> Tensor:
    """Predict logits [M, 4n, 4n] of the first mask token of segment_anything's decoder.

    source: [M, 256, n, n], embeddings and dense prompts of each object, in the decoder's dtype
    positions: [1, 256, n, n]   prompts: [M, T, 256]
    """
    return tokens_and_masks(decoder, source, positions, prompts)[1]


def tokens_and_masks(
    decoder: Any, source: Tensor, positions: Tensor, prompts: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the decoder's tokens [M, 1 + masks + T, 256] and ``masks_of_sources``' logits.

    The quality token is first. torch.export accepts any M, because nothing here takes a len.
    """
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])  # [1 + masks, 256]
    tokens = torch.cat([own.expand(prompts.shape[0], -1, -1), prompts.to(source.dtype)], dim=1)
    size = source.shape[2:]
    positions = positions.to(source.dtype).expand(source.shape[0], -1, -1, -1)

    tokens, source = decoder.transformer(source, positions, tokens)
    source = source.transpose(1, 2).unflatten(2, size)  # [M, 256, n, n]
    features = decoder.output_upscaling(source)  # [M, 32, 4n, 4n]
    weights = decoder.output_hypernetworks_mlps[0](tokens[:, 1])  # [M, 32]
    masks = weights[:, None] @ features.flatten(2)
    return tokens, masks.view(masks.shape[0], *features.shape[2:])


def upscale(masks: Tensor, size: tuple[int, int], full: int) -> Tensor:
    """Resize masks [M, m, m] bilinearly to full x full and keep the first `size`.

    It uses two matrix products: unlike interpolate's, their backward adds in a fixed order on GPUs.
    """
    dtype = torch.promote_types(masks.dtype, torch.float32)
    rows = bilinear(masks.shape[1], full, masks.device, dtype)[: size[0]]
    columns = bilinear(masks.shape[2], full, masks.device, dtype)[: size[1]]
    with torch.autocast(masks.device.type, enabled=False):
        return rows @ masks.to(dtype) @ columns.t()


def bilinear(source: int, target: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return weights [target, source] of linear interpolation between centres, edges clamped."""
    centres = (torch.arange(target, device=device, dtype=dtype) + 0.5) * (source / target) - 0.5
    distance = centres.clamp(0, source - 1)[:, None] - torch.arange(source, device=device)
    return (1 - distance.abs()).clamp(min=0)
