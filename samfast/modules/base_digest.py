# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.adapters.base_digest``."""

from samfast.adapters.base_digest import SAMPLE, base_digest, fingerprint

__all__ = ["SAMPLE", "base_digest", "fingerprint"]
