# SPDX-License-Identifier: Apache-2.0
"""``kronecker_factors`` in aten calls, for any device."""

import torch


def forward(rules, left, right, dtype):
    """lora_a (m · n · k, n · Q) and lora_b (n · P, m · n · k) in ``dtype``."""
    (terms, n, _), (_, rows, rank), columns = rules.shape, left.shape, right.shape[1]
    wide = torch.promote_types(dtype, torch.float32)
    lora_a = right.new_zeros(terms, n, rank, n, columns, dtype=dtype)
    diagonal = lora_a.diagonal(dim1=1, dim2=3)  # (m, k, Q, n)
    diagonal.copy_(right.transpose(1, 2)[..., None].expand_as(diagonal))
    mixed = rules.to(wide).transpose(0, 1)[:, None, :, :, None]  # (n, 1, m, n, 1)
    lora_b = mixed * left.to(wide).transpose(0, 1)[None, :, :, None, :]  # (n, P, m, n, k)
    width = terms * n * rank
    lora_b = lora_b.to(dtype).reshape(n * rows, width)
    return lora_a.view(width, n * columns), lora_b.contiguous()


def backward(da, db, rules, left, right, needs):
    """drules, dleft and dright of their parameters' dtypes; None unless needed.

    da (m · n · k, n · Q) and db (n · P, m · n · k), None where nothing that is needed comes of it
    """
    need_rules, need_left, need_right = needs
    (terms, n, _), (_, rows, rank), columns = rules.shape, left.shape, right.shape[1]
    wide = torch.promote_types((da if db is None else db).dtype, torch.float32)
    drules = dleft = dright = None
    if need_rules or need_left:
        of_terms = db.to(wide).view(n, rows, terms, n, rank).permute(2, 0, 3, 1, 4)
        flat = of_terms.reshape(terms, n * n, rows * rank)
    if need_rules:  # (m, n · n, P · k) · (m, P · k, 1)
        drules = torch.bmm(flat, left.to(wide).reshape(terms, rows * rank, 1))
        drules = drules.view(rules.shape).to(rules.dtype)
    if need_left:  # pairwise sums over cells, which a product of one row would not make
        mixed = rules.to(wide).reshape(terms, n * n, 1) * flat
        dleft = mixed.sum(1).view(left.shape).to(left.dtype)
    if need_right:
        blocks = da.to(wide).view(terms, n, rank, n, columns).diagonal(dim1=1, dim2=3)
        dright = blocks.sum(-1).transpose(1, 2).to(right.dtype).contiguous()
    return drules, dleft, dright
