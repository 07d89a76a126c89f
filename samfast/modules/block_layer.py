# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.adapters.block_layer``."""

from samfast.adapters.block_layer import BlockLayer, block_layer, dropout_seed, layer_problem

__all__ = ["BlockLayer", "block_layer", "dropout_seed", "layer_problem"]
