# SPDX-License-Identifier: Apache-2.0
"""``samfast.backends`` is the module that kernels use, under its public name."""

import sys
from typing import TYPE_CHECKING

from samfast.kernels._common import backends

if TYPE_CHECKING:
    from samfast.kernels._common.backends import *  # noqa: F403

sys.modules[__name__] = backends
