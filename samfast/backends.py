# SPDX-License-Identifier: Apache-2.0
"""``samfast.backends`` is the module that kernels use, under its public name."""

import sys

from samfast.kernels._common import backends

sys.modules[__name__] = backends
