# SPDX-License-Identifier: Apache-2.0
"""A digest that tells one frozen base model from another, cheap for the largest SAM.

It covers names, shapes and at most 1,024 evenly spaced elements of every tensor. Elements are
rounded to bfloat16, so a base cast to bfloat16 has the digest of its float32 original. It
recognises a model; it does not prove that every element is equal.
"""

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import nn

from samfast.adapters.attachment import attachment

SAMPLE = 1024
_ENCODER = ".image_encoder."
_RESIZED = ("pos_embed", "rel_pos_h", "rel_pos_w", "freqs_cis")


def fingerprint(tensor: torch.Tensor) -> str:
    """Digest one tensor's shape and a spaced sample of its elements."""
    flat = tensor.detach().reshape(-1)
    flat = flat.real if flat.is_complex() else flat  # as a cast to bfloat16 has it
    step = max(1, -(-flat.numel() // SAMPLE))
    sample = flat[::step].to(torch.bfloat16).cpu()
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    digest.update(sample.view(torch.int16).numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def fingerprints(model: nn.Module, trained: Collection[str]) -> dict[str, str]:
    """Map names to fingerprints of all tensors in the state dict, except those in ``trained``.

    trained: full names, including those of adapters. Unknown names are allowed, so the plain model
        and the attached one give the same result.
    """
    state = model.state_dict(keep_vars=True)
    excluded = {id(state[name]) for name in trained if name in state}
    record = attachment(model)
    known = {} if record is None else record.fingerprints
    return {
        name: known.get(name) or fingerprint(state[name])
        for name in sorted(state)
        if id(state[name]) not in excluded
    }


def digest_of(prints: Mapping[str, str]) -> str:
    """Digest all fingerprints under the model's own names, as samfast 0.1.0 compared them."""
    digest = hashlib.sha256()
    for name in sorted(prints):
        digest.update(f"{name} {prints[name]}\n".encode())
    return digest.hexdigest()


def identity_of(prints: Mapping[str, str]) -> str:
    """Digest all fingerprints so that image size and wrappers make no difference.

    It uses segment_anything's names and leaves out the position tables, because loading a
    checkpoint interpolates them to the image size.
    """
    name = next((n for n in sorted(prints) if _ENCODER in f".{n}"), "")
    prefix = name[: max(0, f".{name}".find(_ENCODER))]
    return digest_of(
        {
            name.removeprefix(prefix).replace("_orig_mod.", ""): value
            for name, value in prints.items()
            if name.startswith(prefix) and name.rpartition(".")[2] not in _RESIZED
        }
    )


def base_digest(model: nn.Module, trained: Collection[str]) -> str:
    """Return ``digest_of`` the model's ``fingerprints``."""
    return digest_of(fingerprints(model, trained))
