# SPDX-License-Identifier: Apache-2.0
"""TA-LoRA: low-rank updates for several tasks from one Tucker tensor."""
