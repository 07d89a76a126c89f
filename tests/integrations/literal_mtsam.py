# SPDX-License-Identifier: Apache-2.0
"""Twins of MTSAM's layers, written from their formulas; names of classes and parts are theirs."""

import torch
from torch import nn
from torch.nn import functional as F


class TDLayer:
    """What the layers of all kinds have; without dropout it is a function, so no pickle."""

    def __init__(self, config):
        rate = config["dropout_rate"]
        self.type, self.task_num, self.scaling = "tucker", config["task_num"], config["scaling"]
        self.td_dropout = nn.Dropout(rate) if rate > 0 else lambda x: x

    def add(self, inputs, outputs, config):
        first, second, third = (config[f"R{i}"] for i in (1, 2, 3))
        self.td_G = nn.Parameter(torch.zeros(first, second, third))
        self.td_U1 = nn.Parameter(torch.randn(inputs, first))
        self.td_U2 = nn.Parameter(torch.randn(outputs, second))
        self.td_U3 = nn.Parameter(torch.randn(config["task_num"], third))
        self.weight.requires_grad = False


def spread(layer, x, tensor, task_idx):
    """The update for one task, or for as many groups of the batch as there are tasks."""
    if task_idx != -1:
        return F.linear(layer.td_dropout(x), tensor[task_idx])
    _, h, w, c = x.shape
    groups = x.reshape(layer.task_num, -1, h, w, c)
    parts = [F.linear(layer.td_dropout(groups[t]), tensor[t]) for t in range(layer.task_num)]
    return torch.cat(parts, dim=0)


class TDLinear(nn.Linear, TDLayer):
    """An update of all outputs."""

    def __init__(self, in_features, out_features, config, **options):
        nn.Linear.__init__(self, in_features, out_features, **options)
        TDLayer.__init__(self, config)
        self.add(in_features, out_features, config)

    def generate_tensor(self):
        core = torch.einsum("abv,tv->tab", self.td_G, self.td_U3)
        return self.scaling * torch.einsum("tab,ia,ob->toi", core, self.td_U1, self.td_U2)

    def forward(self, x, task_idx=-1):
        y = F.linear(x, self.weight, bias=self.bias)
        return y + spread(self, x, self.generate_tensor(), task_idx)


class QKVLinear(nn.Linear, TDLayer):
    """An update of some of q, k and v."""

    def __init__(self, in_features, out_features, enable_qkv, config, **options):
        nn.Linear.__init__(self, in_features, out_features, **options)
        TDLayer.__init__(self, config)
        self.enable_qkv = enable_qkv
        length = out_features // len(enable_qkv)
        self.add(in_features, length * sum(enable_qkv), config)
        self.ind = torch.tensor(enable_qkv).repeat_interleave(length)

    def generate_tensor(self):
        core = torch.einsum("abv,tv->tab", self.td_G, self.td_U3)
        return self.scaling * torch.einsum("tab,ia,ob->toi", core, self.td_U1, self.td_U2)

    def zero_pad(self, tensor):
        wide = tensor.new_zeros(tensor.shape[0], len(self.ind), tensor.shape[2])
        wide[:, self.ind, :] = tensor
        return wide

    def forward(self, x, task_idx=-1):
        y = F.linear(x, self.weight, bias=self.bias)
        return y + spread(self, x, self.zero_pad(self.generate_tensor()), task_idx)
