# SPDX-License-Identifier: Apache-2.0
"""Conv-LoRA on linear layers that see maps of tokens."""
