# SPDX-License-Identifier: Apache-2.0
"""LoRA on linear layers, whole or on slices of a packed qkv layer."""
