# SPDX-License-Identifier: Apache-2.0
"""A digest that tells one frozen base model from another, cheap for the largest SAM.

It covers names, shapes and at most 1,024 evenly spaced elements of every tensor, rounded to
bfloat16 so that a base cast to bfloat16 has the digest of its float32 original. It recognises a
model; it is no proof that every element is equal.
"""

import hashlib
from collections.abc import Collection

import torch
from torch import nn

from samfast.modules.adapter import attachment

SAMPLE = 1024


def fingerprint(tensor: torch.Tensor) -> str:
    """Digest of one tensor's shape and spaced sample."""
    flat = tensor.detach().reshape(-1)
    step = max(1, -(-flat.numel() // SAMPLE))
    sample = flat[::step].to(torch.bfloat16).cpu()
    digest = hashlib.sha256(repr(tuple(tensor.shape)).encode())
    digest.update(sample.view(torch.int16).numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def base_digest(model: nn.Module, trained: Collection[str]) -> str:
    """Digest of every tensor of the model's state dict but those in ``trained``.

    ``trained``: full names, the adapters' included; names that the model does not have are
    allowed, so the plain model and the attached one give the same digest.
    """
    state = model.state_dict(keep_vars=True)
    excluded = {id(state[name]) for name in trained if name in state}
    record = attachment(model)
    known = {} if record is None else record.fingerprints
    digest = hashlib.sha256()
    for name in sorted(state):
        if id(state[name]) not in excluded:
            digest.update(f"{name} {known.get(name) or fingerprint(state[name])}\n".encode())
    return digest.hexdigest()
