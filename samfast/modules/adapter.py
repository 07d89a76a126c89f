# SPDX-License-Identifier: Apache-2.0
"""The import path of 0.1.0 for ``samfast.adapters.adapter`` and ``samfast.adapters.attachment``."""

from samfast.adapters.adapter import Adapter, adapter_parameter_names, adapters
from samfast.adapters.attachment import Attachment, attachment, remember

__all__ = ["Adapter", "Attachment", "adapter_parameter_names", "adapters", "attachment", "remember"]
