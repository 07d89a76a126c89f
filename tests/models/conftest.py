# SPDX-License-Identifier: Apache-2.0
"""A small SAM, built once."""

import pytest

from samfast.models import build_sam


@pytest.fixture(scope="session")
def tiny():
    """vit_tiny at 256; not to be written to."""
    return build_sam("vit_tiny", seed=0)
