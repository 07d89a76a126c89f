# SPDX-License-Identifier: Apache-2.0
"""SAM-COBOT on LoRA: coefficients that all blocks share, and heads."""
