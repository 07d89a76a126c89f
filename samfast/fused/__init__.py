# SPDX-License-Identifier: Apache-2.0
"""Fused attention and transformer blocks, what proves them, and what reports on them."""
