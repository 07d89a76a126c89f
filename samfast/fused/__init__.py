# SPDX-License-Identifier: Apache-2.0
"""Fused attention and transformer blocks, their proof, and reports about them."""
