# SPDX-License-Identifier: Apache-2.0
"""Sums of Kronecker products, as updates and as layers."""
