# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.adapters.encoder_forward``."""

from samfast.adapters.encoder_forward import EncoderForward, SharingLayer, stamp

__all__ = ["EncoderForward", "SharingLayer", "stamp"]
