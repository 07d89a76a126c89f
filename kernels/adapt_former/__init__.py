# SPDX-License-Identifier: Apache-2.0
from samfast.kernels.adapt_former.op import adapt_former

__all__ = ["adapt_former"]
